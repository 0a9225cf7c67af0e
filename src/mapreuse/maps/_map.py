"""Attention maps as objects that reusing layers apply to their own values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mapreuse.maps import _c_kernel
from mapreuse.maps._attend import attend
from mapreuse.maps._blocked import is_short, rows_per_block, slices
from mapreuse.maps._scores import Scores, as_index
from mapreuse.maps._softmax import drop, softmax

HeadPairs: TypeAlias = tuple[tuple[int, int], ...]
"""For each head of the context, its head of the map and its head of the values."""


class AttentionMap(ABC):
    """The attention map of a computing layer, which other layers apply to their values.

    For every storage, `apply(values)` equals `dropout(dense(), dropout_p) @ values`. Each row of the map sums to one,
    or to zero if its query may attend to no key.
    """

    @abstractmethod
    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """Compute the context of a reusing layer.

            context[h] = dropout(map[m_h], dropout_p) @ values[v_h],    (m_h, v_h) = heads[h]

        Args:
            values: values of the reusing layer.
            heads: for each head of the context, its head of the map and its head of the values; None pairs equal
                numbers.
            dropout_p: probability of dropping a weight. Every call draws its own dropout.
        """

    @abstractmethod
    def dense(self) -> Float[Tensor, "batch heads query key"]:
        """The weights, for analysis and tests."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Number of heads of the map."""


@dataclass(frozen=True)
class DenseMap(AttentionMap):
    """A map that stores its weights. Applying it is one matrix product.

    Attributes:
        weights: the weights, or compressed weights with `map = scales * weights`: float16 from 0 to 1, or uint8 from
            0 to 255.
        scales: scale of each row of compressed weights, in float32 or wider; None if the weights are not compressed.
        valid_lengths: numbers of queries and keys per item beyond which all weights are zero (see
            `Scores.valid_lengths`), so that padding is not multiplied; None for no padding.
    """

    weights: Float[Tensor, "batch heads query key"] | UInt8[Tensor, "batch heads query key"]
    scales: Float[Tensor, "batch heads query 1"] | None = None
    valid_lengths: tuple[tuple[int, int], ...] | None = None

    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        short = is_short(*self.weights.shape[-2:])
        if self.scales is None and (short or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            weights = self.weights
            if heads is not None:
                map_heads, value_heads = zip(*heads, strict=True)
                weights, values = weights[:, as_index(map_heads)], values[:, as_index(value_heads)]
            return drop(weights, dropout_p) @ values
        batch, num_heads, num_queries, num_keys = self.weights.shape
        valid_lengths = self.valid_lengths or ((num_queries, num_keys),) * batch
        if dropout_p == 0.0 and _c_kernel.applies(self.weights, values):
            pairs = tuple((head, head) for head in range(num_heads)) if heads is None else heads
            return _c_kernel.apply(self.weights, self.scales, values, pairs, valid_lengths)
        num_heads = num_heads if heads is None else len(heads)
        context = values.new_empty(batch, num_queries, num_heads, values.shape[-1]).transpose(1, 2)
        for item, (rows, keys) in enumerate(valid_lengths):
            context[item, :, rows:] = 0
            item_values = values[item, :, :keys]
            for block in slices(rows, rows if self.scales is None else rows_per_block(rows, keys)):
                weights, out = self.weights[item, :, block, :keys], context[item, :, block]
                if self.scales is not None and self.scales.dtype != values.dtype:
                    # Unscaled products of uint8 weights could overflow in half precision.
                    weights = (weights * self.scales[item, :, block]).to(values.dtype)
                elif self.scales is not None:
                    weights = weights.to(values.dtype)
                if heads is None:
                    torch.bmm(drop(weights, dropout_p), item_values, out=out)
                else:
                    _apply_heads(weights, item_values, heads, dropout_p, out)
            if self.scales is not None and self.scales.dtype == values.dtype:
                scales = self.scales[item, :, :rows]
                context[item, :, :rows] *= scales if heads is None else scales[[pair[0] for pair in heads]]
        return context

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        return self.weights if self.scales is None else self.weights.to(self.scales.dtype) * self.scales

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1]


@dataclass(frozen=True)
class RecomputedMap(AttentionMap):
    """A map that stores the queries and keys of its scores, so that memory grows with T instead of T².

    Applying it computes the attention again, by `attend`: `scaled_dot_product_attention(Q_source, K_source, V)` or a
    kernel that also supports relative positions.
    """

    scores: Scores

    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        scores = self.scores
        if heads is not None:
            map_heads, value_heads = zip(*heads, strict=True)
            scores, values = scores.of_heads(as_index(map_heads)), values[:, as_index(value_heads)]
        return attend(scores, values, keep=False, dropout_p=dropout_p)[0]

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        return softmax(self.scores)

    @property
    def num_heads(self) -> int:
        return self.scores.shape[1]


def _apply_heads(
    weights: Float[Tensor, "heads query key"],
    values: Float[Tensor, "value_heads key value_dim"],
    heads: HeadPairs,
    dropout_p: float,
    out: Float[Tensor, "context_heads query value_dim"],
) -> None:
    for run, map_head, value_heads in _wide_products(heads):
        if dropout_p > 0.0:  # each head of the context draws its own dropout
            for slot, value_head in zip(range(run.start, run.stop), value_heads, strict=True):
                out[slot] = drop(weights[map_head], dropout_p) @ values[value_head]
            continue
        wide = values[value_heads[0] : value_heads[-1] + 1].transpose(0, 1).flatten(1)
        torch.mm(weights[map_head], wide, out=out[run].transpose(0, 1).flatten(1))


def _wide_products(heads: HeadPairs) -> Iterator[tuple[slice, int, tuple[int, ...]]]:
    """Group context heads that apply one head of the map to consecutive heads of the values: one product each."""
    start = 0
    for slot in range(1, len(heads) + 1):
        if slot < len(heads):
            map_head, value_head = heads[slot]
            if map_head == heads[slot - 1][0] and value_head == heads[slot - 1][1] + 1:
                continue
        yield slice(start, slot), heads[start][0], tuple(pair[1] for pair in heads[start:slot])
        start = slot
