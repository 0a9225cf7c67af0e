"""Attention map reuse: groups of a Transformer's layers share one attention map.

import mapreuse as mr

plan = mr.ReusePlan.grouped(num_layers=16, group_size=4)
model = mr.apply(model, plan)
"""

from mapreuse.convert import DistillConfig, align, convert, distill, fit, search
from mapreuse.models import Unsupported, apply, load, plan_of, save
from mapreuse.plan import ReusePlan

__all__ = [
    "DistillConfig",
    "ReusePlan",
    "Unsupported",
    "align",
    "apply",
    "convert",
    "distill",
    "fit",
    "load",
    "plan_of",
    "save",
    "search",
]
