"""Closed-form refit of a converted model's value and output projections."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._layer_cache import LayerCache, in_evaluation_mode
from mapreuse.conversion._least_squares import DRIFT_SHARES, HeadProjections, LeastSquares
from mapreuse.conversion._targets import Targets, is_held_out
from mapreuse.conversion._validation import check_original
from mapreuse.data import check_precision
from mapreuse.models import Layer, find_stack, optimized, output_projection, plan_of, value_projection
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate penalties, relative to the mean square of the inputs."""

_MAX_INPUTS = 12_288
"""Maps times width up to which values are refitted; the normal equations take 8 · (maps · width)² bytes."""

_SWEEPS = 3
"""Number of times that values and output are solved in turn."""


@dataclass(frozen=True)
class LayerRefit:
    """What `refit` did to one reusing layer.

    Attributes:
        layer: index of the layer.
        before: held-out error of the layer's output, relative to its size, with the weights it had.
        after: the same with the weights it has now; equal to `before` if the refit did not help.
        ridge: the penalty chosen, or None if the layer kept its weights.
        values: whether the value projection was refitted too.
    """

    layer: int
    before: float
    after: float
    ridge: float | None
    values: bool


def refit(model: nn.Module, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[LayerRefit]:
    """Refit the value and output projections of every reusing layer, in place, to reproduce the original's output.

    Layer by layer from the first, ridge regression in float64:

        V, O, b = argmin ‖Σ_h A_h X V_h O_h + b − Y‖² + λ ‖V − V₀‖² + λ ‖O − O₀‖²

    with X the input of the attention in the converted model, whose earlier layers are refitted already, A the maps it
    applies, and Y the attention's output in the original. The regression is solved for O and b, then three times for V
    (head by head) and for O and b. Every fourth batch is held out to choose λ, whether Y also corrects the error that
    the layer's input has by then, and whether V changes. A layer that no candidate improves keeps its weights.

    Padding is left out. Heads that apply the same map share its equations; heads that compute their own map are
    refitted too. Values keep their weights in layers where heads share them (grouped-query attention), and where the
    number of maps times the width exceeds 12,288.

    Args:
        model: a converted model with a plan in force.
        original: the model it was converted from.
        batches: calibration batches for both models, at least four.

    Returns:
        One report for each reusing layer, in order.

    Raises:
        ValueError: if no plan is in force, there are too few batches or positions, a model is in half precision on a
            CPU, `original` has another depth or width or a plan, or activations are not finite.
    """
    if plan_of(model) is None:
        raise ValueError("refit needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original)
    return refit_layers(model, Targets(original, batches))


def refit_layers(model: nn.Module, targets: Targets, cache: RefitCache | None = None) -> list[LayerRefit]:
    """`refit` towards given targets.

    With a `cache`, the model must be a fresh copy of the original under a plan, like the models whose layers the cache
    holds. Layers that are cached are not refitted again.
    """
    plan = plan_of(model)
    assert plan is not None
    layers = LayerCache(model, targets.batches, plan, None if cache is None else targets.cache)
    reports: list[LayerRefit] = []
    with in_evaluation_mode(model), optimized(model):
        for layer in filter(plan.reuses, range(plan.num_layers)):
            report = None if cache is None else cache.restore(model, plan, layer)
            if report is None:
                report = _refit_layer(layer, layers, targets)
                if cache is not None:
                    cache.store(model, plan, report)
            logger.info("layer %d: held-out error %.4f, before %.4f", layer, report.after, report.before)
            reports.append(report)
    return reports


class RefitCache:
    """Refitted weights of layers, for other plans of the same model.

    Two plans that agree up to a layer refit that layer alike, if its heads and those of the refitted layers before it
    are stored in the same order, which depends on later layers too.

    Args:
        max_bytes: maximum size; the least recently used layers are dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._layers = dict[tuple[Any, ...], tuple[LayerRefit, HeadProjections]]()

    def restore(self, model: nn.Module, plan: ReusePlan, index: int) -> LayerRefit | None:
        """Give a layer, in place, the weights it got under a plan that agrees up to it; None if there are none."""
        key = _up_to(index, model, plan)
        if key not in self._layers:
            return None
        report, projections = self._layers[key] = self._layers.pop(key)
        if report.ridge is not None:
            layer = find_stack(model).layers[index]
            write(layer, output_projection(layer), projections, moved=report.values)
        return report

    def store(self, model: nn.Module, plan: ReusePlan, report: LayerRefit) -> None:
        """Store the weights of a refitted layer."""
        layer = find_stack(model).layers[report.layer]
        projection = output_projection(layer)
        projections = read(layer, projection, maps_of(layer) if report.values else None)
        dtype = projection.weight.dtype
        stored = replace(projections, output=projections.output.to(dtype), values=projections.values.to(dtype))
        self._layers[_up_to(report.layer, model, plan)] = report, stored
        while sum(one.output.nbytes + one.values.nbytes for _, one in self._layers.values()) > self._max_bytes:
            del self._layers[next(iter(self._layers))]


def _up_to(index: int, model: nn.Module, plan: ReusePlan) -> tuple[Any, ...]:
    layouts: list[Any] = [layer.attention._layout for layer in find_stack(model).layers[: index + 1]]
    return plan.layers[: index + 1], tuple(layout.order for layout in layouts if plan.reuses(layout.layer))


def _refit_layer(index: int, layers: LayerCache, targets: Targets) -> LayerRefit:
    layer = layers.layers[index]
    projection = output_projection(layer)
    maps = maps_of(layer)
    inputs = len(set(maps)) * value_projection(layer).weight.shape[-1]
    moves_values = value_projection(layer).num_heads == len(maps) and inputs <= _MAX_INPUTS
    start = read(layer, projection, maps if moves_values else None)

    def observed(held_out: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, target and drift of each batch."""
        for number, rows in enumerate(targets.valid):
            if is_held_out(number) != held_out:
                continue
            target, original_inputs = targets.attention(index, number)
            given, inputs = layers.context(index, number, of_whole_inputs=moves_values)
            given = start.one_per_map(given[rows])
            triple = given, target, original_inputs - inputs[rows]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in triple):
                raise ValueError(f"layer {index}: activations are not finite; check the calibration batches")
            yield triple

    def solved(share: float) -> tuple[float, HeadProjections]:
        """The penalty with the least held-out error of the attention's output, and its output projection."""
        found = [(ridge, training.solve(start, ridge, share)) for ridge in _RIDGES]
        return min(
            found, key=lambda one: held_out.error(HeadProjections.of_contexts(one[1].output, one[1].bias), share)
        )

    training = LeastSquares(start)
    held_out = LeastSquares(HeadProjections.of_contexts(start.output, start.bias))
    for triple in observed(held_out=False):
        training.add(*triple)
    for given, target, drift in observed(held_out=True):
        held_out.add(start.contexts(given), target, drift)
    errors = _OutputErrors(index, layers, targets)
    restore = _restorer(layer, projection)
    candidates = [(share, *solved(share)) for share in DRIFT_SHARES]
    try:
        before, *after = errors(
            [restore, *(functools.partial(write, layer, projection, one[2]) for one in candidates)]
        )
        if not math.isfinite(before):
            raise ValueError(f"layer {index}: its output is not finite; check the calibration batches")
        best, (share, ridge, projections) = min(zip(after, candidates, strict=True), key=lambda pair: pair[0])
        moved = False
        if best < before and moves_values:
            candidate = training.solve(start, ridge, share, sweeps=_SWEEPS)
            (error,) = errors([functools.partial(write, layer, projection, candidate, moved=True)])
            if error < best:
                best, moved, projections = error, True, candidate
    finally:
        restore()  # also after an error or an interrupt: the model holds a candidate
    if best >= before:
        return LayerRefit(index, before, before, None, False)
    write(layer, projection, projections, moved=moved)
    return LayerRefit(index, before, best, ridge, moved)


class _OutputErrors:
    """Held-out error √(Σ ‖h − h°‖² / Σ ‖h°‖²) of a layer's output, the original's with °, after each of some changes
    of its weights; infinite if the output is not finite."""

    def __init__(self, index: int, layers: LayerCache, targets: Targets) -> None:
        self._index, self._layers, self._targets = index, layers, targets
        self._held_out = {
            number: targets.output(index, number) for number in range(len(targets.batches)) if is_held_out(number)
        }
        self._size = sum(float(output.double().square().sum()) for output in self._held_out.values())

    def __call__(self, changes: Sequence[Callable[[], None]]) -> list[float]:
        sums = torch.zeros(len(changes), dtype=torch.float64)
        for number, output in self._held_out.items():
            rows = self._targets.valid[number]
            found = self._layers.outputs(self._index, number, changes)
            sums += torch.stack([(one[rows] - output).double().square().sum() for one in found]).cpu()
        errors = [(one / (self._size or 1.0)) ** 0.5 for one in sums.tolist()]
        return [error if math.isfinite(error) else math.inf for error in errors]


def maps_of(layer: Layer) -> tuple[int, ...]:
    """For each head in the order of the layer's context, the number of the map that it applies."""
    layout: Any = layer.attention._layout
    applied = [(layout.layer, slot) for slot in range(layout.computing)]
    applied += [(source, head) for source, pairs in layout.parts for head, _ in pairs]
    numbers = {one: number for number, one in enumerate(dict.fromkeys(applied))}
    return tuple(numbers[one] for one in applied)


def read(layer: Layer, projection: nn.Linear | Conv1D, maps: tuple[int, ...] | None) -> HeadProjections:
    """The projections of a layer that applies these maps, or its output projection alone if None."""
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
    layout: Any = layer.attention._layout
    output = weight.detach().double().unflatten(0, (layout.num_heads, -1))
    bias = None if projection.bias is None else projection.bias.detach().double()
    if maps is None:
        return HeadProjections.of_contexts(output, bias)
    values = value_projection(layer)
    value_bias = torch.zeros_like(output[..., 0]) if values.bias is None else values.bias.double()
    return HeadProjections(maps, values.weight.double().mT, value_bias, output, bias)


@torch.no_grad()
def write(layer: Layer, projection: nn.Linear | Conv1D, weights: HeadProjections, *, moved: bool = False) -> None:
    """Write the output projection, and the values if they `moved`, into a layer."""
    output = weights.output.flatten(0, 1)
    projection.weight.copy_(output if isinstance(projection, Conv1D) else output.mT)
    if weights.bias is not None:
        projection.bias.copy_(weights.bias)
    if moved:
        value_projection(layer).assign(weights.values.mT)


def _restorer(layer: Layer, projection: nn.Linear | Conv1D) -> Callable[[], None]:
    """A function that restores the projections of a layer as they are now."""
    parameters = [*projection.parameters(), *value_projection(layer).module.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)

    return restore
