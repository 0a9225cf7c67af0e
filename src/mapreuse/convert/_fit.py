"""Closed-form refit of a converted model's value and output projections."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.convert._batches import calibration_batches, check_original, check_precision
from mapreuse.convert._states import in_evaluation_mode
from mapreuse.models import (
    Layer,
    copy_with_same_weights,
    find_stack,
    not_padding,
    observing_inputs,
    output_projection,
    plan_of,
    recorded_states,
    tune,
    value_projection,
    with_projections,
)
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried, relative to the mean square of what is regressed on."""

_DRIFT = (0.0, 1.0)
"""Shares of the drift of earlier layers that the refit is asked to undo."""

_HELD_OUT = 4
"""Every fourth batch chooses between the candidates instead of fitting them."""

_FEWEST_POSITIONS = 8
"""Of which fewer choose between candidates by chance."""

_SWEEPS = 3
"""Times that values and output are solved in turn."""

_BLOCK = 512
"""Rows of a symmetric product that are summed at once."""

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


class Wanted:
    """What the original makes of calibration batches in each layer, where there is no padding.

    Args:
        original: the model as it was before its conversion.
        batches: calibration batches, at least four; every fourth is held out.
        kept_bytes: how much of it is kept, once found, for refits to come.

    Raises:
        ValueError: where there are too few batches or positions.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Mapping[str, Any]], *, kept_bytes: int = 0) -> None:
        self.batches = calibration_batches(batches, _HELD_OUT, "fit")
        self._model = copy_with_same_weights(with_projections(original)).eval()
        tune(self._model)
        self.valid = [_valid(self._model, batch) for batch in self.batches]
        self._left, self._kept = kept_bytes, dict[tuple[str, int, int], tuple[Tensor, ...]]()
        fitting, judging = (
            sum(int(rows.sum()) for number, rows in enumerate(self.valid) if _judges(number) == held_out)
            for held_out in (False, True)
        )
        if min(fitting, judging) < _FEWEST_POSITIONS:
            raise ValueError(
                f"fit needs at least {_FEWEST_POSITIONS} positions that are not padding in every fourth batch "
                f"together, which are held out, and as many in the others: got {judging} and {fitting}; give more or "
                "longer samples"
            )

    def attention(self, index: int, number: int) -> tuple[Tensor, ...]:
        """Of a batch, the output of a layer's attention, and the input of the layer."""
        layer, rows = find_stack(self._model).layers[index], self.valid[number]
        projection = output_projection(layer)

        def find() -> tuple[Tensor, ...]:
            context, inputs = _until(projection, self._model, layer, self.batches[number])
            return projection(context[rows]).detach(), inputs[rows]

        return self._once(("attention", index, number), find)

    def output(self, index: int, number: int) -> Tensor:
        """Of a batch, the output of a layer."""

        def find() -> tuple[Tensor, ...]:
            return (_outputs(self._model, index, self.batches[number])[0][self.valid[number]],)

        (output,) = self._once(("output", index, number), find)
        return output

    def _once(self, key: tuple[str, int, int], find: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        found = self._kept.get(key) or find()
        size = sum(tensor.nbytes for tensor in found)
        if key not in self._kept and size <= self._left:
            self._left -= size
            self._kept[key] = found
        return found


def _fit_layer(index: int, model: nn.Module, wanted: Wanted) -> LayerFit:
    layer = find_stack(model).layers[index]
    projection = output_projection(layer)
    maps = _maps(layer)
    moves_values = _values_can_move(layer, maps)
    start = _read(layer, projection, maps if moves_values else None)

    def observed(held_out: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every batch, what is regressed on, the target, and the drift."""
        for number, (batch, rows) in enumerate(zip(wanted.batches, wanted.valid, strict=True)):
            if _judges(number) != held_out:
                continue
            given, inputs = _until(projection, model, layer, batch, whole_inputs=moves_values)
            given = start.once_for_each_map(given[rows])
            target, original_inputs = wanted.attention(index, number)
            triple = given.double(), target.double(), (original_inputs - inputs[rows]).double()
            if not all(bool(torch.isfinite(tensor).all()) for tensor in triple):
                raise ValueError(f"layer {index}: activations are not finite; check the calibration batches")
            yield triple

    def solved(share: float) -> tuple[float, _Weights]:
        """The ridge that fits the held-out attention's outputs best, and the output projection by it."""
        found = [(ridge, fitted.solve(start, ridge, share)) for ridge in _RIDGES]
        return min(found, key=lambda one: held_out.error(one[1].on_contexts(), share))

    fitted, held_out = _Sums(start), _Sums(start.on_contexts())
    for triple in observed(held_out=False):
        fitted.add(*triple)
    for given, target, drift in observed(held_out=True):
        held_out.add(start.contexts(given), target, drift)
    errors = _LayerErrors(index, model, wanted)
    kept = _Kept(layer, projection)
    candidates = [(share, *solved(share)) for share in _DRIFT]
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


def _judges(number: int) -> bool:
    """Whether this batch chooses between the candidates."""
    return number % _HELD_OUT == _HELD_OUT - 1


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
            number: wanted.output(index, number) for number in range(len(wanted.batches)) if _judges(number)
        }
        self._size = sum(float(output.double().square().sum()) for output in self._held_out.values())

    def __call__(self, changes: Sequence[Callable[[], None]]) -> list[float]:
        wrong = torch.zeros(len(changes), dtype=torch.float64)
        for number, output in self._held_out.items():
            rows = self._wanted.valid[number]
            found = _outputs(self._model, self._index, self._wanted.batches[number], changes)
            wrong += torch.tensor([float((one[rows] - output).double().square().sum()) for one in found])
        errors = [(one / (self._size or 1.0)) ** 0.5 for one in wrong.tolist()]
        return [error if math.isfinite(error) else math.inf for error in errors]


@dataclass(frozen=True)
class _Weights:
    """The projections of a reusing layer, head by head, in float64.

        output = Σ_h (inputs[maps[h]] values[h] + value_bias[h]) output[h] + bias

    where inputs[m] = A_m X for each map A_m that the layer applies; or the contexts themselves, one for each head,
    `values` being the identity, where values do not move.
    """

    maps: tuple[int, ...]
    values: Float[Tensor, "heads inputs head_dim"]
    value_bias: Float[Tensor, "heads head_dim"]
    output: Float[Tensor, "heads head_dim width"]
    bias: Tensor | None

    def onto(self, matrix: Float[Tensor, "inputs_and_one columns"]) -> Float[Tensor, "context_and_one columns"]:
        """Bᵀ matrix, where B makes contexts (and a one) of inputs (and a one)."""
        blocks = matrix[:-1].unflatten(0, (self.num_maps, -1))
        heads = [values.mT @ blocks[number] for values, number in zip(self.values, self.maps, strict=True)]
        context = torch.stack(heads) + self.value_bias[..., None] * matrix[-1]
        return torch.cat([context.flatten(0, 1), matrix[-1:]])

    def contexts(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows context"]:
        """inputs[maps[h]] values[h] + value_bias[h], head after head."""
        by_head = inputs.unflatten(1, (self.num_maps, -1)).transpose(0, 1)[list(self.maps)]
        return (by_head @ self.values + self.value_bias[:, None]).transpose(0, 1).flatten(1)

    def on_contexts(self) -> _Weights:
        """The same output projection, to be applied to contexts."""
        return _on_contexts(self.output, self.bias)

    def once_for_each_map(self, by_head: Float[Tensor, "rows heads_inputs"]) -> Float[Tensor, "rows inputs"]:
        """Of inputs that were made head after head, those of the first head that applies each map."""
        first = [self.maps.index(number) for number in range(self.num_maps)]
        return by_head.unflatten(1, (len(self.maps), -1))[:, first].flatten(1)

    @property
    def num_maps(self) -> int:
        """How many maps the layer applies; they are numbered in the order of the heads."""
        return max(self.maps) + 1

    @property
    def stacked(self) -> Float[Tensor, "context_and_one width"]:
        """Output projection and bias, one above the other."""
        bias = self.output.new_zeros(self.output.shape[-1]) if self.bias is None else self.bias
        return torch.cat([self.output.flatten(0, 1), bias[None]])


class _Sums:
    """Normal equations of a layer's output, summed over batches: inputs and a one against targets and drift."""

    def __init__(self, weights: _Weights) -> None:
        self._start = weights
        size, width = weights.num_maps * weights.values.shape[1] + 1, weights.output.shape[-1]
        self._upper = weights.values.new_zeros(size, size)  # that triangle of the Gram matrix, block by block
        self._target = weights.values.new_zeros(size, width)
        self._drift = torch.zeros_like(self._target)
        self._size = 0.0
        self._whole = dict.fromkeys(_DRIFT, 0.0)
        self._eigen: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        inputs: Float[Tensor, "rows inputs"],
        target: Float[Tensor, "rows width"],
        drift: Float[Tensor, "rows width"],
    ) -> None:
        extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        for start in range(0, len(self._upper), _BLOCK):
            rows = slice(start, start + _BLOCK)
            self._upper[rows, start:].addmm_(extended[:, rows].mT, extended[:, start:])
        self._target.addmm_(extended.mT, target)
        self._drift.addmm_(extended.mT, drift)
        self._size += float(target.square().sum())
        for share in _DRIFT:
            self._whole[share] += float((target + share * drift).square().sum())

    @functools.cached_property
    def _gram(self) -> Float[Tensor, "inputs_and_one inputs_and_one"]:
        """The sum whole, once nothing is added any more."""
        for start in range(0, len(self._upper), _BLOCK):
            rows, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            self._upper[rest, rows] = self._upper[rows, rest].mT
        return self._upper

    def error(self, weights: _Weights, share: float) -> float:
        """√(Σ ‖output − target − share · drift‖² / Σ ‖target‖²), or the root as it is where the target is zero."""
        stacked = weights.stacked
        wrong = (stacked * (self._reduced(weights) @ stacked)).sum()
        wrong -= 2 * (stacked * weights.onto(self._target + share * self._drift)).sum()
        return (max(float(wrong) + self._whole[share], 0.0) / (self._size or 1.0)) ** 0.5

    def solve(self, start: _Weights, ridge: float, share: float, *, sweeps: int = 0) -> _Weights:
        """Output, then `sweeps` times values and output, each solved exactly and held to `start` by the ridge."""
        moment = self._target + share * self._drift
        weights = self._solve_output(start, start, moment, ridge)
        for _ in range(sweeps):
            weights = self._solve_values(start, weights, moment, ridge)
            weights = self._solve_output(start, weights, moment, ridge)
        return weights

    @functools.cached_property
    def _reduced_by_start(self) -> Float[Tensor, "context_and_one context_and_one"]:
        return self._start.onto(self._start.onto(self._gram).mT)

    def _reduced(self, weights: _Weights) -> Float[Tensor, "context_and_one context_and_one"]:
        """The Gram matrix of contexts and a one."""
        return self._reduced_by_start if weights is self._start else weights.onto(weights.onto(self._gram).mT)

    def _solve_output(self, start: _Weights, weights: _Weights, moment: Tensor, ridge: float) -> _Weights:
        gram, moment, anchor = self._reduced(weights), weights.onto(moment), start.stacked
        size = len(gram) - 1
        if start.bias is None:
            gram, moment, anchor = gram[:size, :size], moment[:size], anchor[:size]
        penalty = torch.zeros_like(gram.diagonal())
        penalty[:size] = ridge * _positive(gram.diagonal()[:size].mean())
        solved = anchor + torch.linalg.solve(gram + penalty.diag(), moment - gram @ anchor)
        return replace(
            weights,
            output=solved[:size].view_as(start.output),
            bias=None if start.bias is None else solved[size],
        )

    def _solve_values(self, start: _Weights, weights: _Weights, moment: Tensor, ridge: float) -> _Weights:
        """Head by head: the minimum over X of ‖Z X output[h] − what the other heads leave‖² + λ ‖X − X₀‖².

        Z is inputs[maps[h]]. The normal equations G X P + λ X = R are diagonal in the eigenvectors of G = Zᵀ Z and of
        P = output[h] output[h]ᵀ.
        """
        inputs, maps = weights.values.shape[1], list(weights.maps)
        values, output = weights.values.clone(), weights.output
        constant = torch.einsum("hd,hdw->w", weights.value_bias, output)
        constant = constant if weights.bias is None else constant + weights.bias
        if not self._eigen:
            blocks = [slice(start, start + inputs) for start in range(0, len(self._gram) - 1, inputs)]
            self._eigen = [torch.linalg.eigh(self._gram[block, block]) for block in blocks]
        for head, number in enumerate(maps):
            rows = slice(number * inputs, (number + 1) * inputs)
            of_heads = [self._gram[rows, other * inputs : (other + 1) * inputs] for other in maps]
            met = torch.stack([gram @ others for gram, others in zip(of_heads, values, strict=True)], 1)
            met[:, head] = 0
            left = moment[rows] - met.flatten(1) @ output.flatten(0, 1)
            left -= self._gram[rows, -1:] * constant
            sizes, vectors = self._eigen[number]
            widths, turned = torch.linalg.eigh(output[head] @ output[head].mT)
            strength = ridge * _positive(sizes.mean() * widths.mean())
            wanted = vectors.mT @ (left @ output[head].mT + strength * start.values[head]) @ turned
            values[head] = vectors @ (wanted / (sizes[:, None] * widths + strength)) @ turned.mT
        return replace(weights, values=values)


def _positive(size: Tensor) -> Tensor:
    """1 for a size of zero, as of a layer whose values are: its weights are then held, by whatever strength."""
    return torch.where(size > 0, size, torch.ones_like(size))


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


def _read(layer: Layer, projection: nn.Linear | Conv1D, maps: tuple[int, ...] | None) -> _Weights:
    """Weights to be applied to what these maps make of the layer's input; where None, to its contexts."""
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
    layout: Any = layer.attention._layout
    output = weight.detach().double().unflatten(0, (layout.num_heads, -1))
    bias = None if projection.bias is None else projection.bias.detach().double()
    if maps is None:
        return _on_contexts(output, bias)
    values = value_projection(layer)
    value_bias = torch.zeros_like(output[..., 0]) if values.bias is None else values.bias.double()
    return _Weights(maps, values.weight.double().mT, value_bias, output, bias)


def _on_contexts(output: Float[Tensor, "heads head_dim width"], bias: Tensor | None) -> _Weights:
    heads, dim, _ = output.shape
    identity = torch.eye(dim, dtype=torch.float64, device=output.device).expand(heads, dim, dim)
    return _Weights(tuple(range(heads)), identity, torch.zeros_like(output[..., 0]), output, bias)


@torch.no_grad()
def _write(layer: Layer, projection: nn.Linear | Conv1D, weights: _Weights, *, moved: bool = False) -> None:
    output = weights.output.flatten(0, 1)
    projection.weight.copy_(output if isinstance(projection, Conv1D) else output.mT)
    if weights.bias is not None:
        projection.bias.copy_(weights.bias)
    if moved:
        value_projection(layer).assign(weights.values.mT)


class _Seen(Exception):
    """What was looked for has been made; the rest of the forward pass is not needed."""


@torch.no_grad()
def _outputs(
    model: nn.Module, index: int, batch: Mapping[str, Any], changes: Sequence[Callable[[], None]] = (lambda: None,)
) -> list[Float[Tensor, "batch positions width"]]:
    """What a layer puts out after each of these changes of its weights, in a pass that ends with it.

    What comes before the layer is the same for all of them, and runs once.
    """
    layer = find_stack(model).layers[index]
    attention: Any = layer.attention

    def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handle.remove()
        for change in changes:
            change()
            module(*args, **kwargs)
        raise _Seen

    with recorded_states(model) as (states, _), suppress(_Seen), _maps_kept(attention):
        handle = layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True)
        with handle:
            model(**batch)
    return states[index:]


