"""How does a trained model become one that reuses maps, and stays good?"""

from mapreuse.conversion._align import align, align_by, group_by, output_errors
from mapreuse.conversion._convert import convert
from mapreuse.conversion._distill import Distillation, DistillConfig, distill
from mapreuse.conversion._evaluation import Judged
from mapreuse.conversion._pipeline import (
    Converted,
    check_new,
    check_work,
    convert_whole,
    copy_companions,
    parse_budget,
    written_whole,
)
from mapreuse.conversion._refit import LayerFit, refit
from mapreuse.conversion._search import Candidate, Candidates, relative_latencies, search
from mapreuse.conversion._search_heuristic import Ranking
from mapreuse.conversion._states import hidden_state_error
from mapreuse.conversion._training_loop import LoopConfig, TrainingLoop, TrainingState, checkpoints

__all__ = [
    "Candidate",
    "Candidates",
    "Converted",
    "DistillConfig",
    "Distillation",
    "Judged",
    "LayerFit",
    "LoopConfig",
    "Ranking",
    "TrainingLoop",
    "TrainingState",
    "align",
    "align_by",
    "check_new",
    "check_work",
    "checkpoints",
    "convert",
    "convert_whole",
    "copy_companions",
    "distill",
    "group_by",
    "hidden_state_error",
    "output_errors",
    "parse_budget",
    "refit",
    "relative_latencies",
    "search",
    "written_whole",
]
