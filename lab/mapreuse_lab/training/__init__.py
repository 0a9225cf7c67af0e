"""A speech recogniser to share maps in: corpora, features, the model, training and evaluation."""

from mapreuse_lab.training._audio import waveform_of, whole_cut
from mapreuse_lab.training._calibration import speech_batches
from mapreuse_lab.training._corpora import Corpus, open_corpus
from mapreuse_lab.training._evaluation import ErrorRates, Errors, evaluate, middle_of, resampled_rates
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import CorpusError, cache_dir, write_whole
from mapreuse_lab.training._normalise import LANGUAGES, alphabet, normalise
from mapreuse_lab.training._phonemes import phoneme_batches
from mapreuse_lab.training._prompts import fetch_packages
from mapreuse_lab.training._recogniser import BASELINE, Recogniser
from mapreuse_lab.training._training import TrainConfig, synthetic_speech, teacher_states, train

__all__ = [
    "BASELINE",
    "LANGUAGES",
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
    "synthetic_speech",
    "teacher_states",
    "train",
    "waveform_of",
    "whole_cut",
    "write_whole",
]
