"""A speech recogniser to reuse maps in: corpora, features, model, training, decoding, error rates."""

from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._calibration import calibration_batches
from mapreuse_lab.training._corpora import Corpus, open_corpus, split_by_transcript
from mapreuse_lab.training._decoding import greedy
from mapreuse_lab.training._errors import CorpusError
from mapreuse_lab.training._evaluation import ErrorRates, error_counts, evaluate, score
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import write_whole
from mapreuse_lab.training._phonemes import SpokenPhonemes, phoneme_batches, speak_with_phonemes
from mapreuse_lab.training._recogniser import BASELINE, Recogniser
from mapreuse_lab.training._synthesis import synthesise
from mapreuse_lab.training._text import LANGUAGES, alphabet, normalise
from mapreuse_lab.training._texts import generate_texts
from mapreuse_lab.training._training import TrainConfig, train

__all__ = [
    "BASELINE",
    "LANGUAGES",
    "Corpus",
    "CorpusError",
    "ErrorRates",
    "FeatureConfig",
    "Recogniser",
    "SpokenPhonemes",
    "TrainConfig",
    "alphabet",
    "calibration_batches",
    "error_counts",
    "evaluate",
    "features",
    "generate_texts",
    "greedy",
    "normalise",
    "open_corpus",
    "phoneme_batches",
    "score",
    "speak_with_phonemes",
    "split_by_transcript",
    "synthesise",
    "train",
    "waveform_of",
    "write_whole",
]
