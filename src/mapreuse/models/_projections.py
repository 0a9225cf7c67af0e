"""Parts of projections: the rows that some heads need, and the columns in their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mapreuse.models._linear import linear


class HeadSubsetLinear(nn.Linear):
    """A projection of some heads only; the others read zero.

        y = [x Wᵀ + b, 0]

    The heads that are kept come first. The output has the width of the whole projection, so that the forward around
    it works unchanged.
    """

    def __init__(self, linear: nn.Linear, rows: list[int]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, len(rows)
        self.padding = linear.out_features - len(rows)
        self.weight = nn.Parameter(linear.weight.detach()[rows].clone(), linear.weight.requires_grad)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach()[rows].clone(), bias.requires_grad)
        self.train(linear.training)

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch whole"]:
        return functional.pad(linear(input, self.weight, self.bias), (0, self.padding))


def head_rows(heads: Sequence[int], head_dim: int) -> list[int]:
    """The rows of a projection that belong to `heads`, in that order."""
    return [head * head_dim + row for head in heads for row in range(head_dim)]


def take_outputs(projection: nn.Linear | Conv1D, rows: list[int]) -> None:
    """Keep these outputs of a projection, in this order, in place."""
    with torch.no_grad():
        if isinstance(projection, Conv1D):
            projection.weight = nn.Parameter(projection.weight[:, rows].clone(), projection.weight.requires_grad)
            projection.nf = len(rows)
        else:
            projection.weight = nn.Parameter(projection.weight[rows].clone(), projection.weight.requires_grad)
            projection.out_features = len(rows)
        if projection.bias is not None:
            projection.bias = nn.Parameter(projection.bias[rows].clone(), projection.bias.requires_grad)


def take_inputs(projection: nn.Linear | Conv1D, columns: list[int]) -> None:
    """Put the inputs of a projection in this order, in place."""
    with torch.no_grad():
        weight = projection.weight
        reordered = weight[columns] if isinstance(projection, Conv1D) else weight[:, columns]
        projection.weight = nn.Parameter(reordered.clone(), weight.requires_grad)
