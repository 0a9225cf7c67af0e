"""Models of the study and the benchmarks."""

from mapreuse_lab.models._random_encoders import (
    SUBSAMPLING,
    bert_base,
    conformer_m,
    plain_conformer_m,
    speech_like_features,
    speech_like_states,
    text_like_tokens,
)

__all__ = [
    "SUBSAMPLING",
    "bert_base",
    "conformer_m",
    "plain_conformer_m",
    "speech_like_features",
    "speech_like_states",
    "text_like_tokens",
]
