"""How alike are the maps of two layers?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.models import MapRecorder


@dataclass(frozen=True)
class Similarity:
    """Similarity of every pair of attention maps of a model.

    Attributes:
        heads: `heads[l, h, m, g]` is the similarity of layer l's head h and layer m's head g, from 0 to 1:

                1 − mean over queries of ½ Σ_k |map[l, h][q, k] − map[m, g][q, k]|

            one minus the total variation of two rows (Bhojanapalli et al., "Leveraging redundancy in attention with
            Reuse Transformers", 2021). Padding is left out.
        num_queries: how many rows the mean was taken over.
    """

    heads: Float[Tensor, "layers heads layers heads"]
    num_queries: int

    @property
    def layers(self) -> Float[Tensor, "layers layers"]:
        """Similarity of two layers: each head of the second to its most similar head of the first, averaged."""
        return self.heads.amax(dim=1).mean(dim=-1)


def similarity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Similarity:
    """Similarity of all pairs of maps of `model`, averaged over the queries of `batches`, one batch at a time.

    Raises `ValueError` where there are no batches, or a map is not finite.
    """
    recorder = MapRecorder(model)
    total, num_queries = None, 0
    for batch in batches:
        maps, valid = recorder(batch)
        summed = _summed_similarity(maps, valid)
        if not bool(torch.isfinite(summed).all()):
            raise ValueError("an attention map is not finite: check the model's weights and the calibration batches")
        total = summed if total is None else total + summed
        num_queries += int(valid.sum())
    if total is None or num_queries == 0:
        raise ValueError("no calibration batches: give at least one, such as [{'input_ids': …}]")
    return Similarity((total / num_queries).float(), num_queries)


def _summed_similarity(
    maps: list[Float[Tensor, "batch heads query key"]], valid: Bool[Tensor, "batch query"]
) -> Float[Tensor, "layers heads layers heads"]:
    layers, heads = len(maps), maps[0].shape[1]
    summed = torch.zeros(layers, heads, layers, heads, dtype=torch.float64)
    for item, rows in enumerate(valid):
        stacked = torch.stack([weights[item][:, rows][:, :, rows] for weights in maps]).flatten(0, 1)
        flat = stacked.flatten(1)
        distance = torch.cdist(flat, flat, p=1) / 2
        alike = int(rows.sum()) - distance
        summed += alike.double().cpu().view(layers, heads, layers, heads)
    return summed
