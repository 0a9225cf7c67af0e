"""How few keys hold most of an attention map?"""

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
    """Which share of its keys an attention map needs, if a little of every row may be left out.

    Attributes:
        heads: for every layer and head, the share of keys, from 0 to 1, in the interval that is left when of every
            row of a block of neighbouring queries at most ε/2 of the mass is cut off at either end; the mean over
            blocks, weighed by their rows. What products with a map so restricted would cost, beside the whole map.
        epsilon: ε.
        block_rows: queries in a block.
    """

    heads: Float[Tensor, "layers heads"]
    epsilon: float
    block_rows: int


def concentration(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, epsilon: float, block_rows: int = 64
) -> Concentration:
    """Concentration of all maps of `model` over `batches`, padding left out.

    Raises `ValueError` where there are no batches, a map is not finite, or epsilon is not between 0 and 1.
    """
    check_epsilon(epsilon)
    shares = partial(summed_shares, epsilon=epsilon, block_rows=block_rows)
    (heads,), _ = mean_over_queries(model, batches, shares)
    return Concentration(heads, epsilon, block_rows)


def check_epsilon(epsilon: float) -> None:
    """Raises `ValueError` for an epsilon that is not between 0 and 1."""
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")


def summed_shares(
    maps: Float[Tensor, "layers heads query key"], epsilon: float, block_rows: int
) -> Float[Tensor, "layers heads"]:
    """The share of keys that each map of one sequence needs, summed over its queries."""
    num_keys = maps.shape[-1]
    cumulated = maps.double().cumsum(-1)
    first = (cumulated <= epsilon / 2).sum(-1)  # keys before which at most ε/2 of the row lies
    last = num_keys - (cumulated[..., -1:] - cumulated <= epsilon / 2).sum(-1)  # the last key that is needed
    summed = torch.zeros(maps.shape[:2], dtype=torch.float64, device=maps.device)
    for start in range(0, maps.shape[2], block_rows):
        rows = slice(start, start + block_rows)
        kept = last[..., rows].amax(-1) + 1 - first[..., rows].amin(-1)
        summed += kept.clamp(max=num_keys) / num_keys * first[..., rows].shape[-1]
    return summed
