"""Attention scores before the softmax, kept as queries, keys and masks: any block can be computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions of Transformer-XL (Dai et al. 2019): the term `shift(query @ keyᵀ)` of the scores.

    Attributes:
        query: queries plus the positional bias, `Q + v`.
        key: projected encodings of the 2·T − 1 distances i − j, in descending order from T − 1 to −(T − 1).
    """

    query: Float[Tensor, "batch heads query dim"]
    key: Float[Tensor, "#batch heads distances dim"]


@dataclass(frozen=True)
class Scores:
    """The scores of an attention layer, from which its map is `softmax(scores)`.

        scores[i, j] = scaling · (query[i] · key[j] + relative.query[i] · relative.key[T − 1 − i + j]) + bias[i, j]

    The score is −∞ if `mask[i, j]` is False, or if `is_causal` and j > i. With a cap c, the scaled sum s becomes
    c · tanh(s / c) before the bias is added (Gemma 2). A sink is the score of one more key, whose weight is dropped
    after the softmax (Xiao et al. 2024).

    Attributes:
        query: queries, after rotary positions or the content bias of relative positions.
        key: keys, after rotary positions, with as many heads as the queries, unless `key_heads` says otherwise.
        scaling: factor of the products, usually 1/√dim.
        mask: True if a query may attend to a key.
        bias: added to the scores.
        is_causal: no query attends to a later key.
        relative: relative positions, or None. They need as many queries as keys.
        key_heads: for each head, its head of the keys; only in a decoding step, for `attend_step`,
            and in share mode "keys".
        cap: maximum of the scaled scores, or None.
        sinks: a score for each head, or None.
    """

    query: Float[Tensor, "batch heads query dim"]
    key: Float[Tensor, "batch key_heads key dim"]
    scaling: float
    mask: Bool[Tensor, "#batch #heads #query key"] | None = None
    bias: Float[Tensor, "#batch #heads #query key"] | None = None
    is_causal: bool = False
    relative: RelativePositions | None = None
    key_heads: tuple[Any, ...] | None = None  # a check of `int` draws random items, which hypothesis forbids
    cap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @property
    def shape(self) -> tuple[Any, Any, Any, Any]:
        """Shape of the map: (batch, heads, query, key). The numbers are symbols while a model is exported."""
        batch, heads, num_queries, _ = self.query.shape
        return batch, heads, num_queries, self.key.shape[-2]

    @property
    def beyond_kernels(self) -> bool:
        """Whether PyTorch's own operators compute the map, as a whole: the kernels know no cap and no sinks."""
        return self.cap is not None or self.sinks is not None

    @cached_property
    def valid_lengths(self) -> tuple[tuple[int, int], ...]:
        """Numbers of queries and keys of each item, up to the last ones that the mask uses.

        The rest is padding and is not computed. On a GPU, everything is computed: reading the mask would wait for it.
        """
        batch, _, num_queries, num_keys = self.shape
        if self.mask is None or on_gpu(self.mask):
            return ((num_queries, num_keys),) * batch
        ends = []
        for length, used in ((num_queries, self.mask.any(-1)), (num_keys, self.mask.any(-2))):
            places = torch.arange(1, used.shape[-1] + 1, device=used.device)
            last = (used.any(1) * places).amax(-1)
            last = torch.where(last > 0, length, 0) if used.shape[-1] == 1 else last
            ends.append((last.tolist() * batch)[:batch])
        return tuple(zip(*ends, strict=True))

    @property
    def factors(self) -> list[Tensor]:
        """The queries and keys whose products make the scores."""
        relative = self.relative
        return [self.query, self.key] if relative is None else [self.query, self.key, relative.query, relative.key]

    @property
    def nbytes(self) -> int:
        """Size of `factors` in bytes."""
        return sum(tensor.nbytes for tensor in self.factors)

    def to(self, dtype: torch.dtype) -> Scores:
        """Convert the scores to another floating-point type. A bias beyond its range is clamped to its minimum."""
        if self.query.dtype == self.key.dtype == dtype:
            return self
        relative, bias = self.relative, self.bias
        if relative is not None:
            relative = RelativePositions(relative.query.to(dtype), relative.key.to(dtype))
        if bias is not None:
            bias = bias.clamp(min=max(torch.finfo(one).min for one in (dtype, bias.dtype))).to(dtype)
        query, key, sinks = self.query.to(dtype), self.key.to(dtype), self.sinks
        sinks = None if sinks is None else sinks.to(dtype)
        return replace(self, query=query, key=key, bias=bias, relative=relative, sinks=sinks)

    def of_heads(self, heads: list[int] | slice) -> Scores:
        """Select heads, in the given order. A slice copies nothing (see `as_index`)."""

        def select(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dim() < 4 or tensor.shape[1] == 1 else tensor[:, heads]

        relative = self.relative
        if relative is not None:
            relative = RelativePositions(relative.query[:, heads], relative.key[:, heads])
        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, heads],
            mask=select(self.mask),
            bias=select(self.bias),
            relative=relative,
            sinks=None if self.sinks is None else self.sinks[heads],
        )

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        """Compute all scores, with gradients. Masked scores are the most negative number of their type."""
        if self.key_heads is None:
            scores = self.query @ self.key.transpose(-2, -1)
        else:
            scores = product_of_heads(self.query, self.key.transpose(-2, -1), self.key_heads)
        if self.relative is not None:
            if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
                raise ValueError(
                    "torch.onnx.export(dynamo=False) cannot export relative positions for other lengths; pass "
                    "dynamo=True, or use mapreuse.export"
                )
            scores = scores + shift(self.relative.query @ self.relative.key.transpose(-2, -1))
        scores = scores * self.scaling
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.bias is not None:
            scores = scores + self.bias
        allowed = self.allowed()
        return scores if allowed is None else scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)

    def allowed(self) -> Bool[Tensor, "#batch #heads #query key"] | None:
        """The keys that each query may attend to, from mask and causality; None if it may attend to all keys."""
        if not self.is_causal:
            return self.mask
        rows, columns = (torch.arange(length, device=self.query.device) for length in self.shape[2:])
        causal = (columns[None, :] <= rows[:, None])[None, None]
        return causal if self.mask is None else self.mask & causal


