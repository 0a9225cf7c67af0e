"""A whole conversion, as the command line asks for it: search, align, refit, distil."""

from __future__ import annotations

import copy
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mapreuse.convert._align import align
from mapreuse.convert._batches import calibration_batches, check_precision
from mapreuse.convert._distill import DistillConfig, distill
from mapreuse.convert._fit import fit
from mapreuse.convert._search import FEWEST, Candidate, calibrating_and_judging, relative_latency, search
from mapreuse.convert._states import hidden_state_error
from mapreuse.models import apply
from mapreuse.plan import ReusePlan

_BUDGET = re.compile(r"\s*(latency|error)\s*(?:<=|≤|=)\s*([0-9.]+)\s*[x×]?\s*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")
_NOT_COPIED = (*_WEIGHTS, "config.json", "onnx", "openvino", ".git*", "__pycache__")


@dataclass(frozen=True)
class Converted:
    """What a conversion did to a model.

    Attributes:
        plan: the plan in force, heads assigned.
        errors: the error (`hidden_state_error` on calibration batches kept apart) after each step: `aligned`,
            `refitted` and, where it was asked for, `distilled`.
        latency: time of a forward pass on the calibration batch of median size, by the original's in the same run.
        parameters: of the original and of the converted model.
    """

    plan: ReusePlan
    errors: dict[str, float]
    latency: float
    parameters: tuple[int, int]


def parse_budget(text: str) -> dict[str, float]:
    """`{"latency": 0.7}` from "latency<=0.7" or "latency ≤ 0.7×", `{"error": 0.02}` from "error<=0.02"."""
    match = _BUDGET.fullmatch(text)
    try:
        if match is not None:
            return {match[1]: float(match[2])}
    except ValueError:
        pass
    raise ValueError(f"budget {text!r}: expected latency<=0.7 (of the original's time) or error<=0.02")


def convert_whole(
    original: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    budget: Mapping[str, float] | None = None,
    plan: ReusePlan | None = None,
    distill_seconds: float | None = None,
    cache: str | Path | None = None,
) -> tuple[nn.Module, Converted]:
    """A converted copy of `original`, by the best plan that `search` finds within the budget, or by the plan given.

    Of the plans within a budget of latency, the one with the least error is taken; within one of error, the fastest.
    Heads of a plan given are assigned by `align`. The copy is refitted, and distilled where `distill_seconds` says
    how long.

    Raises:
        ValueError: where not exactly one of budget and plan is given, no plan is within the budget, or `search`,
            `fit` or `distill` raises.
    """
    if (budget is None) == (plan is None):
        raise ValueError("give a budget, such as latency<=0.7, or a plan, such as 2x3; one of the two")
    check_precision(original)
    given = calibration_batches(batches, FEWEST, "convert")
    calibration, judging = calibrating_and_judging(given)
    if budget is not None:
        latency, error = budget.get("latency"), budget.get("error")
        plan = _within(search(original, given, latency=latency, error=error, cache=cache), latency, error).plan
    assert plan is not None
    plan = align(original, plan, calibration)
    judge = hidden_state_error(original, judging)
    model = apply(copy.deepcopy(original), plan)
    errors = {"aligned": judge(model)}
    fit(model, original, calibration)
    errors["refitted"] = judge(model)
    if distill_seconds is not None:
        teaching = random.Random(0).sample(calibration, len(calibration))  # not from short to long
        distill(model, original, teaching, DistillConfig(seconds=distill_seconds))
        errors["distilled"] = judge(model)
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (original, model)]
    latency = relative_latency(original, model, given)
    return model, Converted(plan, errors, latency, (numbers[0], numbers[1]))


def copy_companions(source: str | Path, out: str | Path) -> None:
    """Copies what lies beside a model's weights: tokenizer, feature extractor, pooling, model card."""
    patterns, target = shutil.ignore_patterns(*_NOT_COPIED), Path(out).resolve()

    def ignored(directory: str, names: list[str]) -> set[str]:
        inside = {name for name in names if (Path(directory) / name).resolve() == target}
        return patterns(directory, names) | inside

    shutil.copytree(source, out, ignore=ignored, dirs_exist_ok=True)


def check_empty(out: str | Path) -> None:
    """Raises `ValueError` where `out` exists and is not an empty directory."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another directory or delete it")


def _within(found: Sequence[Candidate], latency: float | None, error: float | None) -> Candidate:
    """The fastest plan of an error within the budget, or the most exact one of a latency within it."""
    if latency is None:
        return min(found, key=lambda candidate: candidate.latency)  # `search` keeps to a budget of error
    within = [candidate for candidate in found if candidate.latency <= latency]
    if not within:
        fastest = min(found, key=lambda candidate: candidate.latency)
        raise ValueError(
            f"no plan found takes {latency} of the original's time, by measurement; the fastest takes "
            f"{fastest.latency:.2f}, with an error of {fastest.error:.3f}"
        )
    return min(within, key=lambda candidate: candidate.error)
