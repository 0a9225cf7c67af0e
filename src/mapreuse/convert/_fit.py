"""Closed-form refit of a converted model's value and output projections."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.convert._batches import check_original, check_precision
from mapreuse.convert._states import in_evaluation_mode
from mapreuse.convert._sums import DRIFT, Sums, Weights, on_contexts
from mapreuse.convert._wanted import Wanted, is_held_out, outputs, until
from mapreuse.models import (
    Layer,
    find_stack,
    output_projection,
    plan_of,
    value_projection,
)
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried, relative to the mean square of what is regressed on."""

_SWEEPS = 3
"""Times that values and output are solved in turn."""

_MOST_INPUTS = 12_288
"""Maps · width up to which values are refitted: their normal equations take 8 · (maps · width)² bytes."""


@dataclass(frozen=True)
class LayerFit:
    """What `fit` did to one reusing layer.

    Attributes:
        layer: index of the layer.
        before: held-out error of the layer's output, relative to its size, with the weights the layer had.
        after: the same with the weights it has now; equal to `before` where the refit did not help.
        ridge: the ridge chosen, or None where the layer kept its weights.
        values: whether the value projection was refitted too.
    """

    layer: int
    before: float
    after: float
    ridge: float | None
    values: bool


def fit(model: nn.Module, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[LayerFit]:
    """Refit, in place, the value and output projections of every reusing layer so that its output is the original's.

    Layer by layer from below, with X the input of the attention in the converted model as it is by then, A the maps
    it applies, and Y the attention's output in the original, plus what the input of the layer has lost by then (its
    drift):

        V, O, b = argmin ‖Σ_h A_h X V_h O_h + b − Y‖² + λ ‖V − V₀‖² + λ ‖O − O₀‖²

    solved for O and b, then for V one head after the other, in turn, each exactly, from normal equations summed over
    the batches in float64. λ is chosen with O alone, on held-out batches by the error of the attention's output; then
    whether the drift is added, which helps only where nothing but a sum comes after O, and whether V moves, by the
    error of what the whole layer puts out there. A layer whose output no candidate improves keeps its weights.
    Padding is left out. Heads that apply the same map share its part of the equations. Heads of the layer that
    compute their maps are solved for like the others. Values stay as they are where heads share them, and where maps
    · width exceeds 12,288.

    Args:
        model: a converted model with a plan in force.
        original: the model it was converted from.
        batches: calibration batches for both, at least four; every fourth is held out.

    Returns:
        One report for each reusing layer, in order.

    Raises:
        ValueError: where no plan is in force, there are too few batches or positions, a model is in half precision on
            a CPU, `original` has another depth or width or a plan, or activations are not finite.
    """
    plan = plan_of(model)
    if plan is None:
        raise ValueError("fit needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original)
    return refit(model, plan, Wanted(original, batches))


def refit(model: nn.Module, plan: ReusePlan, wanted: Wanted) -> list[LayerFit]:
    """`fit`, of a model that was converted by this plan, to what is wanted."""
    reports: list[LayerFit] = []
    with in_evaluation_mode(model):
        for layer in filter(plan.reuses, range(plan.num_layers)):
            report = _fit_layer(layer, model, wanted)
            logger.info("layer %d: held-out error %.4f, before %.4f", layer, report.after, report.before)
            reports.append(report)
    return reports


def _fit_layer(index: int, model: nn.Module, wanted: Wanted) -> LayerFit:
    layer = find_stack(model).layers[index]
    projection = output_projection(layer)
    maps = _maps(layer)
    moves_values = _values_can_move(layer, maps)
    start = _read(layer, projection, maps if moves_values else None)

    def observed(held_out: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every batch, what is regressed on, the target, and the drift."""
        for number, (batch, rows) in enumerate(zip(wanted.batches, wanted.valid, strict=True)):
            if is_held_out(number) != held_out:
                continue
            given, inputs = until(projection, model, layer, batch, whole_inputs=moves_values)
            given = start.once_for_each_map(given[rows])
            target, original_inputs = wanted.attention(index, number)
            triple = given.double(), target.double(), (original_inputs - inputs[rows]).double()
            if not all(bool(torch.isfinite(tensor).all()) for tensor in triple):
                raise ValueError(f"layer {index}: activations are not finite; check the calibration batches")
            yield triple

    def solved(share: float) -> tuple[float, Weights]:
        """The ridge that fits the held-out attention's outputs best, and the output projection by it."""
        found = [(ridge, fitted.solve(start, ridge, share)) for ridge in _RIDGES]
        return min(found, key=lambda one: held_out.error(one[1].on_contexts(), share))

    fitted, held_out = Sums(start), Sums(start.on_contexts())
    for triple in observed(held_out=False):
        fitted.add(*triple)
    for given, target, drift in observed(held_out=True):
        held_out.add(start.contexts(given), target, drift)
    errors = _LayerErrors(index, model, wanted)
    kept = _Kept(layer, projection)
    candidates = [(share, *solved(share)) for share in DRIFT]
    try:
        before, *after = errors(
            [kept.restore, *(functools.partial(_write, layer, projection, one[2]) for one in candidates)]
        )
        if not math.isfinite(before):
            raise ValueError(f"layer {index}: its output is not finite; check the calibration batches")
        best, (share, ridge, weights) = min(zip(after, candidates, strict=True), key=lambda pair: pair[0])
        moved = False
        if best < before and moves_values:
            candidate = fitted.solve(start, ridge, share, sweeps=_SWEEPS)
            (error,) = errors([functools.partial(_write, layer, projection, candidate, moved=True)])
            if error < best:
                best, moved, weights = error, True, candidate
    finally:
        kept.restore()  # also where it is stopped: a candidate in the model is one that is being tried
    if best >= before:
        return LayerFit(index, before, before, None, False)
    _write(layer, projection, weights, moved=moved)
    return LayerFit(index, before, best, ridge, moved)


class _Kept:
    """The projections of a layer as they are, to be put back."""

    def __init__(self, layer: Layer, projection: nn.Linear | Conv1D) -> None:
        self._parameters = [*projection.parameters(), *value_projection(layer).module.parameters()]
        self._were = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, was in zip(self._parameters, self._were, strict=True):
            parameter.copy_(was)


class _LayerErrors:
    """√(Σ ‖h − h°‖² / Σ ‖h°‖²) of a layer's output, the original's with °, after each of some changes of its weights;
    infinite where it is not finite."""

    def __init__(self, index: int, model: nn.Module, wanted: Wanted) -> None:
        self._index, self._model, self._wanted = index, model, wanted
        self._held_out = {
            number: wanted.output(index, number) for number in range(len(wanted.batches)) if is_held_out(number)
        }
        self._size = sum(float(output.double().square().sum()) for output in self._held_out.values())

    def __call__(self, changes: Sequence[Callable[[], None]]) -> list[float]:
        wrong = torch.zeros(len(changes), dtype=torch.float64)
        for number, output in self._held_out.items():
            rows = self._wanted.valid[number]
            found = outputs(self._model, self._index, self._wanted.batches[number], changes)
            wrong += torch.stack([(one[rows] - output).double().square().sum() for one in found]).cpu()
        errors = [(one / (self._size or 1.0)) ** 0.5 for one in wrong.tolist()]
        return [error if math.isfinite(error) else math.inf for error in errors]


def _maps(layer: Layer) -> tuple[int, ...]:
    """For each slot of a layer's context, which it applies of the maps that the layer applies, its own among them."""
    layout: Any = layer.attention._layout
    applied = [(layout.layer, slot) for slot in range(layout.computing)]
    applied += [(source, head) for source, pairs in layout.parts for head, _ in pairs]
    numbers = {one: number for number, one in enumerate(dict.fromkeys(applied))}
    return tuple(numbers[one] for one in applied)


def _values_can_move(layer: Layer, maps: tuple[int, ...]) -> bool:
    layout: Any = layer.attention._layout
    values = value_projection(layer)
    inputs = len(set(maps)) * values.weight.shape[-1]
    return values.num_heads == layout.num_heads and inputs <= _MOST_INPUTS


def _read(layer: Layer, projection: nn.Linear | Conv1D, maps: tuple[int, ...] | None) -> Weights:
    """Weights to be applied to what these maps make of the layer's input; where None, to its contexts."""
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
    layout: Any = layer.attention._layout
    output = weight.detach().double().unflatten(0, (layout.num_heads, -1))
    bias = None if projection.bias is None else projection.bias.detach().double()
    if maps is None:
        return on_contexts(output, bias)
    values = value_projection(layer)
    value_bias = torch.zeros_like(output[..., 0]) if values.bias is None else values.bias.double()
    return Weights(maps, values.weight.double().mT, value_bias, output, bias)


@torch.no_grad()
def _write(layer: Layer, projection: nn.Linear | Conv1D, weights: Weights, *, moved: bool = False) -> None:
    output = weights.output.flatten(0, 1)
    projection.weight.copy_(output if isinstance(projection, Conv1D) else output.mT)
    if weights.bias is not None:
        projection.bias.copy_(weights.bias)
    if moved:
        value_projection(layer).assign(weights.values.mT)
