"""What a layer under a plan stores in a `Cache` of `transformers`, and which caches it takes.

A layer whose heads all compute, or that shares keys, stores keys and values, as without a plan. In share mode
"corrected", a layer stores its low-rank keys and its values in the same way. Another layer with heads that reuse
stores one tensor, the keys that it projects followed by its values, as heads of one tensor. It is stored in the place
of the keys, because `transformers` reads lengths there; the place of the values holds a tensor of width zero.
All methods of a cache (`update`, `reorder_cache`, `crop`, `reset`, …) then work unchanged, in each of its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)

from mapreuse.models._layout import LayerLayout
from mapreuse.models._reading import CACHES
from mapreuse.models._stack import find_stack
from mapreuse.plan import ReusePlan

_PLAN = "_map_reuse"
"""The attribute of a cache that holds the plan under which it was filled, if a layer stores it in our form."""


class CachedStates(NamedTuple):
    """The keys and values of all positions that a layer may attend to.

    Attributes:
        keys: the keys that the layer projects, or None if it projects none.
        values: the values.
    """

    keys: Float[Tensor, "batch key_heads key dim"] | None
    values: Float[Tensor, "batch value_heads key value_dim"]


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, or None."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def update_cache(
    attention: nn.Module,
    cache: Cache,
    keys: Float[Tensor, "batch key_heads new dim"] | None,
    values: Float[Tensor, "batch value_heads new value_dim"],
) -> CachedStates:
    """Store the keys and values of new positions in the cache; returns those of all positions.

    Args:
        attention: a self-attention module under a plan.
        cache: the cache of the call.
        keys: the new keys of the heads that compute, or the new low-rank keys; None if there are none.
        values: the new values of all heads.
    """
    layout: LayerLayout = attention._layout  # type: ignore[assignment]
    index: int = getattr(attention, attention._form.cache)  # type: ignore[union-attr, arg-type]
    cache = _of_self_attention(cache)
    if layout.parts:
        setattr(cache, _PLAN, layout.plan)
    if not layout.parts or layout.rank is not None:
        return CachedStates(*cache.update(keys, values, index))
    new = values if keys is None else torch.cat([keys, values], 1)
    stored, _ = cache.update(new, new.new_empty(*new.shape[:3], 0), index)
    num_keys = new.shape[1] - values.shape[1]
    return CachedStates(stored[:, :num_keys] if num_keys else None, stored[:, num_keys:])


def states_of_cache(model: nn.Module, cache: Cache) -> list[CachedStates]:
    """The keys and values that each layer of a decoder stored in a cache."""
    found = []
    for layer, stored in zip(find_stack(model).layers, cache.layers, strict=True):
        layout: LayerLayout | None = getattr(layer.attention, "_layout", None)
        keys, values = stored.keys, stored.values
        assert keys is not None
        assert values is not None
        if layout is None or not layout.parts:
            found.append(CachedStates(keys, values))
        else:
            num_keys = len(layout.key_heads)
            found.append(CachedStates(keys[:, :num_keys] if num_keys else None, keys[:, num_keys:]))
    return found


def cache_of_states(model: nn.Module, states: Sequence[CachedStates]) -> DynamicCache:
    """The cache in which each layer of a decoder stored these keys and values.

    Its layers store all positions, also those outside a sliding window.
    """
    cache = DynamicCache()
    for layer, (keys, values) in zip(find_stack(model).layers, states, strict=True):
        layout: LayerLayout | None = getattr(layer.attention, "_layout", None)
        if layout is not None and layout.parts:
            setattr(cache, _PLAN, layout.plan)
            keys = values if keys is None else torch.cat([keys, values], 1)
            values = keys.new_empty(*keys.shape[:3], 0)
        assert keys is not None
        stored = DynamicLayer()
        stored.lazy_initialization(keys, values)
        stored.keys, stored.values = keys, values
        cache.layers.append(stored)
    return cache


def values_of_encoder(
    attention: nn.Module, cache: EncoderDecoderCache, project: Callable[[Tensor], Tensor], states: Tensor
) -> Float[Tensor, "batch value_heads key value_dim"]:
    """The values of the encoder's states: from the cache, or else projected and stored there.

    Args:
        attention: a cross-attention module all of whose heads reuse.
        cache: the cache of the call.
        project: makes values from states.
        states: the states of the encoder.
    """
    index: int = getattr(attention, attention._form.cache)  # type: ignore[union-attr, arg-type]
    part = cache.cross_attention_cache
    if cache.is_updated.get(index):
        return part.layers[index].keys
    cache.is_updated[index] = True
    setattr(part, _PLAN, attention._layout.plan)  # type: ignore[union-attr]
    values = project(states)
    return part.update(values, values.new_empty(*values.shape[:3], 0), index)[0]


def check_cache(name: str, plan: ReusePlan, cache: object, *, cross: bool = False) -> None:
    """Raise `ValueError` unless the layers under `plan` can continue this cache. The message starts with `name`."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{name}: expected a cache of transformers, such as DynamicCache, got {type(cache).__name__}"
        )
    if cross and not isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"{name}: cross-attention needs an EncoderDecoderCache, got {type(cache).__name__}")
    part = cache.cross_attention_cache if cross else _of_self_attention(cache)
    filled = any(isinstance(layer, CacheLayerMixin) and _is_filled(layer) for layer in part.layers[:1])
    found = getattr(part, _PLAN, None)
    has_own_form = not {"map", "corrected"}.isdisjoint(map(plan.share_of, range(plan.num_layers)))
    if filled and found != (plan if has_own_form else None):
        filled_by = "without this plan (by the original model, say)" if found is None else "under another plan"
        raise ValueError(f"{name}: the cache was filled {filled_by}; start with a new cache")
    for layer in part.layers if has_own_form else ():
        if not isinstance(layer, DynamicLayer | StaticLayer) or isinstance(layer, BaseQuantizedLayer):
            raise ValueError(
                f"{name} shares attention maps and cannot use a cache with layers of {type(layer).__name__}; use "
                "DynamicCache or StaticCache"
            )


def _is_filled(layer: CacheLayerMixin) -> bool:
    return bool(layer.is_initialized and (layer.keys is None or layer.keys.numel() > 0))


def _of_self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class OneLayer:
    """Stands for a cache in the forward of a layer that computes some of its maps: `update` stores in our form."""

    def __init__(self, attention: nn.Module, cache: Cache) -> None:
        self.attention, self.cache = attention, cache
        self.self_attention_cache, self.is_updated = self, dict[int, bool]()
        self.get_seq_length = cache.get_seq_length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, **kwargs: Any) -> CachedStates:
        return update_cache(self.attention, self.cache, keys, values)
