"""What a conversion is calibrated on, checked before anything is computed or changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.plan import ReusePlan


def calibration_batches(batches: Iterable[Mapping[str, Any]], fewest: int, reader: str) -> list[Mapping[str, Any]]:
    """The batches as a list. Raises `ValueError` where there are fewer than `reader` needs."""
    found = list(batches)
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


def digest(*tensors: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of these tensors' contents."""
    summed = hashlib.sha256()
    for named in tensors:
        for name, value in named.items():
            summed.update(name.encode())
            if isinstance(value, Tensor):
                summed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return summed.hexdigest()[:16]
