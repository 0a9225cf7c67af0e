"""Regression targets: the original model's activations on calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapreuse.conversion._layer_cache import LayerCache
from mapreuse.conversion._validation import checked_batches
from mapreuse.models import MapRecorder, copy_with_same_weights, optimize, output_projection, with_projections

_HELD_OUT = 4
"""Every fourth batch is held out to choose between candidates."""

_MAX_QUERIES = 64
"""Maximum number of queries of a sample that maps are compared at."""

_MIN_POSITIONS = 8
"""Minimum number of positions to train and to evaluate on."""

MIN_CHANNEL = 0.01
"""Errors are relative to each channel's mean square. Smaller ones count as this fraction of the median channel's."""


class Targets:
    """Activations of the original model on calibration batches, without padding.

    Attributes:
        batches: the batches as a list. Every fourth is held out.
        attention_kind: "self" or "cross", as for `apply`.
        valid: for each batch, True for positions that are not padding.
        cache: inputs and outputs of the original's layers.

    Raises:
        ValueError: if there are too few batches or positions.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Mapping[str, Any]], attention: str = "self") -> None:
        self.batches = checked_batches(batches, _HELD_OUT, "refit")
        self.attention_kind = attention
        self._original, self._maps = original, dict[tuple[int, int], Tensor]()
        model = optimize(copy_with_same_weights(with_projections(original, attention))).eval()
        self.cache = LayerCache(model, self.batches, attention)
        self._scales: dict[int, Tensor] = {}
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

    def maps(self, index: int, number: int) -> Float[Tensor, "batch heads query key"]:
        """The map of a layer in one batch, at `sampled_queries`."""
        return self._maps[index, number]

    def record_maps(self, layers: Iterable[int]) -> None:
        """Run the original once, for `maps` of these layers."""
        lacking = [layer for layer in layers if (layer, 0) not in self._maps]
        if not lacking:
            return
        recorder = MapRecorder(self._original)
        for number, batch in enumerate(self.batches):
            recorded = recorder(batch).maps
            for layer in lacking:
                queries = sampled_queries(recorded[layer].shape[2]).to(recorded[layer].device)
                self._maps[layer, number] = recorded[layer][:, :, queries].clone()

    def output(self, index: int, number: int) -> Tensor:
        """The output of a layer in one batch."""
        (output,) = self.cache.outputs(index, number)
        return output[self.valid[number]]

    def scale(self, index: int) -> Float[Tensor, " width"]:
        """1 / root mean square of each channel in a layer's held-out outputs, but for channels near zero."""
        if index not in self._scales:
            held_out = range(_HELD_OUT - 1, len(self.batches), _HELD_OUT)
            outputs = torch.cat([self.output(index, number) for number in held_out])
            power = outputs.double().square().mean(0)
            power = power.clamp_min(MIN_CHANNEL * float(power.median()))
            scale = torch.where(power > 0, power, torch.ones_like(power)).rsqrt()
            self._scales[index] = scale.to(torch.promote_types(outputs.dtype, torch.float32))
        return self._scales[index]


def sampled_queries(length: int) -> Int[Tensor, " queries"]:
    """The queries of a sample at which maps are compared: all of them, or 64 evenly spaced ones."""
    return torch.linspace(0, length - 1, min(length, _MAX_QUERIES)).round().long()


def is_held_out(number: int) -> bool:
    """True for every fourth batch."""
    return number % _HELD_OUT == _HELD_OUT - 1
