"""From a trained model to one that reuses maps, the original untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from mapreuse.conversion._align import align
from mapreuse.conversion._distill import DistillConfig, distill
from mapreuse.conversion._refit import refit
from mapreuse.conversion._validation import check_plan
from mapreuse.models import apply
from mapreuse.plan import ReusePlan

Model = TypeVar("Model", bound=nn.Module)


def convert(
    original: Model,
    plan: ReusePlan,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    distillation: DistillConfig | None = None,
    storage: str = "dense",
    memory_budget: int | None = None,
) -> Model:
    """A copy of `original` whose layers share maps as `plan` says; the original stays as it is.

    Args:
        original: a trained model that `apply` accepts.
        plan: which layers share.
        batches: calibration batches, at least four; with them, heads are assigned by `align`, and projections
            refitted by `refit`. Without, each head applies the head that the plan names, and weights stay.
        distillation: with it, the refitted copy is trained by `distill` on the same batches.
        storage, memory_budget: as for `apply`.

    Raises:
        ValueError: where a distillation is asked for without batches, or `align`, `apply`, `refit` or `distill` does.
    """
    check_plan(plan)
    if distillation is not None and batches is None:
        raise ValueError("distillation needs batches to learn from")
    if batches is not None:
        batches = list(batches)
        plan = align(original, plan, batches)
    model = apply(copy.deepcopy(original), plan, storage=storage, memory_budget=memory_budget)
    if batches is not None:
        refit(model, original, batches)
    if batches is not None and distillation is not None:
        distill(model, original, batches, distillation)
    return model
