"""`optimize`: convolutions and linear layers in the form that a CPU computes fastest."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, channels_last, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from mapreuse.maps import is_clearly_faster, needs_plain_operators
from mapreuse.models._snapshots import Model
from mapreuse.models._stack import check_model

_MIN_ROWS = 32
"""Rows of input from which oneDNN is used. Its setup takes about as long as a product of 32 rows."""

_SIZE = 512
"""Width of the square matrices that the two libraries are compared with."""

_CONFORMER = ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")


def optimize(model: Model) -> Model:
    """Make linear layers and convolutions of `model` faster on a CPU, in place; returns the model.

    Linear layers use oneDNN if a benchmark of a few milliseconds finds it faster than PyTorch's default library. The
    convolutions of Conformer layers, and of Parakeet's subsampling, use the channels-last memory format. Types of
    modules, weights, parameter names and results (up to rounding) stay the same, so that other tools (quantisation,
    LoRA, pruning) find the layers that they look for. This affects inference in float32 on a CPU; in training, under
    `torch.compile` and on other devices the modules run as before.

    `copy.deepcopy` and pickling keep the faster forward. Shallow copies of modules (`copy.copy`, the replicas of
    `torch.nn.DataParallel`) run the usual one, and `torch.jit.script` takes the faster one off; call `optimize` on
    them.

    Sharing maps (`apply`) is independent of this: call either, or both, in any order. `load` returns a model without
    it.

    Args:
        model: any module; calling it twice changes nothing.
    """
    check_model(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            _optimize_module(module)
        children: list[Any] = [module._modules.get(name) for name in _CONFORMER]
        if all(type(child) is nn.Conv1d and _is_plain(child) for child in children):
            for child in children:
                _optimize_module(child)
        if type(module).__name__ == "ParakeetEncoderSubsamplingConv2D":
            for child in module.modules():
                if type(child) is nn.Conv2d:
                    _optimize_module(child)
    return model


def is_optimized(module: nn.Module) -> bool:
    """Whether `optimize` gave this module a faster forward."""
    return isinstance(getattr(vars(module).get("forward"), "__self__", None), OptimizedModule)


@contextmanager
def optimized(model: nn.Module) -> Iterator[None]:
    """Run `optimize` on a model, and undo it at the end."""
    before = {module for module in model.modules() if is_optimized(module)}
    optimize(model)
    try:
        yield
    finally:
        for module in model.modules():
            if is_optimized(module) and module not in before:
                vars(module)["forward"].__self__.remove()


def _optimize_module(module: nn.Module) -> None:
    if "forward" not in vars(module):  # another tool may have replaced it
        OptimizedModule(module)


class OptimizedModule:
    """The owner of a faster `forward`, which is stored on the module itself, so that the module keeps its class.

    It refers to the module weakly: otherwise, only the garbage collector would free the module. The other methods on
    the module keep the owner out of copies that have other weights.
    """

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        vars(module).update({name: getattr(self, method) for name, method in _METHODS.items()})

    def remove(self) -> Any:
        """Give the module the forward of its class again; returns the module."""
        module: Any = self._module()
        for name in vars(module).keys() - self.state().keys():
            del vars(module)[name]
        return module

    def state(self) -> _State:
        """The state of the module without what belongs to this owner."""
        module: Any = self._module()
        state = {name: one for name, one in vars(module).items() if getattr(one, "__self__", None) is not self}
        return _State(module, state)

    def replicate(self) -> nn.Module:
        """A replica of the module for `torch.nn.DataParallel`."""
        module: Any = self._module()
        replica = type(module)._replicate_for_data_parallel(module)
        for name in vars(module).keys() - self.state().keys():
            del vars(replica)[name]
        return replica

    def forward(self, input: Tensor) -> Tensor:
        """The faster forward, or that of the module's class if other code must see PyTorch's own operators."""
        module: Any = self._module()
        weight, bias = module.weight, module.bias
        if _can_be_faster(input, weight, *(() if bias is None else (bias,))):
            faster = _FASTER.get(type(module).forward)  # none if another tool has changed the class
            if faster is not None:
                return faster(module, input, weight, bias)
        return type(module).forward(module, input)


class _State(dict[str, Any]):
    """The state of an optimized module. A deep or unpickled copy is optimized; a shallow one gets this as it is."""

    def __init__(self, module: nn.Module, state: dict[str, Any]) -> None:
        super().__init__(state)
        self._module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return _optimize_copy, (self._module, dict(self))


def _optimize_copy(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Optimize a copy that has no state yet; returns the state."""
    _optimize_module(module)
    return state


def _can_be_faster(*tensors: Tensor) -> bool:
    """Whether this is inference in float32 on a CPU, which nothing records or compiles."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not needs_plain_operators(*tensors)
        and all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)
        and all(one.layout == torch.strided and not one.is_nested for one in tensors)
    )


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(input: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(input) * weight[0]


def _linear(
    module: nn.Module,
    input: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "*batch outputs"]:
    """x Wᵀ + b, by oneDNN for 32 rows or more if a benchmark finds that faster."""
    if (
        input.dim() > 1
        and input.numel() >= _MIN_ROWS * input.shape[-1] > 0
        and torch._C._get_mkldnn_enabled()
        and onednn_is_faster(torch.get_num_threads())
    ):
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return functional.linear(input, weight, bias)


def _conv1d(
    module: nn.Conv1d,
    input: Float[Tensor, "*batch channels time"],
    weight: Float[Tensor, "out_channels in_channels kernel"],
    bias: Float[Tensor, " out_channels"] | None,
) -> Float[Tensor, "*batch out_channels out_time"]:
    """A pointwise or depthwise convolution in memory order (batch, time, channels).

    PyTorch computes a depthwise convolution over (batch, channels, time) row by row, which is several times slower.
    Attention and feed-forward layers use the order (batch, time, channels) too, so nothing has to be transposed.
    """
    if input.dim() != 3:
        return nn.Conv1d.forward(module, input)
    if module.groups == 1 and module.kernel_size == (1,):
        return _linear(module, input.transpose(1, 2), weight.squeeze(2), bias).transpose(1, 2)
    return functional.conv2d(
        input.unsqueeze(2).contiguous(memory_format=channels_last),
        weight.unsqueeze(2).contiguous(memory_format=channels_last),
        bias,
        padding=module.padding if isinstance(module.padding, str) else (0, *module.padding),
        groups=module.groups,
    ).squeeze(2)


def _conv2d(
    module: nn.Conv2d,
    input: Float[Tensor, "*batch channels time bins"],
    weight: Float[Tensor, "out_channels in_channels height width"],
    bias: Float[Tensor, " out_channels"] | None,
) -> Float[Tensor, "*batch out_channels out_time out_bins"]:
    """A convolution in memory order (batch, time, bins, channels)."""
    if input.dim() != 4:
        return nn.Conv2d.forward(module, input)
    return module._conv_forward(
        input.contiguous(memory_format=channels_last), weight.contiguous(memory_format=channels_last), bias
    )


_METHODS = {
    "forward": "forward",
    "__getstate__": "state",
    "_replicate_for_data_parallel": "replicate",
    "__prepare_scriptable__": "remove",
}
"""Attributes of an optimized module, and the methods of its owner that they hold."""

_FASTER: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _conv1d,
    nn.Conv2d.forward: _conv2d,
}
"""What `optimize` computes instead of a class's forward."""


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
