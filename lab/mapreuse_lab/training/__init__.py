"""A speech recogniser to share maps in: corpora, features, the model, training and evaluation."""

from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._calibration import speech_batches
from mapreuse_lab.training._corpora import Corpus, open_corpus
from mapreuse_lab.training._evaluation import ErrorRates, Errors, evaluate, middle_of, resampled_rates
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import CorpusError, cache_dir, write_whole
from mapreuse_lab.training._normalise import alphabet, normalise
from mapreuse_lab.training._phonemes import phoneme_batches
from mapreuse_lab.training._prompts import fetch_packages
from mapreuse_lab.training._recogniser import BASELINE, Recogniser
from mapreuse_lab.training._training import TrainConfig, train

__all__ = [
    "BASELINE",
    "Corpus",
    "CorpusError",
    "ErrorRates",
    "Errors",
    "FeatureConfig",
    "Recogniser",
    "TrainConfig",
    "alphabet",
    "cache_dir",
    "evaluate",
    "features",
    "fetch_packages",
    "middle_of",
    "normalise",
    "open_corpus",
    "phoneme_batches",
    "resampled_rates",
    "speech_batches",
    "train",
    "waveform_of",
    "write_whole",
]
