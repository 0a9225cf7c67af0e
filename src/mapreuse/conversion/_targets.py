"""Regression targets: the original model's activations on calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.conversion._layer_cache import LayerCache
from mapreuse.conversion._validation import checked_batches
from mapreuse.models import copy_with_same_weights, optimize, output_projection, with_projections

_HELD_OUT = 4
"""Every fourth batch is held out to choose between candidates."""

_MIN_POSITIONS = 8
"""Minimum number of positions to train and to evaluate on."""


class Targets:
    """Activations of the original model on calibration batches, without padding.

    Attributes:
        batches: the batches as a list. Every fourth is held out.
        valid: for each batch, True for positions that are not padding.
        cache: inputs and outputs of the original's layers.

    Raises:
        ValueError: if there are too few batches or positions.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        self.batches = checked_batches(batches, _HELD_OUT, "refit")
        model = optimize(copy_with_same_weights(with_projections(original))).eval()
        self.cache = LayerCache(model, self.batches)
        self.valid = [self.cache.valid(number) for number in range(len(self.batches))]
        held_out = sum(int(rows.sum()) for rows in self.valid[_HELD_OUT - 1 :: _HELD_OUT])
        training = sum(int(rows.sum()) for rows in self.valid) - held_out
        if min(training, held_out) < _MIN_POSITIONS:
            raise ValueError(
                f"refit needs at least {_MIN_POSITIONS} positions that are not padding in every fourth batch "
                f"together, which are held out, and as many in the others: got {held_out} and {training}; give more "
                "or longer samples"
            )

    @torch.no_grad()
    def attention(self, index: int, number: int) -> tuple[Tensor, Tensor]:
        """The output of a layer's attention in one batch, and the input of the layer."""
        rows = self.valid[number]
        context, inputs = self.cache.context(index, number)
        return output_projection(self.cache.layers[index])(context[rows]), inputs[rows]

    def output(self, index: int, number: int) -> Tensor:
        """The output of a layer in one batch."""
        (output,) = self.cache.outputs(index, number)
        return output[self.valid[number]]


def is_held_out(number: int) -> bool:
    """True for every fourth batch."""
    return number % _HELD_OUT == _HELD_OUT - 1
