"""What a model makes of a batch, layer by layer: attention maps, the values they meet, hidden states, padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import SharedMaps
from mapreuse.models._apply import applied_to, apply
from mapreuse.models._copying import copy_with_same_weights
from mapreuse.models._layout import LayerLayout
from mapreuse.models._optimize import optimize
from mapreuse.models._projections import value_projection
from mapreuse.models._sharing import ARGUMENT
from mapreuse.models._stack import Layer, find_stack
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
        model: a model that `apply` accepts; it is copied, but for its weights, and left as it is.
        under_plan: take a model to which a plan was applied as well. A reusing layer then shows the maps it applies,
            and heads come in the order that they have without the plan.

    Raises:
        ValueError: where `apply` would, or a plan is in force and `under_plan` does not allow for it.
    """

    def __init__(self, model: nn.Module, *, under_plan: bool = False) -> None:
        self._model = optimize(copy_with_same_weights(model)).eval()
        self.num_layers = len(find_stack(self._model).layers)
        if not (under_plan and applied_to(self._model)):
            apply(self._model, ReusePlan.full(self.num_layers))
        stack = find_stack(self._model)  # its attention modules may be others now
        # What hooks refer to must not refer to the model, or only a cycle's collection would free the copy.
        self._values: dict[int, Tensor] = {}
        self._maps: list[SharedMaps] = []
        self._layouts: list[LayerLayout] = []
        for index, layer in enumerate(stack.layers):
            attention: Any = layer.attention
            layout: LayerLayout = attention._layout
            attention._layout = replace(layout, published=layout.computing, releases=())
            self._layouts.append(attention._layout)
            attention.register_forward_pre_hook(_project(self._values, index, layer), with_kwargs=True)
        stack.module.register_forward_hook(_keep(self._maps), with_kwargs=True)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Recording:
        """What the model's attention makes of a batch."""
        with recorded_states(self._model) as (states, masks):
            self._model(**batch)
        maps = [self._map(layer) for layer in range(self.num_layers)]
        values = [
            _in_order(self._values.pop(layer), layout.value_order) for layer, layout in enumerate(self._layouts)
        ]
        self._maps.clear()
        return Recording(maps, not_padding(masks[0], states[-1]), values)

    def _map(self, layer: int) -> Tensor:
        """The map in effect in a layer: of heads that compute, then of those that reuse, put back in order."""
        layout = self._layouts[layer]
        weights = [self._dense(layer)] if layout.computing else []
        for source, pairs in layout.parts:
            weights.append(self._dense(source)[:, [head for head, _ in pairs]])
        return _in_order(weights[0] if len(weights) == 1 else torch.cat(weights, 1), layout.order)

    def _dense(self, layer: int) -> Tensor:
        attention_map = self._maps[0].read(layer)
        assert attention_map is not None
        return attention_map.dense()


def _keep(maps: list[SharedMaps]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        maps[:] = [kwargs[ARGUMENT]]

    return hook


def _project(values: dict[int, Tensor], index: int, layer: Layer) -> Callable:
    projection = value_projection(layer)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        batch_first = getattr(module, "batch_first", True)  # of torch's own attention
        values[index] = projection(hidden_states if batch_first else hidden_states.transpose(0, 1))

    return hook


def check_batch(batch: object) -> None:
    """Raises `ValueError` for what is no batch, such as one of its tensors."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            "batches are dictionaries of a model's arguments, such as [{'input_ids': …}]: got one that is a "
            f"{type(batch).__name__}"
        )


@contextmanager
def recorded_states(model: nn.Module) -> Iterator[tuple[list[Tensor], list[object]]]:
    """Hidden states after every layer of a pass, and the attention mask that the first was given.

    Of a `torch.nn.TransformerEncoder`, the mask is the one of its keys, as it reaches the layers: of numbers.
    """
    states: list[Tensor] = []
    masks: list[object] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        masks.append(given.get("attention_mask", given.get("src_key_padding_mask")))

    stack = find_stack(model)
    batch_first = getattr(stack.layers[0].attention, "batch_first", True)  # of torch's own attention

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        states.append(found if batch_first else found.transpose(0, 1))

    layers = [layer.layer for layer in stack.layers]
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield states, masks
    finally:
        for handle in handles:
            handle.remove()


def not_padding(mask: object, states: Float[Tensor, "batch positions width"]) -> Bool[Tensor, "batch positions"]:
    """Positions that may attend themselves; all of them where there is no mask.

    Raises `ValueError` for a mask that is no tensor.
    """
    batch, positions, _ = states.shape
    if mask is None:
        return torch.ones(batch, positions, dtype=torch.bool, device=states.device)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"which positions are padding cannot be read from a {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1) if mask.shape[-2] > 1 else mask[:, 0, 0]
    allowed = mask if mask.dtype == torch.bool else (mask > -1 if mask.is_floating_point() else mask > 0)
    return allowed.expand(batch, positions)


def _in_order(heads: Tensor, order: tuple[int, ...]) -> Tensor:
    """(batch, heads, …) in the order of their numbers."""
    return heads if order == tuple(sorted(order)) else heads[:, [order.index(head) for head in sorted(order)]]
