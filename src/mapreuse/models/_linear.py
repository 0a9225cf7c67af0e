"""Linear layers: computed by the faster of two libraries, and reduced to some of their rows or columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mapreuse.maps import are_unobserved, is_clearly_faster

_MIN_ROWS = 32
"""Rows of input from which oneDNN is used. Its setup takes about as long as a product of 32 rows."""

_SIZE = 512
"""Width of the square matrices that the two libraries are compared with."""


class OptimizedLinear(nn.Linear):
    """`torch.nn.Linear`, computed by oneDNN when that is faster than PyTorch's default library."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return linear(input, self.weight, self.bias)


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


class OptimizedHeadSubsetLinear(HeadSubsetLinear, OptimizedLinear):
    """`HeadSubsetLinear`, computed by oneDNN when that is faster."""


OPTIMIZED = {nn.Linear: OptimizedLinear, HeadSubsetLinear: OptimizedHeadSubsetLinear}
"""The class that `optimize` gives to a linear layer, by the class it has."""


def is_plain_linear(module: nn.Module | None) -> bool:
    """True for `torch.nn.Linear`, before or after `optimize`, and for GPT-2's `Conv1D`; False for subclasses."""
    return type(module) in (nn.Linear, OptimizedLinear, Conv1D)


def linear(
    input: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Tensor | None,
) -> Float[Tensor, "*batch outputs"]:
    """x Wᵀ + b, by oneDNN if a benchmark finds that faster: on a CPU, in float32, without gradients, for 32 rows or
    more, and only while no compiler, tracer or dispatch mode follows the operators."""
    if (
        are_unobserved(input, weight, *([] if bias is None else [bias]))
        and input.dim() > 1
        and input.numel() >= _MIN_ROWS * input.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and onednn_is_faster(torch.get_num_threads())
    ):
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return functional.linear(input, weight, bias)


@cache
def onednn_is_faster(threads: int) -> bool:
    """Whether oneDNN multiplies float32 matrices clearly faster with this number of threads; measured once."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    with torch.inference_mode():
        one = torch.ones(_SIZE, _SIZE, dtype=torch.float32, device="cpu")
        return is_clearly_faster(
            lambda: torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], ""),
            lambda: functional.linear(one, one),
        )


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
