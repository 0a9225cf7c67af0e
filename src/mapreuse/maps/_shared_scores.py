"""Share mode "corrected": scores, as a computing layer publishes them and later layers add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapreuse.maps._attend import attend, attend_step
from mapreuse.maps._map import HeadPairs, RecomputedMap
from mapreuse.maps._places import Places
from mapreuse.maps._scores import Scores, as_index

_BASE = 10_000.0
"""The pairs of numbers are rotated by the frequencies of Su et al., "RoFormer" (arXiv 2104.09864)."""


@dataclass(frozen=True)
class SharedScores:
    """The scores that a computing layer published for its readers.

        map[h] = softmax(dense[m] + R(query[h]) R(key[v])ᵀ),    (m, v) = heads[h]

    R rotates pairs of numbers by their positions, so that a product depends on the distance of query and key.

    Attributes:
        source: the scores of the computing layer.
        dense: the same as numbers, without mask and causality.
        places: the places of the queries.
    """

    source: Scores
    dense: Float[Tensor, "batch heads query key"]
    places: Places

    @classmethod
    def of(cls, scores: Scores) -> SharedScores:
        """What a layer with these scores publishes."""
        return cls(scores, replace(scores, mask=None, is_causal=False).dense(), Places.of(scores))

    def at(self, queries: Int[Tensor, " some"]) -> SharedScores:
        """The part of some queries."""
        source, allowed = self.source, self.source.allowed()
        if allowed is not None and allowed.shape[2] > 1:
            allowed = allowed[:, :, queries]
        part = replace(source, query=source.query[:, :, queries], mask=allowed, is_causal=False)
        places = replace(self.places, positions=self.places.positions[:, queries])
        return SharedScores(part, self.dense[:, :, queries], places)

    def corrected(
        self,
        query: Float[Tensor, "batch heads query rank"],
        key: Float[Tensor, "batch value_heads key rank"],
        heads: HeadPairs,
    ) -> Scores:
        """The scores of a reader.

        Args:
            query: its low-rank queries.
            key: its low-rank keys, which heads may share as they share values.
            heads: for each head, its head of the published scores and its head of the low-rank keys.
        """
        map_heads, key_heads = zip(*heads, strict=True)
        index, mask, sinks = as_index(map_heads), self.source.mask, self.source.sinks
        key = rotated(key, torch.arange(key.shape[2], device=key.device)[None])
        is_step = query.shape[2] == 1
        return Scores(
            query=rotated(query, self.places.positions),
            key=key if is_step else key[:, as_index(key_heads)],
            scaling=1.0,
            mask=mask if mask is None or mask.shape[1] == 1 else mask[:, index],
            bias=self.dense[:, index],
            is_causal=self.source.is_causal,
            key_heads=key_heads if is_step else None,
            sinks=None if sinks is None else sinks[index],
        )

    def attend(
        self,
        query: Float[Tensor, "batch heads query rank"],
        key: Float[Tensor, "batch value_heads key rank"],
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs,
        dropout_p: float = 0.0,
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], RecomputedMap]:
        """The context of a reader, and its map. The arguments are those of `corrected`."""
        scores = self.corrected(query, key, heads).to(values.dtype)
        value_heads = [value_head for _, value_head in heads]
        if scores.key_heads is not None:
            context, _ = attend_step(scores, values, value_heads, dropout_p=dropout_p)
        else:
            context, _ = attend(scores, values[:, as_index(value_heads)], keep=False, dropout_p=dropout_p)
        return context, RecomputedMap(scores)


def rotated(
    states: Float[Tensor, "batch heads positions rank"], positions: Int[Tensor, "#batch positions"]
) -> Float[Tensor, "batch heads positions rank"]:
    """Rotate the pairs (p, p + rank / 2) of numbers by position · 10000^(−2p / rank)."""
    half = states.shape[-1] // 2
    frequencies = _BASE ** (-torch.arange(half, dtype=torch.float32, device=states.device) / half)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
