"""Attention map reuse: groups of a Transformer's layers share one attention map.

import mapreuse as mr

plan = mr.ReusePlan.grouped(num_layers=16, group_size=4)
model = mr.apply(model, plan)
"""

from mapreuse.conversion import DistillConfig, align, convert, distill, refit, search
from mapreuse.models import Unsupported, apply, load, optimize, plan_of, save
from mapreuse.plan import ReusePlan

__all__ = [
    "DistillConfig",
    "ReusePlan",
    "Unsupported",
    "align",
    "apply",
    "convert",
    "distill",
    "load",
    "optimize",
    "plan_of",
    "refit",
    "save",
    "search",
]
