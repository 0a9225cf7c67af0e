"""Models of the study and the benchmarks."""

from mapreuse_lab.models._encoders import ENCODERS, SUBSAMPLING, Encoder, conformer_m, speech_like_features

__all__ = [
    "ENCODERS",
    "SUBSAMPLING",
    "Encoder",
    "conformer_m",
    "speech_like_features",
]
