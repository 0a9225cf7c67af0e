"""A layer's part of a plan: the order of its heads and the products that make its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mapreuse.maps import HeadPairs
from mapreuse.models._stack import Layer
from mapreuse.plan import ReusePlan


@dataclass(frozen=True)
class LayerLayout:
    """How an attention module makes its context under a plan.

    A layer orders its heads as their contexts are computed. First come the heads that compute: those whose maps later
    layers apply, then the others, so that the layer publishes a contiguous part of its map. Then come the heads that
    reuse, by source layer and source head, so that heads with the same source head are neighbours and share one wider
    product. The weights are permuted accordingly, once. At run time, no values or contexts are permuted, and maps
    only if one product for all heads is faster, as for short maps.

    Attributes:
        layer: index of the layer in its stack.
        num_heads: number of heads of the layer.
        order: for each slot of the context, the original head.
        computing: number of slots that compute their own map; they come first.
        keys: for each computing slot, the index of its key head among those that the layer keeps.
        key_heads: the original key heads that the layer keeps.
        own_values: for each computing slot, the index of its head of the values.
        value_order: for each head of the values, the original head (grouped-query values keep their order).
        parts: for each source layer, the pairs (head of the source's map, head of the values) of its slots.
        published: number of slots whose maps later layers apply; they come first.
        releases: the source layers whose last reader is this layer.
    """

    layer: int
    num_heads: int
    order: tuple[int, ...]
    computing: int
    keys: tuple[int, ...]
    key_heads: tuple[int, ...]
    own_values: tuple[int, ...]
    value_order: tuple[int, ...]
    parts: tuple[tuple[int, HeadPairs], ...]
    published: int
    releases: tuple[int, ...]

    @property
    def reorders(self) -> bool:
        """True if the heads of the context are not in their original order."""
        return self.order != tuple(range(self.num_heads))


def layout_of(layer: Layer) -> LayerLayout:
    """The layout of a layer under the plan in force."""
    attention: Any = layer.attention
    return attention._layout


@contextmanager
def keeping_maps(layer: Layer) -> Iterator[None]:
    """Keep the shared maps of a layer, so that it can run again with them. A layer without a plan is unchanged."""
    attention: Any = layer.attention
    layout = vars(attention).get("_layout")
    if layout is not None:
        attention._layout = replace(layout, releases=())
    try:
        yield
    finally:
        if layout is not None:
            attention._layout = layout


def lay_out(
    plan: ReusePlan, layer: int, num_heads: int, num_value_heads: int, separable: Sequence[bool]
) -> LayerLayout:
    """The layout of `layer` under `plan`.

    Args:
        plan: the plan.
        layer: index of the layer.
        num_heads: number of heads of the queries.
        num_value_heads: number of heads of the keys and values.
        separable: for each layer, whether its heads can compute in any order. A layer that is not separable and
            computes all its heads keeps their order, and publishes its whole map if any head of it is applied.
    """
    heads = plan.heads(layer, num_heads)
    own, published = _computing(plan, layer, num_heads, separable[layer])
    reusing = sorted(  # by source layer, source head and own number
        (source, head) for head, source in enumerate(heads) if source is not None
    )
    order = (*own, *(head for _, head in reusing))
    group = num_heads // num_value_heads
    grouped = group > 1
    value_order = tuple(range(num_value_heads)) if grouped else order
    value_of = {head: head // group if grouped else order.index(head) for head in range(num_heads)}
    key_heads = tuple(dict.fromkeys(head // group for head in own))
    parts: dict[int, list[tuple[int, int]]] = {}
    for (source, source_head), head in reusing:
        computed, _ = _computing(plan, source, num_heads, separable[source])
        parts.setdefault(source, []).append((computed.index(source_head), value_of[head]))
    return LayerLayout(
        layer=layer,
        num_heads=num_heads,
        order=order,
        computing=len(own),
        keys=tuple(key_heads.index(head // group) for head in own),
        key_heads=key_heads,
        own_values=tuple(value_of[head] for head in own),
        value_order=value_order,
        parts=tuple((source, tuple(pairs)) for source, pairs in parts.items()),
        published=published,
        releases=tuple(source for source in plan.sources(layer) if plan.readers(source)[-1] == layer),
    )


def _computing(plan: ReusePlan, layer: int, num_heads: int, separable: bool) -> tuple[tuple[int, ...], int]:
    """The heads that compute, in their order, and how many of them are published; those come first."""
    own = [head for head, source in enumerate(plan.heads(layer, num_heads)) if source is None]
    applied = {
        source_head
        for reader in plan.readers(layer)
        for source, source_head in filter(None, plan.heads(reader, num_heads))
        if source == layer
    }
    if len(own) == num_heads and not separable:
        return tuple(own), len(own) if applied else 0
    return tuple(sorted(own, key=lambda head: (head not in applied, head))), len(applied)
