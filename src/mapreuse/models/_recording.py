"""Records what a model computes for a batch, layer by layer: attention maps, values, hidden states, padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import SharedMaps
from mapreuse.models._apply import apply, plan_of
from mapreuse.models._layout import LayerLayout
from mapreuse.models._optimize import optimize
from mapreuse.models._projections import ValueProjection, value_projection
from mapreuse.models._runtime import CROSS_MAPS_ARGUMENT, MAPS_ARGUMENT, batch_first, inputs_of
from mapreuse.models._snapshots import copy_with_same_weights
from mapreuse.models._stack import check_model, find_stack
from mapreuse.plan import ReusePlan


class Recording(NamedTuple):
    """The attention of a model for one batch.

    Attributes:
        maps: the map of each layer.
        valid: True for positions that are not padding, i.e. that may attend to themselves.
        values: the values of each layer.
    """

    maps: list[Float[Tensor, "batch heads positions keys"]]
    valid: Bool[Tensor, "batch positions"]
    values: list[Float[Tensor, "batch value_heads keys head_dim"]]


class MapRecorder:
    """Runs an optimized copy of a model, and returns the attention map and the values of each layer of its stack.

    Args:
        model: a model that `apply` supports. It is unchanged; the copy shares its weights.
        under_plan: allow a model with a plan in force. Reusing layers then show the maps that they apply.
        attention: "self", or "cross" for the maps of a decoder over the states of an encoder.

    Raises:
        ValueError: if the model cannot share maps, or has a plan and `under_plan` is False.
    """

    def __init__(self, model: nn.Module, *, under_plan: bool = False, attention: str = "self") -> None:
        check_model(model)
        self._model = optimize(copy_with_same_weights(model)).eval()
        self._attention = attention
        self.num_layers = len(find_stack(self._model, attention).layers)
        if not (under_plan and plan_of(self._model, attention)):
            apply(self._model, ReusePlan.full(self.num_layers), attention=attention)
        stack = find_stack(self._model, attention)  # `apply` may have replaced its attention modules
        self._values: dict[int, Tensor] = {}
        self._layouts: list[LayerLayout] = []
        self._maps: list[SharedMaps] = []
        maps = self._maps  # hooks must not refer to the model: only the garbage collector would free the copy
        for index, layer in enumerate(stack.layers):
            module: Any = layer.attention
            layout: LayerLayout = module._layout
            publishes = bool(layout.computing) or layout.rank is not None
            module._layout = replace(layout, publishes=publishes, releases=())
            self._layouts.append(module._layout)
            record = partial(_record_values, self._values, index, value_projection(layer))
            module.register_forward_pre_hook(record, with_kwargs=True)
        argument = CROSS_MAPS_ARGUMENT if attention == "cross" else MAPS_ARGUMENT
        stack.module.register_forward_hook(
            lambda module, args, kwargs, output: maps.append(kwargs[argument]), with_kwargs=True
        )

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Recording:
        """Run the model on a batch of its arguments."""
        with recorded_states(self._model, self._attention) as (states, masks):
            self._model(**batch)
        maps = [self._map(layer) for layer in range(self.num_layers)]
        values = [self._values.pop(layer) for layer in range(self.num_layers)]
        self._maps.clear()
        return Recording(maps, not_padding(masks[0], states[-1]), values)

    def _map(self, layer: int) -> Tensor:
        """The map in effect in a layer."""
        layout = self._layouts[layer]
        if layout.rank is not None:
            return self._dense(layer)
        weights = [self._dense(layer)] if layout.computing else []
        for source, pairs in layout.parts:
            weights.append(self._dense(source)[:, [head for head, _ in pairs]])
        return layout.in_order(weights, 1)

    def _dense(self, layer: int) -> Tensor:
        return self._maps[-1].read(layer).dense()


def _record_values(
    values: dict[int, Tensor],
    index: int,
    projection: ValueProjection,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    values[index] = projection(inputs_of(module, args, kwargs))


def check_batch(batch: object) -> None:
    """Raise `ValueError` for anything but a mapping that holds a tensor."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            "a batch must be a dictionary of the model's arguments, such as {'input_ids': …}, got a "
            f"{type(batch).__name__}; batches are a list of such dictionaries"
        )
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise ValueError(
            f"a batch must hold a tensor, got the keys {list(batch)} without one; tokenizers and feature extractors "
            "return tensors with return_tensors='pt'"
        )


@contextmanager
def recorded_states(model: nn.Module, attention: str = "self") -> Iterator[tuple[list[Tensor], list[object]]]:
    """Record the hidden states after each layer of a forward pass, and the attention mask of the first layer.

    For a `torch.nn.TransformerEncoder`, the mask is the additive mask of its keys.
    """
    states: list[Tensor] = []
    masks: list[object] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        masks.append(given.get("attention_mask", given.get("src_key_padding_mask")))

    stack = find_stack(model, attention)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(batch_first(stack.layers[0].attention, output[0] if isinstance(output, tuple) else output))

    layers = [layer.layer for layer in stack.layers]
    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(before, with_kwargs=True))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(after))
        yield states, masks


def not_padding(mask: object, states: Float[Tensor, "batch positions width"]) -> Bool[Tensor, "batch positions"]:
    """True for positions that may attend to themselves; all positions if there is no mask.

    Raises:
        ValueError: if the mask is not a tensor.
    """
    batch, positions, _ = states.shape
    if mask is None:
        return torch.ones(batch, positions, dtype=torch.bool, device=states.device)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"padding cannot be read from an attention mask of type {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1) if mask.shape[-2] > 1 else mask[:, 0, 0]
    allowed = mask if mask.dtype == torch.bool else (mask > -1 if mask.is_floating_point() else mask > 0)
    return allowed.expand(batch, positions)