@contextmanager
def _maps_kept(attention: Any) -> Iterator[None]:
    """Meanwhile a planned attention lets go of no map, so that it can apply the same again."""
    layout = vars(attention).get("_layout")
    if layout is not None:
        attention._layout = replace(layout, releases=())
    try:
        yield
    finally:
        if layout is not None:
            attention._layout = layout


@torch.no_grad()
def _valid(model: nn.Module, batch: Mapping[str, Any]) -> Bool[Tensor, "batch positions"]:
    """Which positions of a batch are not padding."""
    with recorded_states(model) as (states, masks):
        handle = find_stack(model).layers[0].layer.register_forward_hook(_stop)
        with handle, suppress(_Seen):
            model(**batch)
    return not_padding(masks[0], states[0])


def _stop(module: nn.Module, args: tuple, output: Any) -> None:
    raise _Seen


@torch.no_grad()
def _until(
    projection: nn.Module, model: nn.Module, layer: Layer, batch: Mapping[str, Any], *, whole_inputs: bool = False
) -> tuple[Float[Tensor, "batch positions inputs"], Float[Tensor, "batch positions width"]]:
    """What reaches an output projection, and the input of its layer; instead of the former, what the layer's maps
    make of the whole input of its attention, if `whole_inputs`."""
    seen: dict[str, Tensor] = {}

    def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen["inputs"] = inputs if getattr(layer.attention, "batch_first", True) else inputs.transpose(0, 1)

    def on_context(context: Tensor) -> None:
        seen["context"] = context.flatten(2)
        raise _Seen

    with ExitStack() as hooks:
        hooks.callback(layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True).remove)
        if whole_inputs:
            hooks.enter_context(observing_inputs(layer.attention, on_context))
        else:
            hooks.callback(projection.register_forward_pre_hook(lambda _, args: on_context(args[0])).remove)
        with suppress(_Seen):
            model(**batch)
    return seen["context"], seen["inputs"]
