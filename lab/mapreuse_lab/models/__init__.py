"""Models of the study and the benchmarks: pretrained ones with their data and metrics, and random ones."""

from mapreuse_lab.models._embeddings import EmbeddingModel, calibration_sentences, evaluation_sentences
from mapreuse_lab.models._evaluation import (
    Task,
    evaluate_plan,
    models_under_plan,
    open_task,
    quality_json,
    quality_tables,
)
from mapreuse_lab.models._in_runtime import ExportedModule, in_runtime
from mapreuse_lab.models._language import LanguageModel, copying, perplexity, recall, text_windows, token_losses
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
from mapreuse_lab.models._speech import SpeechModel
from mapreuse_lab.models._teacher import taught_corpus, taught_speech
from mapreuse_lab.models._texts import bible, essays, python_reference

__all__ = [
    "MODEL_PACKAGES",
    "SUBSAMPLING",
    "EmbeddingModel",
    "ExportedModule",
    "LanguageModel",
    "Metric",
    "SpeechModel",
    "Task",
    "bert_base",
    "bible",
    "calibration_sentences",
    "conformer_m",
    "copying",
    "essays",
    "evaluate_plan",
    "evaluation_sentences",
    "fetch_model",
    "in_runtime",
    "minilm",
    "model_source",
    "models_under_plan",
    "open_task",
    "perplexity",
    "plain_conformer_m",
    "python_reference",
    "quality_json",
    "quality_tables",
    "recall",
    "speech_like_features",
    "speech_like_states",
    "taught_corpus",
    "taught_speech",
    "text_like_tokens",
    "text_windows",
    "token_losses",
]
