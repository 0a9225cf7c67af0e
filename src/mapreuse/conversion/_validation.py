"""What a conversion is calibrated on, checked before anything is computed or changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.models import check_batch, find_stack, plan_of
from mapreuse.plan import ReusePlan


def calibration_batches(batches: Iterable[Mapping[str, Any]], fewest: int, reader: str) -> list[Mapping[str, Any]]:
    """The batches as a list. Raises `ValueError` where there are fewer than `reader` needs, or they are none."""
    found = list(batches)
    for batch in found:
        check_batch(batch)
    if len(found) < fewest:
        raise ValueError(
            f"{reader} needs at least {fewest} calibration batches, got {len(found)}: "
            "give more samples, or split them into smaller batches"
        )
    return found


def check_plan(plan: object) -> None:
    """Raises `ValueError` for what is not a plan, such as the notation of one."""
    if not isinstance(plan, ReusePlan):
        raise ValueError(f"the plan must be a ReusePlan, such as ReusePlan.parse({str(plan)!r}): got {plan!r}")


def check_precision(model: nn.Module) -> None:
    """Raises `ValueError` for a model in half precision on a CPU, whose products are slow and too coarse there."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is in {str(parameter.dtype).removeprefix('torch.')} on the CPU; "
                "convert the model in float32: model.float(), or --float32 on the command line"
            )


def check_original(model: nn.Module, original: nn.Module) -> None:
    """Raises `ValueError` for what a converted model cannot have been converted from, or in half precision."""
    check_precision(original)
    if plan_of(original) is not None:
        raise ValueError("the original reuses attention maps itself; give the model that was converted, as it was")
    (layers, width), wanted = (
        (len(find_stack(one).layers), getattr(getattr(one, "config", None), "hidden_size", None))
        for one in (model, original)
    )
    if (layers, width) != wanted:
        raise ValueError(
            f"the model has {layers} layers of width {width}, and what should be its original {wanted[0]} of "
            f"{wanted[1]}; give the model that was converted"
        )


def digest(given: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits of what is in these dictionaries: of tensors their contents, shapes and types."""
    summed = hashlib.sha256()
    for named in given:
        for name, value in named.items():
            if isinstance(value, Tensor):
                summed.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                summed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                summed.update(f"{name} {json.dumps(value, default=lambda one: type(one).__name__)}\n".encode())
    return summed.hexdigest()[:16]
