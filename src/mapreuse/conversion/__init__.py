"""How does a trained model become one that shares maps and stays good?"""

from mapreuse.conversion._align import align
from mapreuse.conversion._distill import Distillation, DistillConfig, distill
from mapreuse.conversion._evaluation import PlanEvaluator, hidden_state_error
from mapreuse.conversion._language_errors import copying_error, perplexity_error
from mapreuse.conversion._output_dir import check_output, copy_companions
from mapreuse.conversion._pipeline import (
    MIN_CONVERSION_BATCHES,
    MIN_DISTILLATION_BATCHES,
    ConversionReport,
    convert,
    convert_to_directory,
    parse_budget,
)
from mapreuse.conversion._refit import LayerRefit, refit
from mapreuse.conversion._search import METRICS, Candidate, relative_latencies, search
from mapreuse.conversion._search_heuristic import SearchHeuristic
from mapreuse.conversion._share_mode_heuristic import ShareModeHeuristic
from mapreuse.conversion._training_loop import LoopConfig, TrainingLoop, TrainingState, checkpoints

__all__ = [
    "METRICS",
    "MIN_CONVERSION_BATCHES",
    "MIN_DISTILLATION_BATCHES",
    "Candidate",
    "ConversionReport",
    "DistillConfig",
    "Distillation",
    "LayerRefit",
    "LoopConfig",
    "PlanEvaluator",
    "SearchHeuristic",
    "ShareModeHeuristic",
    "TrainingLoop",
    "TrainingState",
    "align",
    "check_output",
    "checkpoints",
    "convert",
    "convert_to_directory",
    "copy_companions",
    "copying_error",
    "distill",
    "hidden_state_error",
    "parse_budget",
    "perplexity_error",
    "refit",
    "relative_latencies",
    "search",
]
