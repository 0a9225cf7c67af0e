"""The attention map as an object that is handed from the layer that computed it to the layers that reuse it."""

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
from mapreuse.maps._blocked import is_short, rows_at_a_time, slices
from mapreuse.maps._scores import Scores, as_index
from mapreuse.maps._softmax import drop, softmax

HeadPairs: TypeAlias = tuple[tuple[int, int], ...]
"""For each head of the context, the head of the map and the head of the values that make it."""


class AttentionMap(ABC):
    """What a computing layer hands on: a row-stochastic map that can be applied to other layers' values.

    All realisations mean the same: `apply(values) = dropout(dense(), dropout_p) @ values`.
    """

    @abstractmethod
    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """Context of another layer's values under this map.

            context[h] = dropout(map[m_h], dropout_p) @ values[v_h],    (m_h, v_h) = heads[h]

        Args:
            values: values projected by the reusing layer.
            heads: for each head of the context, which head of the map meets which head of the values; None pairs
                them one to one.
            dropout_p: probability with which a weight is dropped, drawn anew for every layer.
        """

    @abstractmethod
    def dense(self) -> Float[Tensor, "batch heads query key"]:
        """The weights, for analysis and tests."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Heads of the map."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the map keeps alive until its last reader."""


@dataclass(frozen=True)
class DenseMap(AttentionMap):
    """The stored weights; one matrix product to apply.

    Attributes:
        weights: the weights, as they are, or compressed to `scales * weights`: float16 from 0 to 1, or uint8 from 0
            to 255. Those are decompressed some rows at a time, and rows of the context take their scale; in half
            precision, which products of 255ths would overflow, rows of the weights do.
        scales: of every row, in float32 or wider; None where the weights are as they are.
        extents: for every item, how many leading queries and keys hold all weights that are not zero (see
            `Scores.extents`), so that no product is made with the rest; None for all of them.
    """

    weights: Float[Tensor, "batch heads query key"] | UInt8[Tensor, "batch heads query key"]
    scales: Float[Tensor, "batch heads query 1"] | None = None
    extents: tuple[tuple[int, int], ...] | None = None

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
        if dropout_p == 0.0 and _c_kernel.applies(self.weights, values):
            pairs = tuple((head, head) for head in range(num_heads)) if heads is None else heads
            extents = self.extents or ((num_queries, num_keys),) * batch
            return _c_kernel.apply(self.weights, self.scales, values, pairs, extents)
        num_heads = num_heads if heads is None else len(heads)
        context = values.new_empty(batch, num_queries, num_heads, values.shape[-1]).transpose(1, 2)
        for item, (rows, keys) in enumerate(self.extents or [(num_queries, num_keys)] * batch):
            context[item, :, rows:] = 0
            own = values[item, :, :keys]
            for some in slices(rows, rows if self.scales is None else rows_at_a_time(rows, keys)):
                weights, out = self.weights[item, :, some, :keys], context[item, :, some]
                if self.scales is not None and self.scales.dtype != values.dtype:
                    weights = (weights * self.scales[item, :, some]).to(values.dtype)
                elif self.scales is not None:
                    weights = weights.to(values.dtype)
                if heads is None:
                    torch.bmm(drop(weights, dropout_p), own, out=out)
                else:
                    _apply_in_pairs(weights, own, heads, dropout_p, out)
            if self.scales is not None and self.scales.dtype == values.dtype:
                scales = self.scales[item, :, :rows]
                context[item, :, :rows] *= scales if heads is None else scales[[pair[0] for pair in heads]]
        return context

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        return self.weights if self.scales is None else self.weights.to(self.scales.dtype) * self.scales

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True)
class RecomputedMap(AttentionMap):
    """The source layer's scores, kept as queries and keys; memory grows with T instead of T².

    Applied by fused attention, `scaled_dot_product_attention(Q_source, K_source, V_here)`, or the core in C where
    that is faster; with relative positions by a core that computes the scores anew, block by block.
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

    @property
    def nbytes(self) -> int:
        return self.scores.nbytes


def _apply_in_pairs(
    weights: Float[Tensor, "heads query key"],
    values: Float[Tensor, "value_heads key value_dim"],
    heads: HeadPairs,
    dropout_p: float,
    out: Float[Tensor, "context_heads query value_dim"],
) -> None:
    for run, map_head, value_heads in _wide_products(heads):
        if dropout_p > 0.0:
            # One draw for each head of the context, as if the heads did not share a product.
            for slot, value_head in zip(range(run.start, run.stop), value_heads, strict=True):
                out[slot] = drop(weights[map_head], dropout_p) @ values[value_head]
            continue
        wide = values[value_heads[0] : value_heads[-1] + 1].transpose(0, 1).flatten(1)
        torch.mm(weights[map_head], wide, out=out[run].transpose(0, 1).flatten(1))


def _wide_products(heads: HeadPairs) -> Iterator[tuple[slice, int, tuple[int, ...]]]:
    """Runs of context heads that apply one head of the map to adjoining heads of the values: one product each."""
    start = 0
    for slot in range(1, len(heads) + 1):
        if slot < len(heads):
            map_head, value_head = heads[slot]
            if map_head == heads[slot - 1][0] and value_head == heads[slot - 1][1] + 1:
                continue
        yield slice(start, slot), heads[start][0], tuple(pair[1] for pair in heads[start:slot])
        start = slot
