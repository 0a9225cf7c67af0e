"""Convolutions of a Conformer with their channels adjacent in memory, as a CPU computes them fastest.

PyTorch computes a depthwise convolution over (batch, channels, time) row by row, several times as slowly as one whose
channels are adjacent. Attention and feed-forward keep them adjacent anyway, so that nothing needs to be transposed.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, channels_last, compiler, float32, is_grad_enabled, nn
from torch.nn import functional

from mapreuse.models._linear import linear

_CONFORMER = ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")


class ChannelsLastConv1d(nn.Conv1d):
    """`torch.nn.Conv1d`, pointwise or depthwise: the same sums, over memory in the order (batch, time, channels)."""

    def forward(self, input: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out_channels out_time"]:
        if input.dim() != 3 or not _is_faster(input, self.weight):
            return super().forward(input)
        if self.groups == 1 and self.kernel_size == (1,):
            return linear(input.transpose(1, 2), self.weight.squeeze(2), self.bias).transpose(1, 2)
        return functional.conv2d(
            input.unsqueeze(2).contiguous(memory_format=channels_last),
            self.weight.unsqueeze(2).contiguous(memory_format=channels_last),
            self.bias,
            padding=self.padding if isinstance(self.padding, str) else (0, *self.padding),
            groups=self.groups,
        ).squeeze(2)


class ChannelsLastConv2d(nn.Conv2d):
    """`torch.nn.Conv2d`: the same sums, over memory in the order (batch, time, bins, channels)."""

    def forward(
        self, input: Float[Tensor, "batch channels time bins"]
    ) -> Float[Tensor, "batch out_channels out_time out_bins"]:
        if input.dim() != 4 or not _is_faster(input, self.weight):
            return super().forward(input)
        weight = self.weight.contiguous(memory_format=channels_last)
        return self._conv_forward(input.contiguous(memory_format=channels_last), weight, self.bias)


def lay_out_convolutions(model: nn.Module) -> None:
    """Have the convolutions of Conformer layers, and of Parakeet's subsampling, run with channels adjacent, in place.

    Weights, parameters' names and results (but for rounding) stay the same. It is done where it was found faster: on
    a CPU, in float32, where no gradient is needed and nothing is compiled.
    """
    for module in model.modules():
        children = [module._modules.get(name) for name in _CONFORMER]
        if all(type(child) is nn.Conv1d and _is_plain(child) for child in children):
            for child in children:
                child.__class__ = ChannelsLastConv1d
        if type(module).__name__ == "ParakeetEncoderSubsamplingConv2D":
            for child in module.modules():
                if type(child) is nn.Conv2d:
                    child.__class__ = ChannelsLastConv2d


def _is_plain(convolution: nn.Conv1d) -> bool:
    """Pointwise, or depthwise with every channel's own kernel; no strides, no gaps, zeros around the input."""
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    pointwise = convolution.kernel_size == (1,) and convolution.groups == 1
    return (
        (depthwise or pointwise)
        and convolution.stride == convolution.dilation == (1,)
        and convolution.padding_mode == "zeros"
        and (depthwise or convolution.padding in ((0,), "valid"))
    )


def _is_faster(input: Tensor, weight: Tensor) -> bool:
    if compiler.is_compiling():
        return False  # the compiler lays out what it compiles itself
    needs_gradient = is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return input.device.type == "cpu" and input.dtype == float32 and not needs_gradient
