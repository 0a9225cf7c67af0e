"""Closed-form refit of a converted model's output projections."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models import MapRecorder, find_stack, output_projection, plan_of

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried, relative to the mean square of the contexts."""

_DRIFT = (0.0, 1.0)
"""Shares of the drift of earlier layers that the refit is asked to undo."""

_HELD_OUT = 4
"""Every fourth batch chooses between the candidates instead of fitting them."""


@dataclass(frozen=True)
class LayerFit:
    """What `fit` did to one reusing layer.

    Attributes:
        layer: index of the layer.
        before: held-out error of the attention's output with the weights it had, relative to the output's own size.
        after: the same with the weights it has now; equal to `before` where the refit did not help.
        ridge: the ridge chosen, or None where the layer kept its weights.
    """

    layer: int
    before: float
    after: float
    ridge: float | None


def fit(model: nn.Module, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[LayerFit]:
    """Refit, in place, the output projection of every reusing layer so that its output matches the original's.

    Layer by layer from below, with X the contexts in the converted model as it is by then, and Y the outputs of the
    same projection in the original, plus what the input of the layer has lost by then (its drift):

        W, b = argmin ‖X Wᵀ + b − Y‖² + λ ‖W − W₀‖²

    solved by normal equations summed over batches in float64. λ, and whether the drift is added, are chosen on
    held-out batches by the error of the layer's residual stream; a layer that no candidate improves keeps its
    weights. Padding is left out.

    Args:
        model: a converted model with a plan in force.
        original: the model it was converted from.
        batches: calibration batches for both, at least four; every fourth is held out.

    Returns:
        One report for each reusing layer, in order.

    Raises:
        ValueError: where no plan is in force, there are too few batches, or activations are not finite.
    """
    plan = plan_of(model)
    if plan is None:
        raise ValueError("fit needs a converted model: apply a plan to it first")
    batches = list(batches)
    if len(batches) < _HELD_OUT:
        raise ValueError(
            f"fit needs at least {_HELD_OUT} calibration batches, got {len(batches)}: split them smaller"
        )
    recorder = MapRecorder(original)
    valid = [recorder(batch)[1] for batch in batches]
    reports = []
    modes = model.training, original.training
    model.eval(), original.eval()
    try:
        for layer in filter(plan.reuses, range(plan.num_layers)):
            reports.append(_fit_layer(layer, model, original, batches, valid))  # noqa: PERF401  each needs the last
    finally:
        model.train(modes[0]), original.train(modes[1])
    return reports


def _fit_layer(layer: int, model: nn.Module, original: nn.Module, batches: list, valid: list[Tensor]) -> LayerFit:
    projection = output_projection(find_stack(model).layers[layer])
    reference = output_projection(find_stack(original).layers[layer])
    sums: list[_Sums] = [_Sums() for _ in _DRIFT]
    held_out: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, (batch, rows) in enumerate(zip(batches, valid, strict=True)):
        context, _, inputs = _activations(model, layer, projection, batch)
        _, target, original_inputs = _activations(original, layer, reference, batch)
        observed = [tensor[rows].double() for tensor in (context, target, original_inputs - inputs)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in observed):
            raise ValueError(f"layer {layer}: activations are not finite; check the calibration batches")
        context, target, drift = observed
        if index % _HELD_OUT == _HELD_OUT - 1:
            held_out.append((context, target, drift))
        else:
            for share, accumulated in zip(_DRIFT, sums, strict=True):
                accumulated.add(context, target + share * drift)
    weight, bias = _weights(projection)
    before = _error(weight, bias, held_out)
    best, chosen = before, None
    for accumulated, ridge in itertools.product(sums, _RIDGES):
        candidate = accumulated.solve(weight, bias, ridge)
        error = _error(*candidate, held_out)
        if error < best:
            best, chosen = error, (ridge, candidate)
    if chosen is None:
        return LayerFit(layer, before, before, None)
    _set_weights(projection, *chosen[1])
    return LayerFit(layer, before, best, chosen[0])


class _Sums:
    """Normal equations of a regression with intercept, summed over batches."""

    def __init__(self) -> None:
        self._gram: Tensor | float = 0.0
        self._moment: Tensor | float = 0.0
        self._rows = 0

    def add(self, inputs: Float[Tensor, "rows context"], targets: Float[Tensor, "rows width"]) -> None:
        extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self._gram = self._gram + extended.mT @ extended
        self._moment = self._moment + extended.mT @ targets
        self._rows += len(inputs)

    def solve(
        self, weight: Float[Tensor, "width context"], bias: Tensor | None, ridge: float
    ) -> tuple[Tensor, Tensor | None]:
        """Weights and bias of the regression shrunk towards these; no bias where there was none."""
        gram, moment = torch.as_tensor(self._gram), torch.as_tensor(self._moment)
        size = len(gram) - 1
        start = torch.cat([weight.mT, torch.zeros_like(weight[:, :1]).mT if bias is None else bias[None]], 0)
        if bias is None:
            gram, moment, start = gram[:size, :size], moment[:size], start[:size]
        strength = ridge * gram.diagonal()[:size].mean()
        penalty = torch.full_like(gram.diagonal(), float(strength))
        penalty[size:] = 0.0
        change = torch.linalg.solve(gram + penalty.diag(), moment - gram @ start)
        solved = start + change
        return solved[:size].mT, None if bias is None else solved[size]


def _error(weight: Tensor, bias: Tensor | None, held_out: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Relative error of the residual stream: the output's own error and the drift it meets."""
    wrong, size = 0.0, 0.0
    for context, target, drift in held_out:
        output = context @ weight.mT
        if bias is not None:
            output = output + bias
        wrong += float((output - target - drift).square().sum())
        size += float(target.square().sum())
    return (wrong / size) ** 0.5


class _Seen(Exception):
    """The layer has run; the rest of the forward pass is not needed."""


@torch.no_grad()
def _activations(
    model: nn.Module, layer: int, projection: nn.Module, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and outputs of the projection, and the input of its layer."""
    module = find_stack(model).layers[layer].layer
    seen: dict[str, Tensor] = {}

    def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["hidden_states"] = args[0] if args else kwargs["hidden_states"]

    def on_projection(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["context"], seen["output"] = args[0], output
        raise _Seen

    handles = [
        module.register_forward_pre_hook(on_layer, with_kwargs=True),
        projection.register_forward_hook(on_projection),
    ]
    try:
        model(**batch)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen["context"], seen["output"], seen["hidden_states"]


def _weights(projection: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    weight = projection.weight.mT if isinstance(projection, Conv1D) else projection.weight
    return weight.detach().double(), None if projection.bias is None else projection.bias.detach().double()


@torch.no_grad()
def _set_weights(projection: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> None:
    projection.weight.copy_(weight.mT if isinstance(projection, Conv1D) else weight)
    if bias is not None:
        projection.bias.copy_(bias)
