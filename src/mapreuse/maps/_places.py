"""Where the queries of an attention are among its keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mapreuse.maps._scores import Scores


@dataclass(frozen=True)
class Places:
    """Where the queries of each item are among its keys.

    Attributes:
        first_key: the first key that any query may attend to.
        first_query: the first query that may attend to any key. Blocks of queries are counted from it.
        positions: the position of each query: its own index if there are as many queries as keys, else the last key
            that it may attend to.
    """

    first_key: Int[Tensor, " batch"]
    first_query: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch query"]

    @classmethod
    def of(cls, scores: Scores) -> Places:
        """The places of the queries of these scores, from mask, causality and very negative biases."""
        batch, _, num_queries, num_keys = scores.shape
        device = scores.query.device
        rows = torch.arange(num_queries, device=device).expand(batch, -1)
        allowed = _allowed(scores)
        if allowed is None:
            zeros = torch.zeros(batch, dtype=torch.int64, device=device)
            by_row = num_queries == num_keys or scores.is_causal
            return cls(zeros, zeros, rows if by_row else torch.full_like(rows, num_keys - 1))
        allowed = allowed.expand(batch, num_queries, num_keys)
        used = allowed.any(2)
        first_key, first_query = first_true(allowed.any(1)), first_true(used)
        if num_queries == num_keys:
            return cls(first_key, first_query, rows)
        return cls(first_key, first_query, torch.where(used, num_keys - 1 - first_true(allowed.flip(-1)), num_keys))

    def blocks(self, block: int) -> Int[Tensor, "batch query"]:
        """The number of each query's block."""
        rows = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (rows - self.first_query[:, None]).clamp(min=0) // block

    def near(self, num_keys: Any, window: int) -> Bool[Tensor, "batch query key"]:
        """`is_near` for all queries and keys, whose number is a tensor while a model is traced."""
        keys = torch.arange(num_keys, device=self.positions.device)
        return is_near(keys, self.positions[..., None], self.first_key[:, None, None], window)


def is_near(keys: Tensor, positions: Tensor, first_key: Tensor, window: int) -> Tensor:
    """Whether a reader attends to these keys whatever its source published: its window and the first key."""
    return ((keys - positions).abs() < window) | (keys == first_key)


def first_true(used: Tensor) -> Tensor:
    """The index of the first True in each row."""
    return used.to(torch.uint8).argmax(-1)


def _allowed(scores: Scores) -> Bool[Tensor, "#batch #query #key"] | None:
    """The keys that each query may attend to in some head, or None for all keys."""
    allowed, bias = scores.mask, scores.bias
    if bias is not None:
        unmasked = bias > torch.finfo(bias.dtype).min / 2
        allowed = unmasked if allowed is None else allowed & unmasked
    if allowed is None:
        return None
    causal = replace(scores, mask=None).allowed()
    allowed = allowed.any(1)
    return allowed if causal is None else allowed & causal[0]
