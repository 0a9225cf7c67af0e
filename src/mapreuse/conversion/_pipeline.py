"""Whole conversions: align, apply, refit and distil, in memory or into a directory."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from mapreuse.conversion._align import align, aligned
from mapreuse.conversion._distill import DistillConfig, distill
from mapreuse.conversion._kept_work import folder_in, identity_of
from mapreuse.conversion._output_dir import (
    DISTILLED,
    LEARNED,
    REFITTED,
    check_output,
    new_directory,
    work_dir_of,
)
from mapreuse.conversion._refit import RefitCache, refit, refit_layers
from mapreuse.conversion._search import METRICS, MIN_SEARCH_BATCHES, relative_latencies, search, split_batches
from mapreuse.conversion._targets import Targets
from mapreuse.conversion._validation import check_plan, checked_batches
from mapreuse.data import check_precision
from mapreuse.models import CacheBytes, apply, cache_bytes, copy_with_same_weights, keeps_cache
from mapreuse.plan import ReusePlan

Model = TypeVar("Model", bound=nn.Module)

MIN_CONVERSION_BATCHES = MIN_SEARCH_BATCHES
"""Minimum number of batches for `convert_to_directory`."""

MIN_DISTILLATION_BATCHES = 11
"""The same with distillation, which trains on three quarters of them and holds out every eighth of those."""

_ERRORS = {
    "cosine": "1 − cosine of the last hidden states to the original's",
    "perplexity": "perplexity divided by the original's, − 1",
    "copying": "perplexity of repeated passages divided by the original's, − 1",
}

_BUDGET = re.compile(r"\s*(latency|error|cache_bytes)\s*(?:<=|≤|=)\s*([0-9]+(?:\.[0-9]*)?(?:e-?[0-9]+)?)\s*[x×]?\s*")


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        plan: the plan in force, with heads assigned.
        errors: the error on held-out calibration batches, after the steps `aligned`, `refitted` and
            `distilled`.
        latency: time of a forward pass on the calibration batch of median size, divided by the original's.
        exact_latency: the same for a plan that reuses nothing.
        parameters: number of parameters of the original and of the converted model.
        cache: bytes that the model caches for each token; None for an encoder.
        metric: the name of the error in `METRICS`.
    """

    plan: ReusePlan
    errors: dict[str, float]
    latency: float
    exact_latency: float
    parameters: tuple[int, int]
    cache: CacheBytes | None = None
    metric: str = "cosine"

    def lines(self) -> list[str]:
        """The report as lines of text."""
        before, after = self.parameters
        no_faster = not self.plan.is_full and self.latency >= self.exact_latency
        nothing = ["The plan shares no map: nothing to distil, and only the kernels of mapreuse can make it faster."]
        return [
            str(self.cache or self.plan),
            *(nothing if self.plan.is_full else []),
            f"error = {_ERRORS[self.metric]}, on held-out calibration batches",
            *(f"error, {step}: {error:.4f}" for step, error in self.errors.items()),
            f"latency: {self.latency:.2f} times the original's ({self.exact_latency:.2f} without sharing), "
            "all without mapreuse.optimize",
            *(["Sharing maps makes this model no faster on these inputs."] if no_faster else []),
            f"parameters: {before:,} before, {after:,} after ({1 - after / before:.1%} fewer)",
        ]


def convert(
    original: Model,
    plan: ReusePlan,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    distillation: DistillConfig | None = None,
    storage: str = "dense",
    memory_budget: int | None = None,
    attention: str = "self",
) -> Model:
    """A copy of a trained model whose layers share attention maps.

    With batches, the steps are `align`, `apply`, `refit` and, with a `distillation`, `distill`. Without batches, only
    `apply`.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        plan: which layers share.
        batches: calibration batches, at least four.
        distillation: settings of a distillation on the same batches.
        storage, memory_budget, attention: as for `apply`.

    Raises:
        ValueError: if `distillation` is given without batches, or one of the steps raises.

    Examples:
        >>> import torch, mapreuse as mr
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=64)
        >>> original = BertModel(BertConfig(**sizes, vocab_size=50))
        >>> batches = [{"input_ids": torch.randint(0, 50, (2, 8))} for _ in range(4)]
        >>> model = mr.convert(original, mr.ReusePlan.parse("2x2"), batches)
        >>> mr.plan_of(model).reuses(1)
        True
    """
    check_plan(plan)
    if not isinstance(distillation, DistillConfig | None):
        raise ValueError(f"distillation must be a DistillConfig or None, got {distillation!r}")
    if distillation is not None and batches is None:
        raise ValueError("distillation needs batches to learn from")
    if distillation is not None and attention == "cross":
        raise ValueError("distillation needs a plan for self-attention; leave it out")
    if batches is not None:
        batches = list(batches)
        plan = align(original, plan, batches, attention=attention)
    copied = copy.deepcopy(original)
    model = apply(copied, plan, storage=storage, memory_budget=memory_budget, attention=attention)
    if batches is not None:
        refit(model, original, batches, attention=attention)
    if batches is not None and distillation is not None:
        distill(model, original, batches, distillation)
    return model


def parse_budget(text: str) -> dict[str, float]:
    """The budget that a text describes, for `convert_to_directory`.

    >>> parse_budget("latency<=0.7"), parse_budget("error <= 0.02"), parse_budget("cache_bytes<=0.9")
    ({'latency': 0.7}, {'error': 0.02}, {'cache_bytes': 0.9})
    """
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise ValueError(
            f"budget {text!r}: expected latency<=0.7, cache_bytes<=0.9 (both relative to the original's) or "
            "error<=0.02"
        )
    return {match[1]: float(match[2])}


