"""Entropy of attention maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.measure._over_queries import mean_over_queries


@dataclass(frozen=True)
class Entropy:
    """Entropy of each attention map of a model.

    Attributes:
        heads: for each layer and head, the mean over queries q of

                − Σ_k map[q, k] ln map[q, k]

            in nats: 0 if each query attends to one key. Padding is excluded.
        relative: mean over queries of entropy ÷ ln K, for sequences of K valid keys: 0 if each query attends to one
            key, 1 if all keys get equal attention, and 0 if K = 1. Causal maps stay below 1, because early queries
            see few keys.
    """

    heads: Float[Tensor, "layers heads"]
    relative: Float[Tensor, "layers heads"]


def entropy(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Entropy:
    """Entropy of all maps of `model`, averaged over the queries of `batches`.

    Raises:
        ValueError: if there are no batches, or a map is not finite.
    """
    (both,), _ = mean_over_queries(model, batches, summed_entropy)
    return Entropy(*both)


def summed_entropy(maps: Float[Tensor, "layers heads query key"]) -> Float[Tensor, "2 layers heads"]:
    """Entropy of each map of one sequence, summed over its queries: in nats, and relative to ln K."""
    nats = torch.special.entr(maps).sum((-2, -1), dtype=torch.float64)
    num_keys = maps.shape[-1]
    return torch.stack([nats, nats / math.log(num_keys) if num_keys > 1 else torch.zeros_like(nats)])
