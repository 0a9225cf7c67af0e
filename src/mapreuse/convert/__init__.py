"""How does a trained model become one that reuses maps, and stays good?"""

from mapreuse.convert._align import align, align_by, group_by, output_errors
from mapreuse.convert._calibration import (
    OpenedModel,
    batches_by_length,
    check_enough,
    open_batches,
    open_model,
)
from mapreuse.convert._checkpoints import DAMAGED, checkpoints, load_moments, save_moments
from mapreuse.convert._convert import convert
from mapreuse.convert._directory import (
    Converted,
    check_new,
    check_work,
    convert_whole,
    copy_companions,
    parse_budget,
    written_whole,
)
from mapreuse.convert._distill import Distillation, DistillConfig, distill
from mapreuse.convert._fit import LayerFit, fit
from mapreuse.convert._judged import Judged
from mapreuse.convert._ranking import Ranking
from mapreuse.convert._samples import sound_files
from mapreuse.convert._schedule import learning_rate, spent
from mapreuse.convert._search import Candidate, Candidates, relative_latencies, search
from mapreuse.convert._states import hidden_state_error

__all__ = [
    "DAMAGED",
    "Candidate",
    "Candidates",
    "Converted",
    "DistillConfig",
    "Distillation",
    "Judged",
    "LayerFit",
    "OpenedModel",
    "Ranking",
    "align",
    "align_by",
    "batches_by_length",
    "check_enough",
    "check_new",
    "check_work",
    "checkpoints",
    "convert",
    "convert_whole",
    "copy_companions",
    "distill",
    "fit",
    "group_by",
    "hidden_state_error",
    "learning_rate",
    "load_moments",
    "open_batches",
    "open_model",
    "output_errors",
    "parse_budget",
    "relative_latencies",
    "save_moments",
    "search",
    "sound_files",
    "spent",
    "written_whole",
]
