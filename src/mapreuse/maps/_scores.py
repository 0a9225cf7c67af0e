"""Pre-softmax attention scores, as the tensors from which any block of their rows can be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class RelativePositions:
    """Transformer-XL relative positions (Dai et al. 2019): the term `shift(query @ keyᵀ)` of the scores.

    Attributes:
        query: queries with the positional bias added, `Q + v`.
        key: projected encodings of the 2·T − 1 distances, from T − 1 (key far left) down to −(T − 1).
    """

    query: Float[Tensor, "batch heads query dim"]
    key: Float[Tensor, "#batch heads distances dim"]


@dataclass(frozen=True)
class Scores:
    """What an attention map is the softmax of.

        scores[i, j] = scaling · (query[i] · key[j] + relative.query[i] · relative.key[T − 1 − i + j]) + bias[i, j]

    and −∞ where `mask` is False, or where `is_causal` and j > i.

    Attributes:
        query: queries, positions applied (rotary) or content bias added (relative).
        key: keys, positions applied; as many heads as the queries.
        scaling: factor of the products, usually 1/√dim.
        mask: True where a query may attend a key.
        bias: added to the scores.
        is_causal: no query attends a later key.
        relative: relative positions, or None; then there are as many queries as keys.
    """

    query: Float[Tensor, "batch heads query dim"]
    key: Float[Tensor, "batch heads key dim"]
    scaling: float
    mask: Bool[Tensor, "#batch #heads #query key"] | None = None
    bias: Float[Tensor, "#batch #heads #query key"] | None = None
    is_causal: bool = False
    relative: RelativePositions | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, query, key)."""
        batch, heads, num_queries, _ = self.query.shape
        return batch, heads, num_queries, self.key.shape[-2]

    @cached_property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """For every item, how many leading queries and keys hold all that attends and is attended."""
        batch, _, num_queries, num_keys = self.shape
        if self.mask is None:
            return ((num_queries, num_keys),) * batch
        ends = []
        for length, some in ((num_queries, self.mask.any(-1)), (num_keys, self.mask.any(-2))):
            places = torch.arange(1, some.shape[-1] + 1, device=some.device)
            last = (some.any(1) * places).amax(-1)  # of every item: the last that is in use, counted from 1
            last = torch.where(last > 0, length, 0) if some.shape[-1] == 1 else last
            ends.append((last.tolist() * batch)[:batch])
        return tuple(zip(*ends, strict=True))

    @property
    def factors(self) -> list[Tensor]:
        """The tensors whose products scores are."""
        relative = self.relative
        return [self.query, self.key] if relative is None else [self.query, self.key, relative.query, relative.key]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept to compute the scores again."""
        return sum(tensor.nbytes for tensor in self.factors)

    def to(self, dtype: torch.dtype) -> Scores:
        """The same scores in another floating-point type; a bias beyond its range becomes the lowest number in it."""
        if self.query.dtype == self.key.dtype == dtype:
            return self
        relative, bias = self.relative, self.bias
        if relative is not None:
            relative = RelativePositions(relative.query.to(dtype), relative.key.to(dtype))
        if bias is not None:
            bias = bias.clamp(min=torch.finfo(dtype).min).to(dtype)
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), bias=bias, relative=relative)

    def of_heads(self, heads: list[int] | slice) -> Scores:
        """The scores of some heads, in this order; of a slice of them without a copy (see `as_index`)."""

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
        )

    def dense(self) -> Float[Tensor, "batch heads query key"]:
        """All scores at once, differentiable; entries that may not be attended hold the most negative number."""
        scores = self.query @ self.key.mT
        if self.relative is not None:
            scores = scores + shift(self.relative.query @ self.relative.key.mT)
        scores = scores * self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        allowed = self.allowed(0, scores.shape[-2])
        return scores if allowed is None else scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)

    def allowed(self, start: int, stop: int) -> Bool[Tensor, "#batch #heads #rows key"] | None:
        """Which keys query rows start … stop may attend, or None for all of them."""
        allowed = self.mask
        if allowed is not None and allowed.shape[-2] > 1:
            allowed = allowed[..., start:stop, :]
        if self.is_causal:
            device, num_keys = self.query.device, self.key.shape[-2]
            rows = torch.arange(start, stop, device=device)[:, None]
            causal = (torch.arange(num_keys, device=device)[None, :] <= rows)[None, None]
            allowed = causal if allowed is None else allowed & causal
        return allowed


def shift(
    scores: Float[Tensor, "batch heads query distances"],
) -> Float[Tensor, "batch heads query key"]:
    """Relative to absolute positions: `shift(P)[i, j] = P[i, T − 1 − i + j]`, a view of contiguous scores.

    Row i of the view starts T − 1 − i columns in: read on from column T − 1 of row 0, rows one element shorter.
    """
    rows, distances = scores.shape[-2:]
    if rows == 1:
        return scores
    shorter = scores.flatten(-2)[..., rows - 1 : rows - 1 + rows * (distances - 1)]
    return shorter.unflatten(-1, (rows, distances - 1))[..., : distances - rows + 1]


def as_index(heads: Sequence[int]) -> slice | list[int]:
    """What selects these heads of a tensor: a slice where each follows the one before, so that none is copied."""
    run = range(heads[0], heads[0] + len(heads))
    return slice(run.start, run.stop) if list(heads) == list(run) else list(heads)
