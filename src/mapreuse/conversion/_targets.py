"""What a refit wants of a converted model's layers: what the original's make of calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.conversion._layer_cache import Passes
from mapreuse.conversion._validation import calibration_batches
from mapreuse.models import copy_with_same_weights, optimize, output_projection, with_projections

_HELD_OUT = 4
"""Every fourth batch chooses between the candidates instead of fitting them."""

_FEWEST_POSITIONS = 8
"""Of which fewer choose between candidates by chance."""


class Wanted:
    """What the original makes of calibration batches in each layer, where there is no padding.

    Args:
        original: the model as it was before its conversion.
        batches: calibration batches, at least four; every fourth is held out.

    Attributes:
        batches: the batches.
        valid: for each, which positions are not padding.
        passes: those of the original.

    Raises:
        ValueError: where there are too few batches or positions.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        self.batches = calibration_batches(batches, _HELD_OUT, "refit")
        model = optimize(copy_with_same_weights(with_projections(original))).eval()
        self.passes = Passes(model, self.batches)
        self.valid = [self.passes.valid(number) for number in range(len(self.batches))]
        fitting, judging = (
            sum(int(rows.sum()) for number, rows in enumerate(self.valid) if is_held_out(number) == held_out)
            for held_out in (False, True)
        )
        if min(fitting, judging) < _FEWEST_POSITIONS:
            raise ValueError(
                f"refit needs at least {_FEWEST_POSITIONS} positions that are not padding in every fourth batch "
                f"together, which are held out, and as many in the others: got {judging} and {fitting}; give more or "
                "longer samples"
            )

    @torch.no_grad()
    def attention(self, index: int, number: int) -> tuple[Tensor, Tensor]:
        """Of a batch, the output of a layer's attention, and the input of the layer."""
        rows = self.valid[number]
        context, inputs = self.passes.context(index, number)
        return output_projection(self.passes.layers[index])(context[rows]), inputs[rows]

    def output(self, index: int, number: int) -> Tensor:
        """Of a batch, the output of a layer."""
        (output,) = self.passes.outputs(index, number)
        return output[self.valid[number]]


def is_held_out(number: int) -> bool:
    """Whether this batch chooses between the candidates."""
    return number % _HELD_OUT == _HELD_OUT - 1