def convert_to_directory(
    original: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    out: str | Path,
    save: Callable[[nn.Module, Path], object],
    *,
    budget: Mapping[str, float] | None = None,
    plan: ReusePlan | None = None,
    distill_seconds: float | None = None,
    metric: str = "cosine",
    choices: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Convert a model by a given plan, or by the best plan within a budget, and save it to a new directory.

    With a budget, the plan comes from `search`: under a budget of latency or cache bytes the plan with the least
    error, under a budget of error the fastest plan. The heads of a given plan are assigned by `align`. Then the copy
    is refitted, and distilled if `distill_seconds` is given. Every fourth batch is held out for evaluation.

    `<out>.work` holds the work in progress: compared maps, evaluated plans, refitted layers, the refitted copy and
    checkpoints of the distillation. The same call continues from it after an interrupt. The notes of the
    `KeyboardInterrupt` say what is kept and what will be repeated. `out` appears when it is complete.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least 8, or 11 for a distillation.
        out: the new directory.
        save: `save(model, directory)` writes the converted copy into an existing, empty directory.
        budget: `{"latency": 0.7}` or `{"cache_bytes": 0.9}`, relative to the original's, or `{"error": 0.02}`. Give
            this or `plan`.
        plan: which layers share.
        distill_seconds: duration of the distillation.
        metric: the error of the search and of the report, by its name in `METRICS`.
        choices: arguments of `search` about share modes.

    Raises:
        ValueError: unless exactly one of budget and plan is given, if no plan is within the budget, `out` exists or
            cannot be made, or one of the steps raises.
    """
    if (budget is None) == (plan is None):
        raise ValueError("give a budget, such as latency<=0.7, or a plan, such as 2x3; one of the two")
    check_output(out)
    check_precision(original)
    distillation = None if distill_seconds is None else DistillConfig(seconds=distill_seconds)
    if distillation is None:
        given = checked_batches(batches, MIN_CONVERSION_BATCHES, "convert")
    else:
        given = checked_batches(batches, MIN_DISTILLATION_BATCHES, "convert with distillation")
    calibration, evaluation = split_batches(given)
    error_of = METRICS[metric](original, evaluation)
    work, identity = work_dir_of(out), identity_of(original, given)
    folder = folder_in(work / LEARNED, identity)
    assert folder is not None
    asked: dict[str, Any] = {
        "budget": None if budget is None else dict(budget),
        "plan": None if plan is None else plan.to_json(),
        "metric": metric,
        "choices": dict(choices or {}),
        "of": identity,
    }
    found = _load_refitted(work / REFITTED, original, asked)
    if found is None:
        latencies = None
        if budget is not None:
            options: dict[str, Any] = {**budget, **(choices or {})}
            candidates = search(original, given, metric=error_of, cache=work / LEARNED, **options)
            within = [one for one in candidates if all(getattr(one, name) <= limit for name, limit in budget.items())]
            best = within[-1 if "error" in budget else 0]
            plan, model, latencies = best.plan, best.build(), (best.latency, best.exact_latency)
            errors = {"aligned": error_of(apply(copy_with_same_weights(original), plan))}
        else:
            assert plan is not None
            plan = aligned(original, plan, calibration, folder)
            model = apply(copy.deepcopy(original), plan)
            errors = {"aligned": error_of(model)}
            refit_layers(model, Targets(original, calibration), RefitCache(sys.maxsize, folder / "refits"))
        errors["refitted"] = error_of(model)
        described: dict[str, Any] = {
            "asked": asked,
            "plan": plan.to_json(),
            "errors": errors,
            "latencies": latencies,
        }
        shutil.rmtree(work / REFITTED, ignore_errors=True)
        (work / REFITTED).mkdir(parents=True)
        save_model(model, str(work / REFITTED / "model.safetensors"))
        (work / REFITTED / "found.json").write_text(json.dumps(described))
    else:
        model, described = found
        plan, errors, latencies = ReusePlan.from_json(described["plan"]), described["errors"], described["latencies"]
    if distillation is not None and not plan.is_full:
        shuffled = random.Random(0).sample(calibration, len(calibration))  # batches are sorted by length
        distill(model, original, shuffled, distillation, out_dir=work / DISTILLED)
        errors["distilled"] = error_of(model)
    if latencies is None:
        exact = apply(copy_with_same_weights(original), ReusePlan.full(plan.num_layers))
        measured = relative_latencies(original, {"converted": model, "exact": exact}, given)
        latencies = measured["converted"], measured["exact"]
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (original, model))
    with new_directory(out) as written:
        save(model, written)
    cache = cache_bytes(model) if keeps_cache(model) else None
    return ConversionReport(plan, errors, *latencies, (before, after), cache, metric)


def _load_refitted(
    directory: Path, original: nn.Module, asked: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The refitted copy of the same conversion and its description; None if it is missing or damaged."""
    try:
        described = json.loads((directory / "found.json").read_text())  # written last
        if not isinstance(described, dict) or described.get("asked") != asked:
            return None
        model = apply(copy.deepcopy(original), ReusePlan.from_json(described["plan"]))
        load_model(model, directory / "model.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return None
    return model, described
