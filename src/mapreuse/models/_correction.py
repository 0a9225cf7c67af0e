"""The low-rank queries and keys of a layer of share mode "corrected"."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Correction(nn.Module):
    """Makes the queries and keys whose products a reusing layer adds to the scores of its source.

        query[h] = x A[h],    key[g] = x B[g]

    A is zero at first, and B random, so that the correction is zero but can learn.

    Attributes:
        query: the projection A, of rank numbers for each head.
        key: the projection B, of rank numbers for each head of the values.
        rank: width of a head.
    """

    def __init__(self, width: int, num_heads: int, num_key_heads: int, rank: int, *, seed: int, like: Tensor) -> None:
        super().__init__()
        self.rank = rank
        settings: dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.query = nn.utils.skip_init(nn.Linear, width, num_heads * rank, **settings)
        self.key = nn.utils.skip_init(nn.Linear, width, num_key_heads * rank, **settings)
        nn.init.zeros_(self.query.weight)
        generator = torch.Generator().manual_seed(seed)
        initial = torch.randn(num_key_heads * rank, width, generator=generator, device="cpu")
        with torch.no_grad():
            self.key.weight.copy_(initial * width**-0.5)

    def forward(
        self, hidden_states: Float[Tensor, "batch positions width"]
    ) -> tuple[Float[Tensor, "batch heads positions rank"], Float[Tensor, "batch key_heads positions rank"]]:
        """The low-rank queries and keys, before they are rotated."""
        projected = self.query(hidden_states), self.key(hidden_states)
        query, key = (one.unflatten(-1, (-1, self.rank)).transpose(1, 2) for one in projected)
        return query, key
