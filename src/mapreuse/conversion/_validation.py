"""Checks of models, plans and batches before anything is computed or changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.data import check_precision
from mapreuse.models import check_batch, find_stack, plan_of
from mapreuse.plan import ReusePlan


def checked_batches(batches: Iterable[Mapping[str, Any]], minimum: int, caller: str) -> list[Mapping[str, Any]]:
    """The batches as a list. Raises `ValueError` if there are fewer than `minimum`, or one is not a batch."""
    found = list(batches)
    for batch in found:
        check_batch(batch)
    if len(found) < minimum:
        raise ValueError(
            f"{caller} needs at least {minimum} calibration batches, got {len(found)}: "
            "give more samples, or split them into smaller batches"
        )
    return found


def check_plan(plan: object) -> None:
    """Raises `ValueError` if this is not a `ReusePlan`, for example text."""
    if not isinstance(plan, ReusePlan):
        raise ValueError(f"the plan must be a ReusePlan, such as ReusePlan.parse({str(plan)!r}): got {plan!r}")


def check_original(model: nn.Module, original: nn.Module, attention: str = "self") -> None:
    """Raises `ValueError` if the models do not belong together, or the original is in half precision on a CPU."""
    check_precision(original)
    if plan_of(original, attention) is not None:
        raise ValueError("the original shares attention maps itself; give the model before its conversion")
    converted, expected = (
        f"{len(find_stack(one, attention).layers)} layers of width "
        f"{getattr(getattr(one, 'config', None), 'hidden_size', None)}"
        for one in (model, original)
    )
    if converted != expected:
        raise ValueError(
            f"the model has {converted}, but its original has {expected}; give the model before its conversion"
        )


def digest(given: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits for the content of dictionaries, including shapes and types of tensors."""
    hashed = hashlib.sha256()
    for named in given:
        for name, value in named.items():
            if isinstance(value, Tensor):
                hashed.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                hashed.update(f"{name} {json.dumps(value, default=lambda one: type(one).__name__)}\n".encode())
    return hashed.hexdigest()[:16]
