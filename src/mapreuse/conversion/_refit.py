"""Closed-form refit of a converted model's value and output projections."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.conversion._layer_cache import Passes
from mapreuse.conversion._least_squares import DRIFT, Sums, Weights
from mapreuse.conversion._projections import Kept, maps_of, read, values_can_move, write
from mapreuse.conversion._refits import LayerFit, Refits
from mapreuse.conversion._states import in_evaluation_mode
from mapreuse.conversion._targets import Wanted, is_held_out
from mapreuse.conversion._validation import check_original, check_precision
from mapreuse.models import optimized, output_projection, plan_of

logger = logging.getLogger("mapreuse")

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried, relative to the mean square of what is regressed on."""

_SWEEPS = 3
"""Times that values and output are solved in turn."""


def refit(model: nn.Module, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[LayerFit]:
    """Refit, in place, the value and output projections of every reusing layer so that its output is the original's.

    Layer by layer from below, with X the input of the attention in the converted model as it is by then, A the maps
    it applies, and Y the attention's output in the original, plus what the input of the layer has lost by then (its
    drift):

        V, O, b = argmin ‖Σ_h A_h X V_h O_h + b − Y‖² + λ ‖V − V₀‖² + λ ‖O − O₀‖²

    solved for O and b, then for V one head after the other, in turn, each exactly, in float64: from normal equations
    summed over the batches, or from all positions at once where these are no more than there are unknowns for one
    component of the output. λ is chosen with O alone, on held-out batches by the error of the attention's output;
    then whether the drift is added, which helps only where nothing but a sum comes after O, and whether V moves, by
    the error of what the whole layer puts out there. A layer whose output no candidate improves keeps its weights.
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
    if plan_of(model) is None:
        raise ValueError("refit needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original)
    return refit_layers(model, Wanted(original, batches))


def refit_layers(model: nn.Module, wanted: Wanted, refits: Refits | None = None) -> list[LayerFit]:
    """`refit`, of a model under a plan, to what is wanted.

    With `refits`, the model is a copy of the original but for its plan, as those are whose layers they hold. Layers
    that are among them are taken from there, and what comes before the first that reuses runs in the original alone.
    """
    plan = plan_of(model)
    assert plan is not None
    passes = Passes(model, wanted.batches, plan, None if refits is None else wanted.passes)
    reports: list[LayerFit] = []
    with in_evaluation_mode(model), optimized(model):
        for layer in filter(plan.reuses, range(plan.num_layers)):
            report = None if refits is None else refits.again(model, plan, layer)
            if report is None:
                report = _fit_layer(layer, passes, wanted)
                if refits is not None:
                    refits.keep(model, plan, report)
            logger.info("layer %d: held-out error %.4f, before %.4f", layer, report.after, report.before)
            reports.append(report)
    return reports


def _fit_layer(index: int, passes: Passes, wanted: Wanted) -> LayerFit:
    layer = passes.layers[index]
    projection = output_projection(layer)
    maps = maps_of(layer)
    moves_values = values_can_move(layer, maps)
    start = read(layer, projection, maps if moves_values else None)

    def observed(held_out: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every batch, what is regressed on, the target, and the drift."""
        for number, rows in enumerate(wanted.valid):
            if is_held_out(number) != held_out:
                continue
            target, original_inputs = wanted.attention(index, number)
            given, inputs = passes.context(index, number, of_whole_inputs=moves_values)
            given = start.once_for_each_map(given[rows])
            triple = given, target, original_inputs - inputs[rows]
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
    errors = _LayerErrors(index, passes, wanted)
    kept = Kept(layer, projection)
    candidates = [(share, *solved(share)) for share in DRIFT]
    try:
        before, *after = errors(
            [kept.restore, *(functools.partial(write, layer, projection, one[2]) for one in candidates)]
        )
        if not math.isfinite(before):
            raise ValueError(f"layer {index}: its output is not finite; check the calibration batches")
        best, (share, ridge, weights) = min(zip(after, candidates, strict=True), key=lambda pair: pair[0])
        moved = False
        if best < before and moves_values:
            candidate = fitted.solve(start, ridge, share, sweeps=_SWEEPS)
            (error,) = errors([functools.partial(write, layer, projection, candidate, moved=True)])
            if error < best:
                best, moved, weights = error, True, candidate
    finally:
        kept.restore()  # also where it is stopped: a candidate in the model is one that is being tried
    if best >= before:
        return LayerFit(index, before, before, None, False)
    write(layer, projection, weights, moved=moved)
    return LayerFit(index, before, best, ridge, moved)


class _LayerErrors:
    """√(Σ ‖h − h°‖² / Σ ‖h°‖²) of a layer's output, the original's with °, after each of some changes of its weights;
    infinite where it is not finite."""

    def __init__(self, index: int, passes: Passes, wanted: Wanted) -> None:
        self._index, self._passes, self._wanted = index, passes, wanted
        self._held_out = {
            number: wanted.output(index, number) for number in range(len(wanted.batches)) if is_held_out(number)
        }
        self._size = sum(float(output.double().square().sum()) for output in self._held_out.values())

    def __call__(self, changes: Sequence[Callable[[], None]]) -> list[float]:
        wrong = torch.zeros(len(changes), dtype=torch.float64)
        for number, output in self._held_out.items():
            rows = self._wanted.valid[number]
            found = self._passes.outputs(self._index, number, changes)
            wrong += torch.stack([(one[rows] - output).double().square().sum() for one in found]).cpu()
        errors = [(one / (self._size or 1.0)) ** 0.5 for one in wrong.tolist()]
        return [error if math.isfinite(error) else math.inf for error in errors]
