"""`breakdown`: time and FLOPs of each part of a forward pass."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from mapreuse.console import ProgressCallback
from mapreuse.measure._attribution import PartCosts, counted_pass, profiled_pass, sizes_of
from mapreuse.measure._contestants import Batch, contestants, default_plans, named_batches
from mapreuse.measure._latency import Latency, cpu_threads, time_interleaved
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


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of a forward pass.

    Attributes:
        seconds: time of the part.
        flops: FLOPs of its matrix products and convolutions.
    """

    seconds: float
    flops: int


@dataclass(frozen=True)
class LayerBreakdown:
    """Mean costs of the layers of one kind.

    Attributes:
        kind: "computing", "reusing", or "partly reusing".
        count: number of layers of this kind.
        parts: mean cost of each part of such a layer.
    """

    kind: str
    count: int
    parts: dict[str, PartCost]


@dataclass(frozen=True)
class Breakdown:
    """Costs of one contestant on one batch.

    Attributes:
        name: name of the contestant, such as "sdpa" or "mapreuse 4x4".
        batch: name of the batch.
        whole: latency of the forward pass without hooks and profiler.
        coverage: sum of the parts ÷ latency, median over repeats. It shows how reliable the breakdown is.
        parts: cost of each part, summed over the model; medians over repeats.
        layers: the same for one layer of each kind.
    """

    name: str
    batch: str
    whole: Latency
    coverage: float
    parts: dict[str, PartCost]
    layers: tuple[LayerBreakdown, ...]

    @property
    def attributed(self) -> float:
        """Sum of the parts, in seconds."""
        return sum(part.seconds for part in self.parts.values())


def breakdown(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Batch],
    *,
    plans: Sequence[str] = (),
    kinds: Sequence[str] = ("sdpa", "mapreuse"),
    repeats: int = 5,
    threads: int | None = None,
    progress: ProgressCallback = lambda doing, done, total: None,
) -> list[Breakdown]:
    """Time and FLOPs of each part of a model's forward pass, as it is and with shared maps.

    Contestants take turns. In each turn, a contestant runs once as it is, and once under the profiler. The bytes that
    a part reads and writes are not reported: PyTorch knows the operands of an operator, but not what a fused kernel
    keeps in the cache.

    Args:
        model: a model that `apply` accepts. A model that shares maps already is measured as it is, and named "as
            saved". The model is not changed.
        batches: keyword dictionaries for the model's forward; see `bench`.
        plans: notations for `ReusePlan.parse`, or "full"; by default full, groups of 2 and 4, and two groups.
        kinds: contestants, as for `bench`, without `+compile`.
        repeats: number of turns that count.
        threads: CPU threads; None for PyTorch's default.
        progress: called after each turn.

    Raises:
        ValueError: if an argument is invalid.
    """
    if repeats < 1 or (threads is not None and threads < 1):
        raise ValueError(f"repeats and threads must be at least 1, got {repeats} and {threads}")
    named = named_batches(batches)
    models = _models(model, plans, kinds)
    if not named or not models:
        raise ValueError("breakdown needs at least one batch and one contestant")
    total, done = 2 * len(named) * len(models) * (1 + repeats), itertools.count(1)

    def advance(doing: str) -> None:
        progress(doing, next(done), total)

    found = []
    with cpu_threads(threads):
        for name, batch in named.items():
            found += _on_batch(models, name, batch, repeats, advance)
    return found


def _models(model: nn.Module, plans: Sequence[str], kinds: Sequence[str]) -> dict[str, nn.Module]:
    """The models to measure, by name."""
    if plan_of(model) is not None:
        if plans:
            raise ValueError(
                "the model already shares attention maps; leave the plans out, or pass the original model"
            )
        return {"as saved": model}
    notations = tuple(plans) or default_plans(len(find_stack(model).layers))
    entries = contestants(kinds, notations, ("dense",))
    if any(entry.compiled for entry in entries):
        raise ValueError("breakdown cannot measure compiled models: a compiled graph has no modules")
    return {entry.name: entry.build(model).eval() for entry in entries}


def _on_batch(
    models: Mapping[str, nn.Module], name: str, batch: Batch, repeats: int, advance: Callable[[str], object]
) -> list[Breakdown]:
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
    measured = time_interleaved(calls, repeats=repeats, device=device, advance=partial(advance, f"timing, {name}"))
    found = []
    for one, model in models.items():
        flops = counted_pass(model, batch, sizes)
        timed = profiles[one][2::2]  # one warm-up call, then pairs of calls of which the second counts
        _divide_fused(flops, timed[-1])
        found.append(_summarised(one, name, measured[one], timed, flops, model))
    return found


def _divide_fused(flops: PartCosts, profile: PartCosts) -> None:
    """Divide the FLOPs of fused attention between its two products, if its time was measured in phases."""
    for layer, part in list(flops):
        if part == "fused" and (layer, part) not in profile:
            half = flops.pop((layer, part)) / 2
            for product in ("scores", "context"):
                flops[layer, product] = flops.get((layer, product), 0.0) + half


def _summarised(
    name: str, batch: str, whole: Latency, profiles: list[PartCosts], flops: PartCosts, model: nn.Module
) -> Breakdown:
    by_kind: dict[str, list[int | None]] = {}
    num_layers = len(find_stack(model).layers)
    for layer in range(num_layers):
        by_kind.setdefault(_kind(plan_of(model), layer), []).append(layer)
    turns = zip(profiles, whole.seconds, strict=True)
    return Breakdown(
        name,
        batch,
        whole,
        statistics.median(sum(profile.values()) / seconds for profile, seconds in turns),
        _parts(profiles, flops, [None, *range(num_layers)]),
        tuple(
            LayerBreakdown(kind, len(layers), _parts(profiles, flops, layers, divisor=len(layers)))
            for kind, layers in by_kind.items()
        ),
    )


def _parts(
    profiles: list[PartCosts], flops: PartCosts, layers: Sequence[int | None], divisor: int = 1
) -> dict[str, PartCost]:
    """Cost of each part, summed over layers (None stands for everything outside them), divided by `divisor`."""
    costs = {}
    for part in PARTS:
        seconds = statistics.median(sum(profile.get((layer, part), 0.0) for layer in layers) for profile in profiles)
        count = sum(flops.get((layer, part), 0) for layer in layers)
        costs[part] = PartCost(seconds / divisor, int(count) // divisor)
    return costs


def _kind(plan: ReusePlan | None, layer: int) -> str:
    if plan is None or not plan.reuses(layer):
        return "computing"
    return "partly reusing" if plan.computes(layer) else "reusing"
