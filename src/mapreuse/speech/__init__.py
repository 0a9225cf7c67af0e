"""A speech recogniser to reuse maps in: corpora, features, model, training, decoding, error rates."""

from mapreuse.speech._audio import waveform_of
from mapreuse.speech._calibration import calibration_batches
from mapreuse.speech._corpora import Corpus, open_corpus, split_by_transcript
from mapreuse.speech._decoding import beam_search, greedy
from mapreuse.speech._errors import CorpusError
from mapreuse.speech._evaluation import Scores, error_counts, evaluate, score
from mapreuse.speech._features import FeatureConfig, features
from mapreuse.speech._files import write_whole
from mapreuse.speech._language_model import LanguageModel
from mapreuse.speech._phonemes import SpokenPhonemes, phoneme_batches, speak_with_phonemes
from mapreuse.speech._recogniser import BASELINE, DECODERS, Fusion, Recogniser
from mapreuse.speech._synthesis import synthesise
from mapreuse.speech._text import LANGUAGES, alphabet, normalise
from mapreuse.speech._texts import generate_texts
from mapreuse.speech._training import TrainConfig, train

__all__ = [
    "BASELINE",
    "DECODERS",
    "LANGUAGES",
    "Corpus",
    "CorpusError",
    "FeatureConfig",
    "Fusion",
    "LanguageModel",
    "Recogniser",
    "Scores",
    "SpokenPhonemes",
    "TrainConfig",
    "alphabet",
    "beam_search",
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
