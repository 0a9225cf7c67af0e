"""A layer's part of a plan: the heads that it projects, and the products that make its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mapreuse.maps import HeadPairs, KeySettings
from mapreuse.models._stack import Layer
from mapreuse.plan import HeadSource, ReusePlan


@dataclass(frozen=True)
class LayerLayout:
    """How an attention module makes its context under a plan.

    Weights keep the original order of heads: values and the output projection keep all heads, queries and keys those
    that compute. A layer first makes the contexts of the heads that compute, then of those that reuse, by source
    layer. If it makes more than one of these parts, it puts their heads in order.

    Attributes:
        layer: index of the layer in its stack.
        num_heads: number of heads of the layer.
        num_value_heads: number of heads of its keys and values.
        computing: the heads that compute their own map.
        query_heads: the heads whose queries the layer projects.
        key_heads: the heads of the keys that it projects.
        queries: for each head that computes, the index of its queries among those.
        keys: for each head that computes, the index of its keys among those.
        own_values: for each head that computes, its head of the values.
        parts: for each source layer, the pairs (head of its published map, head of the values) of the heads that
            reuse.
        order: the heads, in the order in which their contexts are made.
        publishes: later layers apply the map of the heads that compute.
        releases: the source layers whose last reader is this layer.
        plan: the plan.
        publishes_keys: the settings by which later layers attend to this layer's keys, or None.
        key_source: the layer whose keys this layer attends to, or None.
        publishes_scores: later layers add to the scores of the heads that compute.
        rank: the width of the queries and keys that this layer adds to the scores of its source, or None.
    """

    layer: int
    num_heads: int
    num_value_heads: int
    computing: tuple[int, ...]
    query_heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    own_values: tuple[int, ...]
    parts: tuple[tuple[int, HeadPairs], ...]
    order: tuple[int, ...]
    publishes: bool
    releases: tuple[int, ...]
    plan: ReusePlan
    publishes_keys: KeySettings | None = None
    key_source: int | None = None
    publishes_scores: bool = False
    rank: int | None = None

    def in_order(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Put the heads of parts of shape (batch, heads, …) in order, as dimension `dim` of one tensor."""
        if len(parts) == 1:
            return parts[0].movedim(1, dim)
        heads = dict(zip(self.order, (head for part in parts for head in part.unbind(1)), strict=True))
        return torch.stack([heads[head] for head in range(self.num_heads)], dim)


def layout_of(layer: Layer) -> LayerLayout:
    """The layout of a layer under the plan in force."""
    attention: Any = layer.attention
    return attention._layout


@contextmanager
def keeping_maps(layer: Layer) -> Iterator[None]:
    """Keep the shared maps of a layer, so that it can run again with them. A layer without a plan is unchanged."""
    layouts: dict[Any, LayerLayout] = {
        module: vars(module)["_layout"] for module in layer.layer.modules() if "_layout" in vars(module)
    }
    for attention, layout in layouts.items():
        attention._layout = replace(layout, releases=())
    try:
        yield
    finally:
        for attention, layout in layouts.items():
            attention._layout = layout


def lay_out(plan: ReusePlan, layer: int, num_heads: int, num_value_heads: int, *, separable: bool) -> LayerLayout:
    """The layout of `layer` under `plan`.

    Args:
        plan: the plan.
        layer: index of the layer.
        num_heads: number of heads of the queries.
        num_value_heads: number of heads of the keys and values.
        separable: the layer can project some heads without the others. Otherwise it projects all of them unless none
            computes.
    """
    group = num_heads // num_value_heads
    heads = _map_sources(plan, layer, num_heads)
    computing = _computing(plan, layer, num_heads)
    whole = bool(computing) and not separable
    query_heads = tuple(range(num_heads)) if whole else computing
    key_heads = tuple(dict.fromkeys(head // group for head in query_heads))
    parts: dict[int, list[tuple[int, int, int]]] = {}
    for head, source in enumerate(heads):
        if source is not None:
            map_head = _computing(plan, source[0], num_heads).index(source[1])
            parts.setdefault(source[0], []).append((map_head, head // group, head))
    if computing or len(parts) > 1:
        for part in parts.values():
            part.sort()  # neighbours that apply the same head of the map share one wider product
    readers = {plan.share_of(reader) for reader in plan.readers(layer)}
    settings = KeySettings(plan.keys, plan.window, plan.block) if plan.keys and plan.window and plan.block else None
    return LayerLayout(
        layer=layer,
        num_heads=num_heads,
        num_value_heads=num_value_heads,
        computing=computing,
        query_heads=query_heads,
        key_heads=key_heads,
        queries=tuple(query_heads.index(head) for head in computing),
        keys=tuple(key_heads.index(head // group) for head in computing),
        own_values=tuple(head // group for head in computing),
        parts=tuple((source, tuple(one[:2] for one in part)) for source, part in sorted(parts.items())),
        order=(*computing, *(one[2] for _, part in sorted(parts.items()) for one in part)),
        publishes="map" in readers,
        releases=tuple(source for source in plan.sources(layer) if plan.readers(source)[-1] == layer),
        plan=plan,
        publishes_keys=settings if "keys" in readers else None,
        key_source=plan.sources(layer)[0] if plan.share_of(layer) == "keys" else None,
        publishes_scores="corrected" in readers,
        rank=plan.rank if plan.share_of(layer) == "corrected" else None,
    )


def _computing(plan: ReusePlan, layer: int, num_heads: int) -> tuple[int, ...]:
    return tuple(head for head, source in enumerate(_map_sources(plan, layer, num_heads)) if source is None)


def _map_sources(plan: ReusePlan, layer: int, num_heads: int) -> tuple[HeadSource, ...]:
    """The source of the map of each head; None for heads that compute their own."""
    return (None,) * num_heads if plan.share_of(layer) == "keys" else plan.heads(layer, num_heads)
