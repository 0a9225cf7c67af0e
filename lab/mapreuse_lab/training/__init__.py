"""A speech recogniser to share maps in: corpora, features, the model, training and evaluation."""

from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._calibration import speech_batches
from mapreuse_lab.training._corpora import Corpus, open_corpus, split_by_transcript
from mapreuse_lab.training._evaluation import ErrorRates, error_counts, error_rates, evaluate
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import CorpusError, cache_dir, write_whole
from mapreuse_lab.training._normalise import LANGUAGES, alphabet, normalise
from mapreuse_lab.training._phonemes import PAUSE, phoneme_batches, speak_with_phonemes
from mapreuse_lab.training._prompts import fetch_packages
from mapreuse_lab.training._recogniser import BASELINE, Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise
from mapreuse_lab.training._training import TrainConfig, train

__all__ = [
    "BASELINE",
    "LANGUAGES",
    "PAUSE",
    "Corpus",
    "CorpusError",
    "ErrorRates",
    "FeatureConfig",
    "Recogniser",
    "TrainConfig",
    "alphabet",
    "cache_dir",
    "error_counts",
    "error_rates",
    "evaluate",
    "features",
    "fetch_packages",
    "generate_sentences",
    "normalise",
    "open_corpus",
    "phoneme_batches",
    "speak_with_phonemes",
    "speech_batches",
    "split_by_transcript",
    "synthesise",
    "train",
    "waveform_of",
    "write_whole",
]
