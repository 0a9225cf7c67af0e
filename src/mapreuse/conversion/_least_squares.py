"""Least squares of a layer's attention output, added batch by batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

DRIFT = (0.0, 1.0)
"""Shares of the drift of earlier layers that the refit is asked to undo."""

_BLOCK = 512
"""Rows of a symmetric product that are summed at once."""


@dataclass(frozen=True)
class Weights:
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
        by_head = inputs.double().unflatten(1, (self.num_maps, -1)).transpose(0, 1)[list(self.maps)]
        return (by_head @ self.values + self.value_bias[:, None]).transpose(0, 1).flatten(1)

    def on_contexts(self) -> Weights:
        """The same output projection, to be applied to contexts."""
        return on_contexts(self.output, self.bias)

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


class Sums:
    """A layer's least squares, added batch by batch: inputs and a one, R, against targets and drift.

    While there are no more rows than R has columns, R itself is kept, with targets and drift, as they came: that
    takes less memory than normal equations, and far fewer products. Where more come, Rᵀ times all of them is summed,
    in float64. What is made of either is called an image here: it has a row for each of R, or is Rᵀ times that.
    """

    def __init__(self, weights: Weights) -> None:
        self._start = weights
        self._num_columns = weights.num_maps * weights.values.shape[1] + 1
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._size = 0.0
        self._whole = dict.fromkeys(DRIFT, 0.0)
        self._eigen: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        inputs: Float[Tensor, "rows inputs"],
        target: Float[Tensor, "rows width"],
        drift: Float[Tensor, "rows width"],
    ) -> None:
        self._kept.append((torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1), target, drift))
        target, drift = target.double(), drift.double()
        self._size += float(target.square().sum())
        for share in DRIFT:
            self._whole[share] += float((target + share * drift).square().sum())
        if self._sums is not None or sum(len(extended) for extended, *_ in self._kept) > self._num_columns:
            self._sum_kept()

    def _sum_kept(self) -> None:
        if self._sums is None:
            zeros = functools.partial(self._start.values.new_zeros, self._num_columns)
            width = self._start.output.shape[-1]
            self._sums = zeros(self._num_columns), zeros(width), zeros(width)
        gram, *others = self._sums
        while self._kept:
            extended, *against = (tensor.double() for tensor in self._kept.pop())
            for begin in range(0, self._num_columns, _BLOCK):  # the upper triangle
                rows = slice(begin, begin + _BLOCK)
                gram[rows, begin:].addmm_(extended[:, rows].mT, extended[:, begin:])
            for summed, one in zip(others, against, strict=True):
                summed.addmm_(extended.mT, one)

    @functools.cached_property
    def _images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of R, the targets and the drift, once nothing is added any more."""
        if self._sums is None:
            extended, target, drift = (torch.cat(one) for one in zip(*self._kept, strict=True))
            self._kept.clear()
            return extended, target, drift
        gram = self._sums[0]
        for begin in range(0, self._num_columns, _BLOCK):
            rows, rest = slice(begin, begin + _BLOCK), slice(begin + _BLOCK, None)
            gram[rest, rows] = gram[rows, rest].mT
        return self._sums

    def _inputs(self, number: int) -> Float[Tensor, "image inputs"]:
        """The image of what one map makes of the inputs, Z."""
        return self._images[0][:, self._columns(number)].double()

    def _columns(self, number: int) -> slice:
        size = self._start.values.shape[1]
        return slice(number * size, (number + 1) * size)

    def _onto_inputs(self, number: int, image: Float[Tensor, "image columns"]) -> Float[Tensor, "inputs columns"]:
        """Zᵀ of what has this image."""
        return self._inputs(number).mT @ image if self._sums is None else image[self._columns(number)]

    def _contexts(self, weights: Weights) -> Float[Tensor, "image context_and_one"]:
        """The image of contexts and a one."""
        one = self._images[0][:, -1:].double()
        heads = [
            self._inputs(number) @ values + one * bias
            for number, values, bias in zip(weights.maps, weights.values, weights.value_bias, strict=True)
        ]
        return torch.cat([*heads, one], 1)

    @functools.cached_property
    def _equations_of_start(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._reduced(self._start)

    def _equations(self, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Of contexts and a one, C: Cᵀ C, Cᵀ times targets, Cᵀ times drift."""
        return self._equations_of_start if weights is self._start else self._reduced(weights)

    def _reduced(self, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        contexts = self._contexts(weights)
        images = contexts, *self._images[1:]
        gram, target, drift = (
            contexts.mT @ image.double() if self._sums is None else weights.onto(image) for image in images
        )
        return gram, target, drift

    def error(self, weights: Weights, share: float) -> float:
        """√(Σ ‖output − target − share · drift‖² / Σ ‖target‖²), or the root as it is where the target is zero."""
        stacked = weights.stacked
        gram, target, drift = self._equations(weights)
        wrong = (stacked * (gram @ stacked - 2 * (target + share * drift))).sum()
        return (max(float(wrong) + self._whole[share], 0.0) / (self._size or 1.0)) ** 0.5

    def solve(self, start: Weights, ridge: float, share: float, *, sweeps: int = 0) -> Weights:
        """Output, then `sweeps` times values and output, each solved exactly and held to `start` by the ridge."""
        weights = self._solve_output(start, start, share, ridge)
        for _ in range(sweeps):
            weights = self._solve_values(start, weights, share, ridge)
            weights = self._solve_output(start, weights, share, ridge)
        return weights

    def _solve_output(self, start: Weights, weights: Weights, share: float, ridge: float) -> Weights:
        gram, target, drift = self._equations(weights)
        moment, anchor = target + share * drift, start.stacked
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

    def _solve_values(self, start: Weights, weights: Weights, share: float, ridge: float) -> Weights:
        """Head by head: the minimum over V of ‖Z V output[h] − what the other heads leave‖² + λ ‖V − V₀‖².

        Z is inputs[maps[h]]. The normal equations G V P + λ V = B are diagonal in the eigenvectors of G = Zᵀ Z and of
        P = output[h] output[h]ᵀ.
        """
        values, output = weights.values.clone(), weights.output
        by_head = self._contexts(weights)[:, :-1].unflatten(1, output.shape[:2])
        extended, target, drift = self._images
        aim = target.double() + share * drift.double()
        if weights.bias is not None:
            aim -= extended[:, -1:].double() * weights.bias
        if not self._eigen:
            numbers = range(weights.num_maps)
            self._eigen = [torch.linalg.eigh(self._onto_inputs(number, self._inputs(number))) for number in numbers]
        for head, number in enumerate(weights.maps):
            onto = output[head].mT  # from the right at once: what is left is as wide as the output, a head is narrow
            by_head[:, head] = extended[:, -1:] * weights.value_bias[head]
            left = aim @ onto - by_head.flatten(1) @ (output.flatten(0, 1) @ onto)
            sizes, vectors = self._eigen[number]
            widths, turned = torch.linalg.eigh(output[head] @ onto)
            strength = ridge * _positive(sizes.mean() * widths.mean())
            wanted = vectors.mT @ (self._onto_inputs(number, left) + strength * start.values[head]) @ turned
            values[head] = vectors @ (wanted / (sizes[:, None] * widths + strength)) @ turned.mT
            by_head[:, head] += self._inputs(number) @ values[head]
        return replace(weights, values=values)


def _positive(size: Tensor) -> Tensor:
    """1 for a size of zero, as of a layer whose values are: its weights are then held, by whatever strength."""
    return torch.where(size > 0, size, torch.ones_like(size))


def on_contexts(output: Float[Tensor, "heads head_dim width"], bias: Tensor | None) -> Weights:
    heads, dim, _ = output.shape
    identity = torch.eye(dim, dtype=torch.float64, device=output.device).expand(heads, dim, dim)
    return Weights(tuple(range(heads)), identity, torch.zeros_like(output[..., 0]), output, bias)
