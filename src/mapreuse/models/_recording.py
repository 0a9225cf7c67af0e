"""The attention maps of a model, layer by layer, for analysis."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import SharedMaps
from mapreuse.models._apply import apply
from mapreuse.models._sharing import ARGUMENT
from mapreuse.models._stack import find_stack
from mapreuse.plan import ReusePlan


class MapRecorder:
    """Runs a copy of a model and returns the attention map of every layer of its stack.

    Args:
        model: a model that `apply` accepts; it is copied, and left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).eval()
        stack = find_stack(self._model)
        self.num_layers = len(stack.layers)
        apply(self._model, ReusePlan.full(self.num_layers))
        for layer in stack.layers:
            attention: Any = layer.attention
            attention._layout = replace(attention._layout, is_read=True)
        stack.module.register_forward_hook(self._keep, with_kwargs=True)
        self._maps: SharedMaps | None = None

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        self._maps = kwargs[ARGUMENT]

    @torch.no_grad()
    def __call__(
        self, batch: Mapping[str, Any]
    ) -> tuple[list[Float[Tensor, "batch heads positions positions"]], Bool[Tensor, "batch positions"]]:
        """The map of every layer, and which positions are not padding: those that may attend themselves."""
        self._model(**batch)
        assert self._maps is not None
        maps = [self._map(layer) for layer in range(self.num_layers)]
        self._maps = None
        diagonals = torch.stack([weights.diagonal(dim1=-2, dim2=-1).amax(1) for weights in maps])
        return maps, diagonals.amax(0) != 0

    def _map(self, layer: int) -> Tensor:
        assert self._maps is not None
        attention_map = self._maps.read(layer)
        assert attention_map is not None
        return attention_map.dense()
