"""Ridge regression of a reusing layer's value and output projections, accumulated batch by batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

DRIFT_SHARES = (0.0, 1.0)
"""Candidates for the share of the earlier layers' error that a layer's regression should correct."""

_BLOCK = 512
"""Rows of a symmetric product that are computed at once."""

_MAX_STEPS, _TOLERANCE = 50, 1e-6
"""Conjugate gradients end after so many steps, or when the residual has this size relative to the right-hand side."""


@dataclass(frozen=True)
class HeadProjections:
    """Value and output projections of a reusing layer, head by head, in float64.

        output = Σ_h (inputs[maps[h]] values[g(h)] + value_bias[g(h)]) output[h] + bias

    with inputs[m] = A_m X for each map A_m that the layer applies, and g(h) the value head of head h: under
    grouped-query attention, several neighbouring heads have the same. If values are not refitted, inputs are the
    contexts themselves, one for each head, and `values` is the identity.
    """

    maps: tuple[int, ...]
    values: Float[Tensor, "value_heads inputs head_dim"]
    value_bias: Float[Tensor, "value_heads head_dim"]
    output: Float[Tensor, "heads head_dim width"]
    bias: Tensor | None

    @classmethod
    def of_contexts(cls, output: Float[Tensor, "heads head_dim width"], bias: Tensor | None) -> HeadProjections:
        """An output projection alone, applied to contexts."""
        heads, dim, _ = output.shape
        identity = torch.eye(dim, dtype=torch.float64, device=output.device).expand(heads, dim, dim)
        return cls(tuple(range(heads)), identity, torch.zeros_like(output[..., 0]), output, bias)

    def to_contexts(
        self, matrix: Float[Tensor, "inputs_and_one columns"]
    ) -> Float[Tensor, "context_and_one columns"]:
        """Bᵀ · matrix, with B the linear map from [inputs, 1] to [contexts, 1]."""
        blocks = matrix[:-1].unflatten(0, (self.num_maps, -1))
        heads = [self.values[group].mT @ blocks[number] for group, number in zip(self.groups, self.maps, strict=True)]
        context = torch.stack(heads) + self.value_bias[self.groups, :, None] * matrix[-1]
        return torch.cat([context.flatten(0, 1), matrix[-1:]])

    def contexts(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows context"]:
        """inputs[maps[h]] values[g(h)] + value_bias[g(h)], head after head."""
        by_head = inputs.double().unflatten(1, (self.num_maps, -1)).transpose(0, 1)[list(self.maps)]
        return (by_head @ self.values[self.groups] + self.value_bias[self.groups, None]).transpose(0, 1).flatten(1)

    def one_per_map(self, by_head: Float[Tensor, "rows heads_inputs"]) -> Float[Tensor, "rows inputs"]:
        """For each map, the inputs of the first head that applies it."""
        first = [self.maps.index(number) for number in range(self.num_maps)]
        return by_head.unflatten(1, (len(self.maps), -1))[:, first].flatten(1)

    @property
    def by_value_head(self) -> list[tuple[int, ...]]:
        """For each value head, the maps of its heads."""
        size = len(self.maps) // len(self.values)
        return [self.maps[start : start + size] for start in range(0, len(self.maps), size)]

    @property
    def groups(self) -> list[int]:
        """For each head, the number of its value head."""
        return [head * len(self.values) // len(self.maps) for head in range(len(self.maps))]

    def scaled(self, scale: Float[Tensor, " width"]) -> HeadProjections:
        """Projections with each channel of the output multiplied by a factor."""
        bias = None if self.bias is None else self.bias * scale
        return replace(self, output=self.output * scale, bias=bias)

    @property
    def num_maps(self) -> int:
        """Number of maps that the layer applies; they are numbered in the order of the heads."""
        return max(self.maps) + 1

    @property
    def stacked(self) -> Float[Tensor, "context_and_one width"]:
        """Output projection, with the bias as its last row."""
        bias = self.output.new_zeros(self.output.shape[-1]) if self.bias is None else self.bias
        return torch.cat([self.output.flatten(0, 1), bias[None]])


class LeastSquares:
    """The regression of a layer's attention output on its inputs.

    R are the inputs and a column of ones, with a row for each position. While R has no more rows than columns, R,
    targets and drift are stored, which takes less memory and fewer products than normal equations. With more rows,
    Rᵀ R, Rᵀ target and Rᵀ drift are accumulated in float64. In the code, the `image` of a matrix is the matrix itself
    in the first case, and Rᵀ times the matrix in the second. `start` are the projections before the regression.
    """

    def __init__(self, start: HeadProjections) -> None:
        self._start = start
        self._num_columns = start.num_maps * start.values.shape[1] + 1
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._target_size = 0.0
        self._sizes = dict.fromkeys(DRIFT_SHARES, 0.0)

    def add(
        self,
        inputs: Float[Tensor, "rows inputs"],
        target: Float[Tensor, "rows width"],
        drift: Float[Tensor, "rows width"],
    ) -> None:
        """Add positions; `drift` is the error of the layer's own input."""
        self._rows.append((torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1), target, drift))
        target, drift = target.double(), drift.double()
        self._target_size += float(target.square().sum())
        for share in DRIFT_SHARES:
            self._sizes[share] += float((target + share * drift).square().sum())
        if self._sums is not None or sum(len(extended) for extended, *_ in self._rows) > self._num_columns:
            self._accumulate()

    def _accumulate(self) -> None:
        if self._sums is None:
            zeros = functools.partial(self._start.values.new_zeros, self._num_columns)
            width = self._start.output.shape[-1]
            self._sums = zeros(self._num_columns), zeros(width), zeros(width)
        gram, *others = self._sums
        while self._rows:
            extended, *against = (tensor.double() for tensor in self._rows.pop())
            for begin in range(0, self._num_columns, _BLOCK):  # the upper triangle
                rows = slice(begin, begin + _BLOCK)
                gram[rows, begin:].addmm_(extended[:, rows].mT, extended[:, begin:])
            for summed, one in zip(others, against, strict=True):
                summed.addmm_(extended.mT, one)

    @functools.cached_property
    def _images(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images of R, targets and drift; nothing may be added afterwards."""
        if self._sums is None:
            extended, target, drift = (torch.cat(one) for one in zip(*self._rows, strict=True))
            self._rows.clear()
            return extended, target, drift
        gram = self._sums[0]
        for begin in range(0, self._num_columns, _BLOCK):
            rows, rest = slice(begin, begin + _BLOCK), slice(begin + _BLOCK, None)
            gram[rest, rows] = gram[rows, rest].mT
        return self._sums

    def _inputs(self, number: int) -> Float[Tensor, "image inputs"]:
        """The image of one map's inputs, Z."""
        return self._images[0][:, self._columns(number)].double()

    def _columns(self, number: int) -> slice:
        size = self._start.values.shape[1]
        return slice(number * size, (number + 1) * size)

    def _to_inputs(self, number: int, image: Float[Tensor, "image columns"]) -> Float[Tensor, "inputs columns"]:
        """Zᵀ times the matrix with this image."""
        return self._inputs(number).mT @ image if self._sums is None else image[self._columns(number)]

    def _contexts(self, projections: HeadProjections) -> Float[Tensor, "image context_and_one"]:
        """The image of contexts and a one."""
        one = self._images[0][:, -1:].double()
        heads = [
            self._inputs(number) @ projections.values[group] + one * projections.value_bias[group]
            for number, group in zip(projections.maps, projections.groups, strict=True)
        ]
        return torch.cat([*heads, one], 1)

    @functools.cached_property
    def _eigen(self) -> list[tuple[Tensor, Tensor]]:
        """For each value head, eigenvalues and eigenvectors of the mean of Zᵀ Z over its heads."""
        grams = [self._to_inputs(number, self._inputs(number)) for number in range(self._start.num_maps)]
        of_values = [torch.stack([grams[number] for number in maps]) for maps in self._start.by_value_head]
        return [torch.linalg.eigh(found.mean(0)) for found in of_values]

    @functools.cached_property
    def _start_equations(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._equations(self._start)

    def _equations(self, projections: HeadProjections) -> tuple[Tensor, Tensor, Tensor]:
        """Cᵀ C, Cᵀ target and Cᵀ drift, with C the contexts and a one."""
        contexts = self._contexts(projections)
        images = contexts, *self._images[1:]
        gram, target, drift = (
            contexts.mT @ image.double() if self._sums is None else projections.to_contexts(image) for image in images
        )
        return gram, target, drift

    def error(self, projections: HeadProjections, share: float) -> float:
        """√(Σ ‖output − target − share · drift‖² / Σ ‖target‖²), or the numerator alone if the target is zero.

        The output projection and the bias are applied to the contexts of the start.
        """
        stacked = projections.stacked
        gram, target, drift = self._start_equations
        error = (stacked * (gram @ stacked - 2 * (target + share * drift))).sum()
        return (max(float(error) + self._sizes[share], 0.0) / (self._target_size or 1.0)) ** 0.5

    def solve(self, ridge: float, share: float, *, sweeps: int = 0) -> HeadProjections:
        """Solve for output projection and bias, then `sweeps` times for values and for output, each exactly.

        The penalty is `ridge` times the squared distance from the start.
        """
        projections = self._solve_output(self._start, self._start_equations, share, ridge)
        for _ in range(sweeps):
            projections = self._solve_values(projections, share, ridge)
            projections = self._solve_output(projections, self._equations(projections), share, ridge)
        return projections

    def _solve_output(
        self, projections: HeadProjections, equations: tuple[Tensor, Tensor, Tensor], share: float, ridge: float
    ) -> HeadProjections:
        start, (gram, target, drift) = self._start, equations
        moment, anchor = target + share * drift, start.stacked
        size = len(gram) - 1
        if start.bias is None:
            gram, moment, anchor = gram[:size, :size], moment[:size], anchor[:size]
        penalty = torch.zeros_like(gram.diagonal())
        penalty[:size] = ridge * _one_if_zero(gram.diagonal()[:size].mean())
        solved = anchor + torch.linalg.solve(gram + penalty.diag(), moment - gram @ anchor)
        return replace(
            projections,
            output=solved[:size].view_as(start.output),
            bias=None if start.bias is None else solved[size],
        )

    def _solve_values(self, projections: HeadProjections, share: float, ridge: float) -> HeadProjections:
        """Solve for the values of one value head after another, each exactly."""
        values, output = projections.values.clone(), projections.output
        by_head = self._contexts(projections)[:, :-1].unflatten(1, output.shape[:2])
        extended, target, drift = self._images
        aim = target.double() + share * drift.double()
        if projections.bias is not None:
            aim -= extended[:, -1:].double() * projections.bias
        for group, maps in enumerate(projections.by_value_head):
            heads = slice(group * len(maps), (group + 1) * len(maps))
            onto = (
                output[heads].flatten(0, 1).mT
            )  # multiplied from the right first: heads are narrower than the output
            by_head[:, heads] = (extended[:, -1:] * projections.value_bias[group])[:, None]
            residual = aim @ onto - by_head.flatten(1) @ (output.flatten(0, 1) @ onto)
            values[group] = self._solve_value_head(group, output[heads], residual, ridge)
            by_head[:, heads] += torch.stack([self._inputs(number) @ values[group] for number in maps], 1)
        return replace(projections, values=values)

    def _solve_value_head(
        self,
        group: int,
        output: Float[Tensor, "heads head_dim width"],
        residual: Float[Tensor, "image heads_head_dim"],
        ridge: float,
    ) -> Float[Tensor, "inputs head_dim"]:
        """Minimise ‖Σ_h Z[h] V output[h] − Y‖² + λ ‖V − V₀‖² over V, given the image of Y output[h]ᵀ for each head h.

        The sum is over the heads of one value head, and Z[h] is inputs[maps[h]]. The normal equations are

            Σ_h Z[h]ᵀ Σ_k Z[k] V output[k] output[h]ᵀ + λ V = Σ_h Z[h]ᵀ Y output[h]ᵀ + λ V₀

        With G the mean of Z[h]ᵀ Z[h] and P the sum of output[h] output[h]ᵀ, G V P + λ V is diagonal in the
        eigenvectors of G and of P. This solves the equations of one head, and preconditions conjugate gradients for
        several.
        """
        maps, (sizes, vectors) = self._start.by_value_head[group], self._eigen[group]
        widths, turned = torch.linalg.eigh((output @ output.mT).sum(0))
        strength = ridge * _one_if_zero(sizes.mean() * widths.mean())
        products = output.flatten(0, 1) @ output.flatten(0, 1).mT

        def to_inputs(image: Tensor) -> Tensor:
            parts = zip(maps, image.chunk(len(maps), 1), strict=True)
            return torch.stack([self._to_inputs(*one) for one in parts]).sum(0)

        def equations(values: Tensor) -> Tensor:
            image = torch.cat([self._inputs(number) @ values for number in maps], 1)
            return to_inputs(image @ products) + strength * values

        def precondition(moment: Tensor) -> Tensor:
            return vectors @ (vectors.mT @ moment @ turned / (sizes[:, None] * widths + strength)) @ turned.mT

        moment = to_inputs(residual) + strength * self._start.values[group]
        solved = precondition(moment)
        if len(maps) == 1:
            return solved
        left = moment - equations(solved)
        direction = step = precondition(left)
        for _ in range(_MAX_STEPS):
            if left.norm() <= _TOLERANCE * moment.norm():
                break
            size, moved = (left * step).sum(), equations(direction)
            length = size / (direction * moved).sum()
            solved, left = solved + length * direction, left - length * moved
            step = precondition(left)
            direction = step + (left * step).sum() / size * direction
        return solved


def _one_if_zero(size: Tensor) -> Tensor:
    """1 for a size of zero. Any penalty then keeps the weights of a layer whose values are zero."""
    return torch.where(size > 0, size, torch.ones_like(size))
