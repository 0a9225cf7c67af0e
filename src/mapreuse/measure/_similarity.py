"""Similarity of attention maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.measure._over_queries import mean_over_queries

_MAX_COMPARED = 2**20
"""Maximum number of differences in memory at a time."""


@dataclass(frozen=True)
class Similarity:
    """Similarity of every pair of attention maps of a model.

    Attributes:
        heads: `heads[l, h, m, g]` is the similarity of layer l's head h and layer m's head g, from 0 to 1:

                1 − mean over queries of ½ Σ_k |map[l, h][q, k] − map[m, g][q, k]|

            that is, one minus the total variation of two rows (Bhojanapalli et al., "Leveraging redundancy in
            attention with Reuse Transformers", 2021). Padding is excluded.
        num_queries: number of queries that the mean is taken over.
    """

    heads: Float[Tensor, "layers heads layers heads"]
    num_queries: int

    @property
    def layers(self) -> Float[Tensor, "layers layers"]:
        """Similarity of two layers: maximum over the first layer's heads, mean over the second layer's heads."""
        return self.heads.amax(dim=1).mean(dim=-1)


def similarity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Similarity:
    """Similarity of all pairs of maps of `model`, averaged over the queries of `batches`.

    Raises:
        ValueError: if there are no batches, or a map is not finite.
    """
    (heads,), num_queries = mean_over_queries(model, batches, summed_similarity)
    return Similarity(heads, num_queries)


def summed_similarity(maps: Float[Tensor, "layers heads query key"]) -> Float[Tensor, "layers heads layers heads"]:
    """Similarity of each pair of maps of one sequence, summed over its queries in float64."""
    layers, heads, queries, keys = maps.shape
    flat = maps.flatten(0, 1)
    distances = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=maps.device)  # later head, earlier head
    for rows in flat.split(max(1, _MAX_COMPARED // (len(flat) * keys)), dim=1):
        for head in range(1, len(flat)):
            variation = (rows[:head] - rows[head]).abs().sum(-1)  # of each row: float32 would lose a sum of all
            distances[head, :head] += variation.sum(-1, dtype=torch.float64)
    return (queries - (distances + distances.T) / 2).view(layers, heads, layers, heads)
