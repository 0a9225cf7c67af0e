"""Concentration of attention maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.measure._over_queries import mean_over_queries


@dataclass(frozen=True)
class Concentration:
    """Share of its keys that an attention map needs, if a share ε of each row may be dropped.

    A block of neighbouring queries needs the shortest interval of keys from which at most ε/2 of each row's mass is
    cut off at either end. The length of this interval, relative to the number of keys, is the relative cost of
    products with a map that is stored as intervals.

    Attributes:
        heads: for each layer and head, the share of keys, from 0 to 1; mean over blocks, weighted by their rows.
        epsilon: ε.
        block_rows: number of queries in a block.
    """

    heads: Float[Tensor, "layers heads"]
    epsilon: float
    block_rows: int


def concentration(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, epsilon: float, block_rows: int = 64
) -> Concentration:
    """Concentration of all maps of `model` over `batches`, without padding.

    Raises:
        ValueError: if there are no batches, a map is not finite, or epsilon is not between 0 and 1.
    """
    check_epsilon(epsilon)
    shares = partial(summed_shares, epsilon=epsilon, block_rows=block_rows)
    (heads,), _ = mean_over_queries(model, batches, shares)
    return Concentration(heads, epsilon, block_rows)


def check_epsilon(epsilon: float) -> None:
    """Raise `ValueError` if epsilon is not between 0 and 1."""
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")


def summed_shares(
    maps: Float[Tensor, "layers heads query key"], epsilon: float, block_rows: int
) -> Float[Tensor, "layers heads"]:
    """Share of keys that each map of one sequence needs, summed over its queries."""
    num_keys = maps.shape[-1]
    cumulated = maps.double().cumsum(-1)
    first = (cumulated <= epsilon / 2).sum(-1)  # first needed key
    last = num_keys - (cumulated[..., -1:] - cumulated <= epsilon / 2).sum(-1)  # last needed key
    summed = torch.zeros(maps.shape[:2], dtype=torch.float64, device=maps.device)
    for start in range(0, maps.shape[2], block_rows):
        rows = slice(start, start + block_rows)
        kept = last[..., rows].amax(-1) + 1 - first[..., rows].amin(-1)
        summed += kept.clamp(max=num_keys) / num_keys * first[..., rows].shape[-1]
    return summed