def shift(
    scores: Float[Tensor, "batch heads query distances"],
) -> Float[Tensor, "batch heads query key"]:
    """Turn scores by distance into scores by key: `shift(P)[i, j] = P[i, T − 1 − i + j]`.

    With one more column, the scores of successive rows start 2·T − 1 elements apart.
    """
    rows, distances = scores.size(-2), scores.size(-1)
    flat = functional.pad(scores, (0, 1)).flatten(-2)[..., rows - 1 : rows - 1 + rows * distances]
    return flat.view_as(scores)[..., :rows]


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a device where starting many small computations, or waiting for results, costs time."""
    return tensor.device.type != "cpu"


def part_of_item(tensor: Tensor | None, item: int, rows: int, keys: int) -> Tensor | None:
    """One item's mask or bias, without padding. Dimensions of size 1 broadcast."""
    if tensor is None:
        return None
    part = tensor[item if tensor.shape[0] > 1 else 0, ..., :keys]
    return part[:, :rows] if part.shape[1] > 1 else part


def as_index(heads: Sequence[int]) -> slice | list[int]:
    """An index that selects these heads of a tensor: a slice if they are consecutive, which avoids a copy."""
    run = range(heads[0], heads[0] + len(heads))
    return slice(run.start, run.stop) if list(heads) == list(run) else list(heads)


def product_of_heads(
    rows: Float[Tensor, "batch heads query inner"],
    matrices: Float[Tensor, "batch matrices inner width"],
    choice: Sequence[int],
) -> Float[Tensor, "batch heads query width"]:
    """Multiply the rows of each head by one of the matrices: `rows[h] @ matrices[choice[h]]`.

    Heads that share a matrix are multiplied as one. Selecting the matrices first would copy them for each head, which
    takes longer than the product if a head has only one row.
    """
    used = list(dict.fromkeys(choice))
    size = len(choice) // len(used)
    chosen = as_index(used)
    if isinstance(chosen, slice) and list(choice) == [matrix for matrix in used for _ in range(size)]:
        product = rows.unflatten(1, (len(used), size)).flatten(2, 3) @ matrices[:, chosen]
        return product.unflatten(2, (size, rows.shape[2])).flatten(1, 2)
    found: dict[int, Tensor] = {}
    for matrix in used:
        heads = [head for head, one in enumerate(choice) if one == matrix]
        product = rows[:, heads].flatten(1, 2) @ matrices[:, matrix]
        found |= zip(heads, product.unflatten(1, (len(heads), rows.shape[2])).unbind(1), strict=True)
    return torch.stack([found[head] for head in range(len(choice))], 1)
