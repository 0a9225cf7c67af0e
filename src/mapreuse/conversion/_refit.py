"""Closed-form refit of a converted model's value and output projections."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._correct import fit_correction
from mapreuse.conversion._kept_work import read_tensors, write_tensors
from mapreuse.conversion._layer_cache import LayerCache, in_evaluation_mode
from mapreuse.conversion._least_squares import DRIFT_SHARES, HeadProjections, LeastSquares
from mapreuse.conversion._targets import Targets, is_held_out
from mapreuse.conversion._validation import check_original, digest
from mapreuse.data import check_precision
from mapreuse.models import (
    Layer,
    LayerLayout,
    find_stack,
    layout_of,
    optimized,
    output_projection,
    plan_of,
    value_projection,
)
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate penalties, relative to the mean square of the inputs."""

_MAX_INPUTS = 12_288
"""Maximum of maps · width for refitting values. Above it, only the output projection is refitted: the normal
equations take 8 · (maps · width)² bytes."""

_CORRECTION = ("correction.query.weight", "correction.key.weight")
"""Weights of a layer of share mode "corrected" that `fit_correction` sets."""

_SWEEPS = 3
"""Number of times that values and output are solved in turn."""


@dataclass(frozen=True)
class LayerRefit:
    """What `refit` did to one reusing layer.

    Attributes:
        layer: index of the layer.
        before: held-out error √(mean_c Σ (h_c − h°_c)² / Σ h°_c²) of the layer's output before the refit, with c the
            channels and ° for the original.
        after: the same after the refit; equal to `before` if no candidate helped.
        ridge: the chosen penalty, or None if the layer kept its weights.
        values: whether the value projection was refitted too.
        divergence: in share mode "corrected", the held-out divergence KL(original's map ‖ map) in nats per row, with
            A = 0 and with the fitted correction; else None.
    """

    layer: int
    before: float
    after: float
    ridge: float | None
    values: bool
    divergence: tuple[float, float] | None = None


