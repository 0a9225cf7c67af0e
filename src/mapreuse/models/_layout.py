"""A layer's part of a plan, worked out once: the order of its heads and the products that make its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mapreuse.maps import HeadPairs
from mapreuse.plan import ReusePlan


@dataclass(frozen=True)
class LayerLayout:
    """How one attention module makes its context under a plan.

    The heads of a planned layer are put in the order in which their context is computed: first the heads that
    compute, those that later layers apply before the others, so that only their part of the map is handed on; then
    those that reuse, by source layer and source head, so that heads that share a source head lie side by side and one
    wider product serves them. The order is folded into the weights: heads of values and contexts are permuted nowhere
    at run time, and heads of a map only where products for all heads at once are faster, which short maps are.

    Attributes:
        layer: index of the layer in its stack.
        num_heads: heads of the layer.
        order: for each slot of the context, the original head.
        computing: how many of the first slots compute their own map.
        keys: for each computing slot, the key head it meets, numbered among those that the layer keeps.
        key_heads: the original key heads that the layer keeps.
        own_values: for each computing slot, the head of the values it meets.
        value_order: for each head of the values, the original head (grouped-query values keep theirs).
        parts: for each source layer, the pairs (head of the source's map, head of the values) of its slots.
        published: how many of the first slots have a map that later layers apply.
        releases: the layers whose maps this layer is the last to read.
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
        """True where the heads of the context are in another order than the original."""
        return self.order != tuple(range(self.num_heads))


def lay_out(
    plan: ReusePlan, layer: int, num_heads: int, num_value_heads: int, separable: Sequence[bool]
) -> LayerLayout:
    """The layout of `layer` under `plan`, for queries of `num_heads` and keys and values of `num_value_heads`.

    `separable` tells of every layer whether its heads can compute in any order; one that can't and computes all of
    its heads keeps theirs, and hands on the whole map where one of them is applied.
    """
    heads = plan.heads(layer, num_heads)
    own, published = _computing(plan, layer, num_heads, separable[layer])
    reusing = sorted(
        (source, head) for head, source in enumerate(heads) if source is not None
    )  # by source layer, source head, then own number
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
    """The heads that compute, in their order, and how many of the first are handed on."""
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
