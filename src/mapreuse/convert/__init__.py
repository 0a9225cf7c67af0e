"""How does a trained model become one that reuses maps, and stays good?"""

from mapreuse.convert._align import align, align_by, group_by
from mapreuse.convert._convert import convert
from mapreuse.convert._distill import Distillation, DistillConfig, distill
from mapreuse.convert._fit import LayerFit, fit
from mapreuse.convert._schedule import learning_rate, spent

__all__ = [
    "DistillConfig",
    "Distillation",
    "LayerFit",
    "align",
    "align_by",
    "convert",
    "distill",
    "fit",
    "group_by",
    "learning_rate",
    "spent",
]
