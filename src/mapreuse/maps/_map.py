"""Attention maps as objects that reusing layers apply to their own values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mapreuse.maps._attend import attend
from mapreuse.maps._blocked import is_short
from mapreuse.maps._operators import apply_map, needs_plain_operators
from mapreuse.maps._runtime_operators import record_application
from mapreuse.maps._scores import Scores, as_index, product_of_heads
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
        lengths: numbers of queries and keys of each item beyond which all weights are zero (see
            `Scores.valid_lengths`), so that padding is not multiplied; None for no padding.
    """

    weights: Float[Tensor, "batch heads query key"] | UInt8[Tensor, "batch heads query key"]
    scales: Float[Tensor, "batch heads query 1"] | None = None
    lengths: Int[Tensor, "batch 2"] | None = None

    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        differentiable = self.scales is None and torch.is_grad_enabled()
        if differentiable or dropout_p > 0.0 or self._is_plain(values):
            weights = self.dense().to(values.dtype)
            if heads is None:
                return drop(weights, dropout_p) @ values
            if weights.shape[2] == 1:
                map_heads, value_heads = zip(*heads, strict=True)
                return product_of_heads(drop(weights[:, as_index(map_heads)], dropout_p), values, value_heads)
            # In the order of the map, heads in succession are a view of it.
            order = sorted(range(len(heads)), key=heads.__getitem__)
            map_heads, value_heads = zip(*(heads[slot] for slot in order), strict=True)
            weights, values = weights[:, as_index(map_heads)], values[:, as_index(value_heads)]
            context = drop(weights, dropout_p) @ values
            if order == list(range(len(heads))):
                return context
            found = dict(zip(order, context.unbind(1), strict=True))
            return torch.stack([found[slot] for slot in range(len(heads))], 2).transpose(1, 2)
        lengths = self.lengths
        if lengths is None:
            lengths = torch.tensor([self.weights.shape[2:]] * len(self.weights), device="cpu")
        pairs = tuple((head, head) for head in range(self.num_heads)) if heads is None else heads
        return apply_map(self.weights, self.scales, values, lengths, pairs)

    def _is_plain(self, values: Tensor) -> bool:
        return self.scales is None and (
            needs_plain_operators(self.weights, values) or is_short(values, self.weights.shape)
        )

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


@dataclass(frozen=True)
class RuntimeMap(AttentionMap):
    """A map inside an exported graph: its weights, or its weights in 8 bits and their scales."""

    stored: tuple[Tensor, ...]

    def apply(
        self,
        values: Float[Tensor, "batch value_heads key value_dim"],
        heads: HeadPairs | None = None,
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        pairs = heads or tuple((head, head) for head in range(self.num_heads))
        return record_application(self.stored, values, pairs)

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        raise ValueError("an export with kernels cannot return attention maps; export without kernels")

    @property
    def num_heads(self) -> int:
        return self.stored[0].shape[1]
