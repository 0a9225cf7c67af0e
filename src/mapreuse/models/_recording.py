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
from mapreuse.models._apply import applied_to, apply
from mapreuse.models._layout import LayerLayout
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
        under_plan: take a model to which a plan was applied as well. A reusing layer then shows the maps it applies,
            and heads come in the order that they have without the plan.

    Raises:
        ValueError: where `apply` would, or a plan is in force and `under_plan` does not allow for it.
    """

    def __init__(self, model: nn.Module, *, under_plan: bool = False) -> None:
        self._model = copy.deepcopy(model).eval()
        self.num_layers = len(find_stack(self._model).layers)
        if not (under_plan and applied_to(self._model)):
            apply(self._model, ReusePlan.full(self.num_layers))
        stack = find_stack(self._model)  # its attention modules may be others now
        self._values: dict[int, Tensor] = {}
        self._layouts: list[LayerLayout] = []
        for index, layer in enumerate(stack.layers):
            attention: Any = layer.attention
            layout: LayerLayout = attention._layout
            attention._layout = replace(layout, handed_on=layout.computing, releases=())
            self._layouts.append(attention._layout)
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
        values = [
            _in_order(self._values.pop(layer), layout.value_order) for layer, layout in enumerate(self._layouts)
        ]
        self._maps = None
        diagonals = torch.stack([weights.diagonal(dim1=-2, dim2=-1).amax(1) for weights in maps])
        return Recording(maps, diagonals.amax(0) != 0, values)

    def _map(self, layer: int) -> Tensor:
        """The map in effect in a layer: of heads that compute, then of those that reuse, put back in order."""
        layout = self._layouts[layer]
        weights = [self._dense(layer)] if layout.computing else []
        for source, pairs in layout.parts:
            weights.append(self._dense(source)[:, [head for head, _ in pairs]])
        return _in_order(weights[0] if len(weights) == 1 else torch.cat(weights, 1), layout.order)

    def _dense(self, layer: int) -> Tensor:
        assert self._maps is not None
        attention_map = self._maps.read(layer)
        assert attention_map is not None
        return attention_map.dense()


def _in_order(heads: Tensor, order: tuple[int, ...]) -> Tensor:
    """(batch, heads, …) in the order of their numbers."""
    return heads if order == tuple(sorted(order)) else heads[:, [order.index(head) for head in sorted(order)]]
