"""Attention map reuse: groups of a Transformer's layers share one attention map.

import mapreuse as mr

plan = mr.ReusePlan.grouped(num_layers=16, group_size=4)
model = mr.apply(model, plan)
"""

from importlib.metadata import version

from mapreuse.advising import advise
from mapreuse.conversion import DistillConfig, align, convert, distill, refit, search
from mapreuse.exporting import export
from mapreuse.models import Unsupported, apply, cache_bytes, drop_layers, load, optimize, plan_of, save
from mapreuse.plan import ReusePlan

__version__ = version("mapreuse")

__all__ = [
    "DistillConfig",
    "ReusePlan",
    "Unsupported",
    "__version__",
    "advise",
    "align",
    "apply",
    "cache_bytes",
    "convert",
    "distill",
    "drop_layers",
    "export",
    "load",
    "optimize",
    "plan_of",
    "refit",
    "save",
    "search",
]
