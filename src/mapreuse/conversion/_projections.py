"""The value and output projections of a reusing layer, head by head: read, written, put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._least_squares import HeadProjections
from mapreuse.models import Layer, value_projection

_MOST_INPUTS = 12_288
"""Maps · width up to which values are refitted: their normal equations take 8 · (maps · width)² bytes, and as many
rows as they have columns half of that beside them, until they are summed."""


class Kept:
    """The projections of a layer as they are, to be put back."""

    def __init__(self, layer: Layer, projection: nn.Linear | Conv1D) -> None:
        self._parameters = [*projection.parameters(), *value_projection(layer).module.parameters()]
        self._were = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, was in zip(self._parameters, self._were, strict=True):
            parameter.copy_(was)


def maps_of(layer: Layer) -> tuple[int, ...]:
    """For each slot of a layer's context, which it applies of the maps that the layer applies, its own among them."""
    layout: Any = layer.attention._layout
    applied = [(layout.layer, slot) for slot in range(layout.computing)]
    applied += [(source, head) for source, pairs in layout.parts for head, _ in pairs]
    numbers = {one: number for number, one in enumerate(dict.fromkeys(applied))}
    return tuple(numbers[one] for one in applied)


def values_can_move(layer: Layer, maps: tuple[int, ...]) -> bool:
    layout: Any = layer.attention._layout
    values = value_projection(layer)
    inputs = len(set(maps)) * values.weight.shape[-1]
    return values.num_heads == layout.num_heads and inputs <= _MOST_INPUTS


def read(layer: Layer, projection: nn.Linear | Conv1D, maps: tuple[int, ...] | None) -> HeadProjections:
    """HeadProjections to be applied to what these maps make of the layer's input; where None, to its contexts."""
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
    output = weights.output.flatten(0, 1)
    projection.weight.copy_(output if isinstance(projection, Conv1D) else output.mT)
    if weights.bias is not None:
        projection.bias.copy_(weights.bias)
    if moved:
        value_projection(layer).assign(weights.values.mT)
