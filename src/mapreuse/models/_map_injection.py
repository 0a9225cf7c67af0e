"""Gives maps to modules that do not pass keyword arguments on, by copies of them made for each call."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from mapreuse.maps import SharedMaps
from mapreuse.models._runtime import INJECTED_MAPS
from mapreuse.models._sharing_classes import sharing_class
from mapreuse.models._source import Unsupported

_Maps: TypeAlias = tuple[SharedMaps | None, SharedMaps | None]
"""The maps of self-attention, and those of cross-attention."""


class MapInjection(nn.Module):
    """A mixin for the class of a stack whose modules cannot pass maps on.

    Each call runs on shallow copies of the modules from the stack down to the attention modules. Only their
    dictionaries of children are their own. The copies of the attention modules hold the maps. The original forwards
    run unchanged on the model's own parameters and hooks, and as nothing is stored on the model, threads do not
    interfere. Compilers cannot follow copies: while they record a call, the attention modules themselves hold the
    maps.
    """

    def forward(
        self,
        *args: Any,
        attention_maps: SharedMaps | None = None,
        cross_attention_maps: SharedMaps | None = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(args, torch.fx.Proxy) or any(isinstance(one, torch.fx.Proxy) for one in args):
            raise Unsupported(
                f"torch.fx.symbolic_trace cannot follow {type(self).__name__} while it shares attention maps; use "
                "torch.export.export or make_fx"
            )
        maps = attention_maps, cross_attention_maps
        if not torch.compiler.is_compiling():
            return super(MapInjection, _copy_with_maps(self, maps)).forward(*args, **kwargs)
        sharing = [module for module in self.modules() if _is_converted(module)]
        for module in sharing:
            setattr(module, INJECTED_MAPS, _maps_of(module, maps))
        output = super().forward(*args, **kwargs)
        for module in sharing:
            setattr(module, INJECTED_MAPS, None)
        return output


def inject_maps(module: Any) -> None:
    """Make a stack pass maps to its attention modules."""
    if not isinstance(module, MapInjection):
        module.__class__ = sharing_class(MapInjection, type(module))  # type: ignore[arg-type]


def _is_converted(module: nn.Module) -> bool:
    """Whether a module is an attention under a plan. Some of those that compute keep their original class."""
    return "_layout" in vars(module)


def _maps_of(attention: Any, maps: _Maps) -> SharedMaps | None:
    return maps[attention._form.states is not None]


def _copy_with_maps(module: nn.Module, maps: _Maps) -> Any:
    """A copy of a module that shares maps, or holds one that does; the module itself otherwise."""
    children = {name: child and _copy_with_maps(child, maps) for name, child in module._modules.items()}
    shares = _is_converted(module)
    if not shares and all(children[name] is child for name, child in module._modules.items()):
        return module
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__, _modules=children)
    if shares:
        copied.__dict__[INJECTED_MAPS] = _maps_of(module, maps)
    return copied
