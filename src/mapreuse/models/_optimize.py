"""`optimize`: convolutions and linear layers in the form that a CPU computes fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, channels_last, compiler, float32, is_grad_enabled, nn
from torch.nn import functional

from mapreuse.models._linear import OPTIMIZED, linear
from mapreuse.models._snapshots import Model

_CONFORMER = ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")


def optimize(model: Model) -> Model:
    """Make linear layers and convolutions of `model` faster on a CPU, in place; returns the model.

    Linear layers use oneDNN if a benchmark of a few milliseconds finds it faster than PyTorch's default library. The
    convolutions of Conformer layers, and of Parakeet's subsampling, use the channels-last memory format. Weights,
    parameter names and results (up to rounding) stay the same. Modules get a subclass of their class, so `isinstance`
    still finds them; `type(module) is torch.nn.Linear` does not. This affects inference in float32 on a CPU; in
    training, under `torch.compile` and on other devices the modules run as before.

    Sharing maps (`apply`) is independent of this: call either, or both, in any order. `load` returns a model without
    it.

    Args:
        model: any module; calling it twice changes nothing.
    """
    for module in model.modules():
        if (optimized_class := OPTIMIZED.get(type(module))) is not None:
            module.__class__ = optimized_class
        children = [module._modules.get(name) for name in _CONFORMER]
        if all(type(child) is nn.Conv1d and _is_plain(child) for child in children):
            for child in children:
                child.__class__ = ChannelsLastConv1d
        if type(module).__name__ == "ParakeetEncoderSubsamplingConv2D":
            for child in module.modules():
                if type(child) is nn.Conv2d:
                    child.__class__ = ChannelsLastConv2d
    return model


@contextmanager
def optimized(model: nn.Module) -> Iterator[None]:
    """Run `optimize` on a model, and undo it at the end."""
    classes = {module: module.__class__ for module in model.modules()}
    optimize(model)
    try:
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


class ChannelsLastConv1d(nn.Conv1d):
    """`torch.nn.Conv1d`, pointwise or depthwise, in memory order (batch, time, channels).

    PyTorch computes a depthwise convolution over (batch, channels, time) row by row, which is several times slower.
    Attention and feed-forward layers use the order (batch, time, channels) too, so nothing has to be transposed.
    """

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
    """`torch.nn.Conv2d` in memory order (batch, time, bins, channels)."""

    def forward(
        self, input: Float[Tensor, "batch channels time bins"]
    ) -> Float[Tensor, "batch out_channels out_time out_bins"]:
        if input.dim() != 4 or not _is_faster(input, self.weight):
            return super().forward(input)
        weight = self.weight.contiguous(memory_format=channels_last)
        return self._conv_forward(input.contiguous(memory_format=channels_last), weight, self.bias)


def _is_plain(convolution: nn.Conv1d) -> bool:
    """Pointwise, or depthwise with one kernel for each channel; stride 1, no dilation, zero padding."""
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
        return False  # the compiler chooses layouts itself
    needs_gradient = is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return input.device.type == "cpu" and input.dtype == float32 and not needs_gradient
