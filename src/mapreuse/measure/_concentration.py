"""How few keys hold most of an attention map?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.models import MapRecorder


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

    Raises `ValueError` where there are no batches, or epsilon is not between 0 and 1.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
    recorder = MapRecorder(model)
    total, num_queries = None, 0
    for batch in batches:
        maps, valid = recorder(batch)
        for item, rows in enumerate(valid):
            stacked = torch.stack([weights[item][:, rows][:, :, rows] for weights in maps])
            summed = _summed_shares(stacked, epsilon, block_rows)
            total = summed if total is None else total + summed
            num_queries += int(rows.sum())
    if total is None or num_queries == 0:
        raise ValueError("no calibration batches: give at least one, such as [{'input_ids': …}]")
    return Concentration((total / num_queries).float(), epsilon, block_rows)


def _summed_shares(
    maps: Float[Tensor, "layers heads query key"], epsilon: float, block_rows: int
) -> Float[Tensor, "layers heads"]:
    num_keys = maps.shape[-1]
    cumulated = maps.double().cumsum(-1)
    first = (cumulated <= epsilon / 2).sum(-1)  # keys before which at most ε/2 of the row lies
    last = num_keys - (cumulated[..., -1:] - cumulated <= epsilon / 2).sum(-1)  # the last key that is needed
    summed = torch.zeros(maps.shape[:2], dtype=torch.float64, device=maps.device)
    for start in range(0, maps.shape[2], block_rows):
        rows = slice(start, start + block_rows)
        kept = last[..., rows].amax(-1) + 1 - first[..., rows].amin(-1)
        summed += kept.clamp(max=num_keys) / num_keys * first[..., rows].shape[-1]
    return summed.cpu()
