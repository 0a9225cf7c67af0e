"""`breakdown`: time, FLOPs and bytes of each part of a forward pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from mapreuse.console import check_number
from mapreuse.measure._attribution import PartCosts, counted_pass, profiled_pass, sizes_of
from mapreuse.measure._contestants import Batch, contestants, named_batches, split_plans
from mapreuse.measure._latency import Latency, cpu_threads, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.models import find_stack, plan_of
from mapreuse.plan import ReusePlan

PARTS = {
    "query": "query projection",
    "key": "key projection",
    "value": "value projection",
    "projections": "fused projections",
    "positions": "positional encoding and projection",
    "positional_scores": "positional scores + shift",
    "scores": "content scores",
    "softmax": "softmax",
    "context": "map × values",
    "fused": "fused attention",
    "output": "output projection",
    "feed_forward": "feed-forward",
    "convolution": "convolution",
    "norms": "norms",
    "subsampling": "subsampling",
    "embeddings": "embeddings",
    "rest": "rest",
}
"""The parts of a forward pass, and their names in tables. "fused" is one operator for scores, softmax and product."""


def breakdown(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Batch],
    *,
    plans: str = "",
    kinds: Sequence[str] = ("sdpa", "mapreuse"),
    repeats: int = 5,
    warmup: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time, FLOPs and bytes of each part of a model's forward pass, as it is and with shared maps.

    Contestants take turns. In each turn, a contestant runs once as it is, and once under the profiler. The bytes are
    the sizes of the inputs and outputs of every operator, each once. They are the memory traffic if no cache keeps a
    tensor between operators; what a fused kernel keeps inside is not in them.

    Args:
        model: a model that `apply` accepts. A model that shares maps already is measured as it is, and named "as
            saved". The model is not changed.
        batches, plans: as for `bench`.
        kinds: contestants, as for `bench`, without `+compile`.
        repeats: number of turns that count.
        warmup: number of turns before them. With 0, each timed pass follows directly on that of another contestant.
        threads: CPU threads; None for PyTorch's default.

    Returns:
        JSON-compatible results: `machine`, `parts` (the names of the parts in tables) and, in `breakdowns`, for each
        batch and contestant:

        - `name` of the contestant, such as "sdpa" or "mapreuse 4x4", and `batch`, the name of the batch;
        - `whole`: `seconds` of the forward pass without hooks and profiler, and their `spread`;
        - `parts`: `seconds`, `flops` and `bytes` of each part, summed over the model; medians over repeats;
        - `attributed`: the sum of the parts, in seconds;
        - `coverage`: the sum of the parts ÷ `whole`, median over repeats. It shows how reliable the breakdown is;
        - `layers`: for the layers of each `kind` ("computing", "reusing" or "partly reusing"), their `count`, and
          the mean of their `parts`.

    Raises:
        ValueError: if an argument is invalid.
    """
    check_number("repeats", repeats, 1, whole=True)
    check_number("warmup", warmup, 0, whole=True)
    if threads is not None:
        check_number("threads", threads, 1, whole=True)
    named = named_batches(batches)
    models = _models(model, plans, kinds)
    if not named or not models:
        raise ValueError("breakdown needs at least one batch and one contestant")
    with cpu_threads(threads):
        found = [one for name, batch in named.items() for one in _on_batch(models, name, batch, repeats, warmup)]
        return {"schema": 3, "machine": machine(), "parts": PARTS, "breakdowns": found}


def _models(model: nn.Module, plans: str, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """The models to measure, by name."""
    if plan_of(model) is not None:
        if plans:
            raise ValueError(
                "the model already shares attention maps; leave the plans out, or pass the original model"
            )
        return {"as saved": model}
    entries = contestants(kinds, split_plans(plans, len(find_stack(model).layers)), ("dense",))
    if any(entry.compiled or entry.runtime for entry in entries):
        raise ValueError("breakdown cannot measure compiled or exported models: they have no modules")
    return {entry.name: entry.build(model).eval() for entry in entries}


def _on_batch(
    models: Mapping[str, nn.Module], name: str, batch: Batch, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    first = next(iter(models.values()))
    sizes = sizes_of(first, batch)
    profiles: dict[str, list[PartCosts]] = {one: [] for one in models}

    def profiled(one: str) -> None:
        profiles[one].append(profiled_pass(models[one], batch, sizes))

    calls: dict[str, Callable[[], object]] = {}
    for one, model in models.items():
        calls[one] = partial(model, **batch)
        calls[f"{one}, by parts"] = partial(profiled, one)
    device = next(first.parameters()).device.type
    single_from = math.inf if warmup else 0.0
    measured = time_interleaved(
        calls, repeats=repeats, warmup=warmup, single_from=single_from, device=device, title=f"Timing, {name}"
    )
    found = []
    for one, model in models.items():
        counted = counted_pass(model, batch, sizes)
        # After a warm-up, each timed call is the second one of a pair.
        timed = profiles[one][warmup + 1 :: 2] if warmup else profiles[one]
        for counts in counted:
            _divide_fused(counts, timed[-1])
        found.append(_summarised(one, name, measured[one], timed, counted, model))
    return found


def _divide_fused(counts: PartCosts, profile: PartCosts) -> None:
    """Divide the FLOPs or bytes of fused attention between its two products, if its time was measured in phases."""
    for layer, part in list(counts):
        if part == "fused" and (layer, part) not in profile:
            half = counts.pop((layer, part)) / 2
            for product in ("scores", "context"):
                counts[layer, product] = counts.get((layer, product), 0.0) + half


def _summarised(
    name: str,
    batch: str,
    whole: Latency,
    profiles: list[PartCosts],
    counted: tuple[PartCosts, PartCosts],
    model: nn.Module,
) -> dict[str, Any]:
    by_kind: dict[str, list[int | None]] = {}
    num_layers = len(find_stack(model).layers)
    for layer in range(num_layers):
        by_kind.setdefault(_kind(plan_of(model), layer), []).append(layer)
    turns = zip(profiles, whole.seconds, strict=True)
    parts = _parts(profiles, counted, [None, *range(num_layers)])
    return {
        "name": name,
        "batch": batch,
        "whole": {"seconds": whole.median, "spread": whole.spread},
        "coverage": statistics.median(sum(profile.values()) / seconds for profile, seconds in turns),
        "attributed": sum(part["seconds"] for part in parts.values()),
        "parts": parts,
        "layers": [
            {"kind": kind, "count": len(layers), "parts": _parts(profiles, counted, layers, divisor=len(layers))}
            for kind, layers in by_kind.items()
        ],
    }


def _parts(
    profiles: list[PartCosts],
    counted: tuple[PartCosts, PartCosts],
    layers: Sequence[int | None],
    divisor: int = 1,
) -> dict[str, dict[str, float]]:
    """Cost of each part, summed over layers (None stands for everything outside them), divided by `divisor`."""
    costs = {}
    for part in PARTS:
        seconds = statistics.median(sum(profile.get((layer, part), 0.0) for layer in layers) for profile in profiles)
        flops, size = (sum(counts.get((layer, part), 0) for layer in layers) for counts in counted)
        costs[part] = {"seconds": seconds / divisor, "flops": int(flops) // divisor, "bytes": int(size) // divisor}
    return costs


def _kind(plan: ReusePlan | None, layer: int) -> str:
    if plan is None or not plan.reuses(layer):
        return "computing"
    return "partly reusing" if plan.computes(layer) else "reusing"
