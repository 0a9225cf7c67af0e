"""Gives maps to modules that do not pass keyword arguments on, by copies of them made for each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mapreuse.maps import SharedMaps
from mapreuse.models._runtime import INJECTED_MAPS
from mapreuse.models._sharing_classes import sharing_class
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Stack

_Paths = dict[str, Any]
"""A tree of names: {"layers": {"0": {"self_attn": {}}}}."""


class MapInjection(nn.Module):
    """A mixin for the class of a stack whose modules cannot pass maps on.

    Each call runs on shallow copies of the modules from the stack down to the attention modules. Only their
    dictionaries of children are their own. The copies of the attention modules hold the maps. The original forwards
    run unchanged on the model's own parameters and hooks, and as nothing is stored on the model, threads do not
    interfere. `torch.compile` skips such a stack and refuses it under `fullgraph=True`; `torch.export` refuses it.
    """

    _paths: _Paths

    def forward(self, *args: Any, attention_maps: SharedMaps | None = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise Unsupported(
                f"{type(self).__name__}: its modules pass no keyword arguments on, and torch.compile and "
                "torch.export cannot follow how they receive attention maps; run it without compilation"
            )
        copied: Any = _copy_with_maps(self, self._paths, attention_maps)
        return super(MapInjection, copied).forward(*args, **kwargs)


def inject_maps(stack: Stack) -> None:
    """Make a stack pass maps to its attention modules."""
    module: Any = stack.module
    module._paths = {}
    for index, layer in zip(module.get_submodule(stack.list_name)._modules, stack.layers, strict=True):
        branch = module._paths
        for name in filter(None, f"{stack.list_name}.{index}.{layer.path}".split(".")):
            branch = branch.setdefault(name, {})
    module.__class__ = sharing_class(MapInjection, type(module))  # type: ignore[arg-type]


def _copy_with_maps(module: nn.Module, paths: _Paths, maps: SharedMaps | None) -> nn.Module:
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    if paths:
        children = {name: _copy_with_maps(module.get_submodule(name), rest, maps) for name, rest in paths.items()}
        copied.__dict__["_modules"] = module._modules | children
    else:
        copied.__dict__[INJECTED_MAPS] = maps
    return copied
