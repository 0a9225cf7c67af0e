"""Projections that keep some of the outputs or inputs of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


def rows_of_heads(heads: Sequence[int], head_dim: int, kept_dim: int | None = None) -> Tensor:
    """Row numbers of the first `kept_dim` dimensions (default: all) of these heads in a projection's weight."""
    return torch.tensor([head * head_dim + row for head in heads for row in range(kept_dim or head_dim)])


def some_outputs(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """A new projection to these outputs of another, with its weights."""
    return _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def some_inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """A new projection from these inputs of another, with its weights."""
    return _linear(linear.weight[:, columns], linear.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = skip_init(nn.Linear, inputs, outputs, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
