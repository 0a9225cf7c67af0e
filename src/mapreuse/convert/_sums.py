"""Least squares of a layer's attention output, from normal equations summed over batches."""

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
        by_head = inputs.unflatten(1, (self.num_maps, -1)).transpose(0, 1)[list(self.maps)]
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
    """Normal equations of a layer's output, summed over batches: inputs and a one against targets and drift."""

    def __init__(self, weights: Weights) -> None:
        self._start = weights
        size, width = weights.num_maps * weights.values.shape[1] + 1, weights.output.shape[-1]
        self._upper = weights.values.new_zeros(size, size)  # that triangle of the Gram matrix, block by block
        self._target = weights.values.new_zeros(size, width)
        self._drift = torch.zeros_like(self._target)
        self._size = 0.0
        self._whole = dict.fromkeys(DRIFT, 0.0)
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
        for share in DRIFT:
            self._whole[share] += float((target + share * drift).square().sum())

    @functools.cached_property
    def _gram(self) -> Float[Tensor, "inputs_and_one inputs_and_one"]:
        """The sum whole, once nothing is added any more."""
        for start in range(0, len(self._upper), _BLOCK):
            rows, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            self._upper[rest, rows] = self._upper[rows, rest].mT
        return self._upper

    def error(self, weights: Weights, share: float) -> float:
        """√(Σ ‖output − target − share · drift‖² / Σ ‖target‖²), or the root as it is where the target is zero."""
        stacked = weights.stacked
        wrong = (stacked * (self._reduced(weights) @ stacked)).sum()
        wrong -= 2 * (stacked * weights.onto(self._target + share * self._drift)).sum()
        return (max(float(wrong) + self._whole[share], 0.0) / (self._size or 1.0)) ** 0.5

    def solve(self, start: Weights, ridge: float, share: float, *, sweeps: int = 0) -> Weights:
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

    def _reduced(self, weights: Weights) -> Float[Tensor, "context_and_one context_and_one"]:
        """The Gram matrix of contexts and a one."""
        return self._reduced_by_start if weights is self._start else weights.onto(weights.onto(self._gram).mT)

    def _solve_output(self, start: Weights, weights: Weights, moment: Tensor, ridge: float) -> Weights:
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

    def _solve_values(self, start: Weights, weights: Weights, moment: Tensor, ridge: float) -> Weights:
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
            onto = output[head].mT  # from the right at once: what is left is as wide as the output, a head is narrow
            left = moment[rows] @ onto - met.flatten(1) @ (output.flatten(0, 1) @ onto)
            left -= self._gram[rows, -1:] * (constant @ onto)
            sizes, vectors = self._eigen[number]
            widths, turned = torch.linalg.eigh(output[head] @ onto)
            strength = ridge * _positive(sizes.mean() * widths.mean())
            wanted = vectors.mT @ (left + strength * start.values[head]) @ turned
            values[head] = vectors @ (wanted / (sizes[:, None] * widths + strength)) @ turned.mT
        return replace(weights, values=values)


def _positive(size: Tensor) -> Tensor:
    """1 for a size of zero, as of a layer whose values are: its weights are then held, by whatever strength."""
    return torch.where(size > 0, size, torch.ones_like(size))


def on_contexts(output: Float[Tensor, "heads head_dim width"], bias: Tensor | None) -> Weights:
    heads, dim, _ = output.shape
    identity = torch.eye(dim, dtype=torch.float64, device=output.device).expand(heads, dim, dim)
    return Weights(tuple(range(heads)), identity, torch.zeros_like(output[..., 0]), output, bias)
