"""How maps travel through modules that pass no keyword arguments on: borne by copies made for one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mapreuse.maps import SharedMaps
from mapreuse.models._sharing import BORNE, sharing_class
from mapreuse.models._source import Unsupported

_Paths = dict[str, Any]
"""A tree of names: {"layers": {"0": {"self_attn": {}}}}."""


class MapInjection(nn.Module):
    """Mixed into the class of a stack whose modules have no way of handing maps on.

    The forward of every call runs on copies of the modules from the stack down to each attention, which share all
    but the dictionary of their children with the originals: the copies of the attention modules hold the maps. So
    the original forwards run as they are written, parameters and hooks are the model's own, and nothing is left on
    it that two threads could confuse. `torch.compile` leaves the stack as it is, and refuses where it is to compile
    whole (`fullgraph=True`); `torch.export` is refused.
    """

    _paths: _Paths

    def forward(self, *args: Any, attention_maps: SharedMaps | None = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise Unsupported(
                f"{type(self).__name__}: its modules pass no keyword arguments on, so maps are handed to them in a "
                "way that torch.compile and torch.export cannot follow; run it as it is"
            )
        bearer: Any = _bearer(self, self._paths, attention_maps)
        return super(MapInjection, bearer).forward(*args, **kwargs)


def inject_maps(stack: Any, paths: Iterable[str]) -> None:
    """Make a stack bear maps to the attention modules at these paths inside it."""
    tree: _Paths = {}
    for path in paths:
        branch = tree
        for name in path.split("."):
            branch = branch.setdefault(name, {})
    stack._paths = tree
    stack.__class__ = sharing_class(MapInjection, type(stack))  # type: ignore[arg-type]


def _bearer(module: nn.Module, paths: _Paths, maps: SharedMaps | None) -> nn.Module:
    bearer = object.__new__(type(module))
    bearer.__dict__.update(module.__dict__)
    if paths:
        borne = {name: _bearer(module.get_submodule(name), inner, maps) for name, inner in paths.items()}
        bearer.__dict__["_modules"] = module._modules | borne
    else:
        bearer.__dict__[BORNE] = maps
    return bearer
