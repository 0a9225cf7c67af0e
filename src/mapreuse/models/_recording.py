"""The attention maps of a model, and the values they meet, layer by layer, for analysis."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import SharedMaps
from mapreuse.models._apply import apply
from mapreuse.models._sharing import ARGUMENT
from mapreuse.models._stack import Layer, find_stack
from mapreuse.models._values import value_projection
from mapreuse.plan import ReusePlan


class Recording(NamedTuple):
    """One batch, as a model's attention sees it.

    Attributes:
        maps: the map of every layer.
        valid: which positions are not padding: those that may attend themselves.
        values: the values of every layer.
    """

    maps: list[Float[Tensor, "batch heads positions positions"]]
    valid: Bool[Tensor, "batch positions"]
    values: list[Float[Tensor, "batch value_heads positions head_dim"]]


class MapRecorder:
    """Runs a copy of a model and returns the attention map, and the values, of every layer of its stack.

    Args:
        model: a model that `apply` accepts; it is copied, and left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).eval()
        self.num_layers = len(find_stack(self._model).layers)
        apply(self._model, ReusePlan.full(self.num_layers))
        stack = find_stack(self._model)  # its attention modules may be others now
        self._values: dict[int, Tensor] = {}
        for index, layer in enumerate(stack.layers):
            attention: Any = layer.attention
            attention._layout = replace(attention._layout, is_read=True)
            attention.register_forward_pre_hook(self._project(index, layer), with_kwargs=True)
        stack.module.register_forward_hook(self._keep, with_kwargs=True)
        self._maps: SharedMaps | None = None

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        self._maps = kwargs[ARGUMENT]

    def _project(self, index: int, layer: Layer) -> Callable:
        projection = value_projection(layer)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            batch_first = getattr(module, "batch_first", True)  # of torch's own attention
            self._values[index] = projection(hidden_states if batch_first else hidden_states.transpose(0, 1))

        return hook

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Recording:
        """What the model's attention makes of a batch."""
        self._model(**batch)
        assert self._maps is not None
        maps = [self._map(layer) for layer in range(self.num_layers)]
        values = [self._values.pop(layer) for layer in range(self.num_layers)]
        self._maps = None
        diagonals = torch.stack([weights.diagonal(dim1=-2, dim2=-1).amax(1) for weights in maps])
        return Recording(maps, diagonals.amax(0) != 0, values)

    def _map(self, layer: int) -> Tensor:
        assert self._maps is not None
        attention_map = self._maps.read(layer)
        assert attention_map is not None
        return attention_map.dense()
