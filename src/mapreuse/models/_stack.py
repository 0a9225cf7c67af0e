"""Finds the stack of layers that a plan speaks of, and each layer's self-attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from mapreuse.models._reading import Unsupported


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        layer: the layer module.
        path: path of its self-attention inside the layer.
        attention: its self-attention module.
    """

    layer: nn.Module
    path: str
    attention: nn.Module

    @property
    def parent(self) -> nn.Module:
        """The module that holds the attention module."""
        return self.layer.get_submodule(self.path.rpartition(".")[0])


@dataclass(frozen=True)
class Stack:
    """A module that runs a list of layers one after the other.

    Attributes:
        path: path of that module inside the model ("" for the model itself).
        module: the module.
        layers: its layers, in order.
    """

    path: str
    module: nn.Module
    layers: tuple[Layer, ...]


def find_stack(model: nn.Module) -> Stack:
    """The one stack of attention layers in `model`. Raises `Unsupported` where there is none, or more than one."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_attentions(layer) for layer in module)
    ]
    # A list inside a layer of another list is a stack; the outer one is its stages.
    innermost = [(name, layers) for name, layers in lists if not any(n.startswith(f"{name}.") for n, _ in lists)]
    if len(innermost) != 1:
        paths = ", ".join(repr(name.rpartition(".")[0] or "the model itself") for name, _ in innermost)
        name = type(model).__name__
        if not innermost:
            raise Unsupported(f"{name} holds no list of layers with attention in every layer")
        raise Unsupported(f"{name} holds several stacks of layers: {paths}; pass the module that holds one of them")
    name, layers = innermost[0]
    path = name.rpartition(".")[0]
    stack = Stack(path, model.get_submodule(path), tuple(_layer(layer, i) for i, layer in enumerate(layers)))
    _check_arguments_travel(stack)
    return stack


def _attentions(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost modules of a layer that are attention by name, cross-attention left out."""
    named = [
        (path, module)
        for path, module in layer.named_modules()
        if "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())
    ]
    return [
        (path, module)
        for path, module in named
        if not any(other.startswith(f"{path}." if path else "") and other != path for other, _ in named)
        and not _is_cross(path, module)
    ]


def _is_cross(path: str, module: nn.Module) -> bool:
    words = f"{path} {type(module).__name__}".lower()
    return "cross" in words or "encoder_attn" in words or bool(getattr(module, "is_cross_attention", False))


def _layer(layer: nn.Module, index: int) -> Layer:
    found = _attentions(layer)
    if len(found) != 1:
        paths = ", ".join(path for path, _ in found)
        raise Unsupported(
            f"layer {index} ({type(layer).__name__}) holds {len(found)} self-attentions ({paths}), not one"
        )
    return Layer(layer, *found[0])


def _check_arguments_travel(stack: Stack) -> None:
    """The maps travel as a keyword argument from the stack through every module around an attention."""
    modules = [stack.module]
    for layer in stack.layers:
        names = layer.path.split(".")
        modules += [layer.layer.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    for cls in dict.fromkeys(type(module) for module in modules):
        forward = inspect.unwrap(cls.forward)
        kwargs = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.VAR_KEYWORD]
        if not kwargs or inspect.getsource(forward).count(f"**{kwargs[0]}") < 2:
            raise Unsupported(
                f"{cls.__name__}: its forward does not pass **kwargs on, so no map can travel through it"
            )
