"""Linear layers by the faster of two libraries.

PyTorch multiplies float32 matrices by MKL, which on some processors takes twice as long as oneDNN, the other library
that comes with it.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.maps import are_unobserved, is_clearly_faster

_FEWEST_ROWS = 32
"""Rows of input from which oneDNN is tried; setting it up takes as long as fewer of them."""

_SIZE = 512
"""Of the square product by which the two are compared."""


class FastLinear(nn.Linear):
    """`torch.nn.Linear`: the same sums, by `linear`."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return linear(input, self.weight, self.bias)


def linear(
    input: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Tensor | None,
) -> Float[Tensor, "*batch outputs"]:
    """x Wᵀ + b, by oneDNN where its products are measured to be faster: on a CPU, in float32, of 32 rows and more,
    where no gradient is needed and nothing follows the operators."""
    if (
        are_unobserved(input, weight, *([] if bias is None else [bias]))
        and input.dim() > 1
        and input.numel() >= _FEWEST_ROWS * input.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and onednn_is_faster(torch.get_num_threads())
    ):
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return functional.linear(input, weight, bias)


@cache
def onednn_is_faster(threads: int) -> bool:
    """Whether oneDNN multiplies float32 matrices in clearly less time, with so many threads; measured once."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    with torch.inference_mode():
        one = torch.ones(_SIZE, _SIZE, dtype=torch.float32, device="cpu")
        return is_clearly_faster(
            lambda: torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], ""),
            lambda: functional.linear(one, one),
        )


def speed_up_linear_layers(model: nn.Module) -> None:
    """Have the linear layers of a model run by `linear`, in place; weights and parameters' names stay the same.

    What looks for `type(module) is nn.Linear` does not find them any more, such as
    `torch.ao.quantization.quantize_dynamic`; what looks for instances, such as torchao's `quantize_`, does.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
