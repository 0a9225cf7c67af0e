"""Models of the study and the benchmarks: pretrained ones with their data and metrics, and random ones."""

from mapreuse_lab.models._language import LanguageModel, copying, perplexity, recall, text_windows
from mapreuse_lab.models._metrics import Metric
from mapreuse_lab.models._packages import MODEL_PACKAGES, fetch_model, model_source
from mapreuse_lab.models._random_encoders import (
    SUBSAMPLING,
    bert_base,
    conformer_m,
    minilm,
    plain_conformer_m,
    speech_like_features,
    speech_like_states,
    text_like_tokens,
)

__all__ = [
    "MODEL_PACKAGES",
    "SUBSAMPLING",
    "LanguageModel",
    "Metric",
    "bert_base",
    "conformer_m",
    "copying",
    "fetch_model",
    "minilm",
    "model_source",
    "perplexity",
    "plain_conformer_m",
    "recall",
    "speech_like_features",
    "speech_like_states",
    "text_like_tokens",
    "text_windows",
]