def refit(
    model: nn.Module, original: nn.Module, batches: Iterable[Mapping[str, Any]], *, attention: str = "self"
) -> list[LayerRefit]:
    """Refit the value and output projections of every reusing layer, in place, to reproduce the original's output.

    Layer by layer from the first, ridge regression in float64:

        V, O, b = argmin ‖Σ_h A_h X V_h O_h + b − Y‖² + λ ‖V − V₀‖² + λ ‖O − O₀‖²

    with X the input of the attention in the converted model after the refit of earlier layers (the encoder's states
    in cross-attention), A the maps that the attention applies, and Y its output in the original. Every channel of Y,
    O and b is divided by the root mean square of that channel in the output of the original's layer: a few large
    channels would decide otherwise. The regression is solved for O and b, then three times for V (one head after
    another) and for O and b. Every fourth batch is held out. These batches decide about λ, about changing V, and
    about correcting the error of the layer's input as well. A layer that no candidate improves keeps its weights.

    Layers of share mode "keys" compute with all of their own weights and are not refitted. In layers of share mode
    "corrected", the low-rank queries and keys are fitted first, to the original's maps M:

        A, B = argmin Σ KL(M[h] ‖ softmax(S[source head] + R(X A[h]) R(X B[h])ᵀ))

    with S the scores of the source. Adam takes 300 steps over the batches that are not held out, at 64 queries of
    each, from A = 0. The weights with the least divergence on the held-out batches are kept, A = 0 among them.

    Padding is left out. Heads that apply the same map share its equations. Heads that compute their own map are
    refitted too, and so are values that several heads share (grouped-query attention). Values keep their weights
    where the number of maps times the width exceeds 12,288.

    Args:
        model: a converted model with a plan in force.
        original: the model it was converted from.
        batches: calibration batches for both models, at least four.
        attention: "self" or "cross", as for `apply`.

    Returns:
        One report for each reusing layer, in order.

    Raises:
        ValueError: if no plan is in force, there are too few batches or positions, a model is in half precision on a
            CPU, `original` has another depth or width or a plan, or activations are not finite.
    """
    if plan_of(model, attention) is None:
        raise ValueError("refit needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original, attention)
    return refit_layers(model, Targets(original, batches, attention))


def refit_layers(model: nn.Module, targets: Targets, cache: RefitCache | None = None) -> list[LayerRefit]:
    """`refit` towards given targets.

    With a `cache`, the model must be a fresh copy of the original under a plan, like the models whose layers the
    cache holds. Layers that are cached are not refitted again.
    """
    plan = plan_of(model, targets.attention_kind)
    assert plan is not None
    original = None if cache is None else targets.cache
    layers = LayerCache(model, targets.batches, targets.attention_kind, original)
    reports: list[LayerRefit] = []
    reusing = [layer for layer in range(plan.num_layers) if plan.share_of(layer) in ("map", "corrected")]
    targets.record_maps(layer for layer in reusing if plan.share_of(layer) == "corrected")
    with in_evaluation_mode(model), optimized(model):
        for layer in reusing:
            report = None if cache is None else cache.restore(model, plan, layer)
            if report is None:
                try:
                    divergence = None
                    if plan.share_of(layer) == "corrected":
                        divergence = fit_correction(layer, layers, targets)
                    report = replace(_refit_layer(layer, layers, targets), divergence=divergence)
                except KeyboardInterrupt as stop:
                    if cache is not None and cache.folder is not None:
                        stop.add_note(f"{len(reports)} refitted layers are kept, layer {layer} is repeated")
                    raise
                if cache is not None:
                    cache.store(model, plan, report)
            if report.divergence is not None:
                logger.info("layer %d: held-out divergence %.4f, before %.4f", layer, *report.divergence[::-1])
            logger.info("layer %d: held-out error %.4f, before %.4f", layer, report.after, report.before)
            reports.append(report)
    return reports


class RefitCache:
    """Refitted weights of layers, for other plans of the same model.

    Plans that agree up to a layer give it the same weights. The least recently used layers are dropped beyond
    `max_bytes`. With a `folder`, of this model and these batches alone, the layers are also kept on disk.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self._max_bytes, self.folder = max_bytes, folder
        self._layers = dict[str, tuple[LayerRefit, HeadProjections, dict[str, Tensor]]]()
        kept = [] if folder is None else folder.glob("*.safetensors")
        for file in sorted(kept, key=lambda file: file.stat().st_mtime):
            if (found := read_tensors(file)) is not None:
                tensors, (report, maps) = found
                correction = {name: tensors.pop(name) for name in _CORRECTION if name in tensors}
                fields: dict[str, Any] = {"bias": None, "maps": tuple(maps), **tensors}
                if report.get("divergence") is not None:
                    report["divergence"] = tuple(report["divergence"])
                self._layers[file.name] = LayerRefit(**report), HeadProjections(**fields), correction

    def restore(self, model: nn.Module, plan: ReusePlan, index: int) -> LayerRefit | None:
        """Write a layer's cached weights into the model; None if there are none."""
        key = _up_to(index, plan)
        if key not in self._layers:
            return None
        report, projections, correction = self._layers[key] = self._layers.pop(key)
        layer = find_stack(model).layers[index]
        if report.ridge is not None:
            write(layer, projections, moved=report.values)
        if correction:
            layer.attention.load_state_dict(correction, strict=False)
        return report

    def store(self, model: nn.Module, plan: ReusePlan, report: LayerRefit) -> None:
        """Store the weights of a refitted layer."""
        layer = find_stack(model).layers[report.layer]
        projections = read(layer, with_values=report.values)
        dtype = output_projection(layer).weight.dtype
        stored = replace(projections, output=projections.output.to(dtype), values=projections.values.to(dtype))
        key = _up_to(report.layer, plan)
        names = _CORRECTION if plan.share_of(report.layer) == "corrected" else ()
        correction = {name: layer.attention.get_parameter(name).detach().clone() for name in names}
        self._layers[key] = report, stored, correction
        if self.folder is not None:
            tensors = {name: one for name, one in vars(stored).items() if isinstance(one, Tensor)}
            write_tensors(self.folder / key, tensors | correction, (asdict(report), stored.maps))
        while sum(one.output.nbytes + one.values.nbytes for _, one, _ in self._layers.values()) > self._max_bytes:
            dropped = next(iter(self._layers))
            del self._layers[dropped]
            if self.folder is not None:
                (self.folder / dropped).unlink(missing_ok=True)


def _up_to(index: int, plan: ReusePlan) -> str:
    """The name of what is cached of a layer."""
    settings: dict[str, Any] = {}
    if plan.share != "map":
        shares = [plan.share_of(layer) for layer in range(index + 1)]
        settings = {"share": shares, "settings": (plan.keys, plan.window, plan.block, plan.rank)}
    return digest([{"layers": plan.layers[: index + 1], **settings}]) + ".safetensors"


def _refit_layer(index: int, layers: LayerCache, targets: Targets) -> LayerRefit:
    layer = layers.layers[index]
    maps, values = _maps_of(layout_of(layer)), value_projection(layer)
    num_inputs = len(set(maps)) * values.weight.shape[-1]
    moves_values = num_inputs <= _MAX_INPUTS
    start, scale = read(layer, with_values=moves_values), targets.scale(index)

    def observed(held_out: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, target and drift of each batch; the last two in units of the channels' root mean squares."""
        for number, rows in enumerate(targets.valid):
            if is_held_out(number) != held_out:
                continue
            target, original_inputs = targets.attention(index, number)
            given, inputs = layers.context(index, number, of_whole_inputs=moves_values)
            given = start.one_per_map(given[rows])
            triple = given, target * scale, (original_inputs - inputs[rows]) * scale
            if not all(bool(torch.isfinite(tensor).all()) for tensor in triple):
                raise ValueError(f"layer {index}: activations are not finite; check the calibration batches")
            yield triple

    def solved(share: float) -> tuple[float, HeadProjections]:
        """The penalty with the minimum held-out error of the attention's output, and its solution."""
        found = [(ridge, training.solve(ridge, share)) for ridge in _RIDGES]
        ridge, best = min(found, key=lambda one: held_out.error(one[1], share))
        return ridge, best.scaled(1 / scale)

    training = LeastSquares(start.scaled(scale))
    held_out = LeastSquares(HeadProjections.of_contexts(start.output, start.bias).scaled(scale))
    for triple in observed(held_out=False):
        training.add(*triple)
    for given, target, drift in observed(held_out=True):
        held_out.add(start.contexts(given), target, drift)
    errors = _output_errors(index, layers, targets)
    restore = functools.partial(write, layer, start, moved=moves_values)
    candidates = [(share, *solved(share)) for share in DRIFT_SHARES]
    try:
        before, *after = errors([restore, *(functools.partial(write, layer, one) for *_, one in candidates)])
        if not math.isfinite(before):
            raise ValueError(f"layer {index}: its output is not finite; check the calibration batches")
        best, (share, ridge, projections) = min(zip(after, candidates, strict=True), key=lambda pair: pair[0])
        moved = False
        if best < before and moves_values:
            candidate = training.solve(ridge, share, sweeps=_SWEEPS).scaled(1 / scale)
            (error,) = errors([functools.partial(write, layer, candidate, moved=True)])
            if error < best:
                best, moved, projections = error, True, candidate
    finally:
        restore()  # also after an error or an interrupt: the model holds a candidate
    if best >= before:
        return LayerRefit(index, before, before, None, False)
    write(layer, projections, moved=moved)
    return LayerRefit(index, before, best, ridge, moved)


def _output_errors(
    index: int, layers: LayerCache, targets: Targets
) -> Callable[[Sequence[Callable[[], None]]], list[float]]:
    """Make a function that gives the held-out error of a layer's output after each of some changes of its weights.

    The error is √(mean_c Σ (h_c − h°_c)² / Σ h°_c²), with h° the original's output and c its channels; infinite if h
    is not finite.
    """
    scale = targets.scale(index)
    held_out = {
        number: targets.output(index, number) * scale for number in range(len(targets.batches)) if is_held_out(number)
    }
    size = sum(float(output.double().square().sum()) for output in held_out.values())

    def errors(changes: Sequence[Callable[[], None]]) -> list[float]:
        sums = torch.zeros(len(changes), dtype=torch.float64)
        for number, output in held_out.items():
            rows, found = targets.valid[number], layers.outputs(index, number, changes)
            sums += torch.stack([(one[rows] * scale - output).double().square().sum() for one in found]).cpu()
        found_errors = [(one / (size or 1.0)) ** 0.5 for one in sums.tolist()]
        return [error if math.isfinite(error) else math.inf for error in found_errors]

    return errors


def _maps_of(layout: LayerLayout) -> tuple[int, ...]:
    """For each head, the number of the map that it applies."""
    made = [(layout.layer, head) for head in layout.computing]
    made += [(source, head) for source, pairs in layout.parts for head, _ in pairs]
    applied = [one for _, one in sorted(zip(layout.order, made, strict=True))]
    numbers = {one: number for number, one in enumerate(dict.fromkeys(applied))}
    return tuple(numbers[one] for one in applied)


def read(layer: Layer, *, with_values: bool) -> HeadProjections:
    """Copies of the projections of a layer, or of its output projection alone."""
    layout, projection = layout_of(layer), output_projection(layer)
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
    output = _copy(weight).unflatten(0, (layout.num_heads, -1))
    bias = None if projection.bias is None else _copy(projection.bias)
    if not with_values:
        return HeadProjections.of_contexts(output, bias)
    values = value_projection(layer)
    value_bias = values.weight.new_zeros(values.weight.shape[:2]) if values.bias is None else values.bias
    return HeadProjections(_maps_of(layout), _copy(values.weight).mT, _copy(value_bias), output, bias)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float64, copy=True)


@torch.no_grad()
def write(layer: Layer, projections: HeadProjections, *, moved: bool = False) -> None:
    """Write the output projection, and the values if they `moved`, into a layer."""
    projection, output = output_projection(layer), projections.output.flatten(0, 1)
    projection.weight.copy_(output if isinstance(projection, Conv1D) else output.mT)
    if projections.bias is not None:
        projection.bias.copy_(projections.bias)
    if moved:
        value_projection(layer).assign(projections.values.mT)
