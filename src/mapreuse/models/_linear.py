"""Linear layers, reduced to some of their rows or columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class HeadSubsetLinear(nn.Linear):
    """The rows of a projection that belong to some heads; the outputs of the other heads are zero.

        y = [x Wᵀ + b, 0]

    The output is as wide as that of the whole projection, so that the forward around it works unchanged.
    """

    def __init__(self, linear: nn.Linear, rows: list[int]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, len(rows)
        self.padding = linear.out_features - len(rows)
        self.weight = selected(linear.weight, 0, rows)
        self.bias = None if linear.bias is None else selected(linear.bias, 0, rows)
        self.train(linear.training)

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch whole"]:
        return functional.pad(super().forward(input), (0, self.padding))


def is_plain_linear(module: nn.Module | None) -> bool:
    """True for `torch.nn.Linear` and for GPT-2's `Conv1D`; False for subclasses."""
    return type(module) in (nn.Linear, Conv1D)


def head_rows(heads: Sequence[int], head_dim: int) -> list[int]:
    """The rows of a projection that belong to `heads`, in that order."""
    return [head * head_dim + row for head in heads for row in range(head_dim)]


def take_outputs(projection: nn.Linear | Conv1D, rows: list[int]) -> None:
    """Keep these outputs of a projection, in this order, in place."""
    conv1d = isinstance(projection, Conv1D)
    projection.weight = selected(projection.weight, 1 if conv1d else 0, rows)
    if projection.bias is not None:
        projection.bias = selected(projection.bias, 0, rows)
    setattr(projection, "nf" if conv1d else "out_features", len(rows))


def take_inputs(projection: nn.Linear | Conv1D, columns: list[int]) -> None:
    """Put the inputs of a projection in this order, in place."""
    projection.weight = selected(projection.weight, 0 if isinstance(projection, Conv1D) else 1, columns)


def selected(parameter: Tensor, dim: int, indices: Sequence[int]) -> nn.Parameter:
    """A new parameter with some rows or columns of another."""
    kept = parameter.detach().index_select(dim, torch.tensor(indices, device=parameter.device))
    return nn.Parameter(kept, parameter.requires_grad)
