"""How near the diagonal does a map's mass lie?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.measure._over_queries import mean_over_queries

_STEPS = 20  # from one end of the curve to the other


@dataclass(frozen=True)
class Diagonality:
    """Cumulative attention diagonality of every attention map of a model.

    With C(r) the share of a map's mass that lies within r of the length of its sequence, T positions, from the
    diagonal,

        C(r) = 1/T Σ_i Σ_{|j − i| ≤ r (T − 1)} map[i, j]
        diagonality = ∫₀¹ C(r) dr = 1 − 1/T Σ_ij map[i, j] |j − i| / (T − 1)

    (Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech Recognition", ICLR 2022). A map
    on the diagonal has 1; one that attends to all positions alike 1 − (T + 1) / 3T, two thirds on long sequences.
    Where there is one position, 1. Of several sequences, the mean over their queries; padding is left out.

    Attributes:
        heads: diagonality of every layer and head.
        ranges: values of r, from 0 to 1.
        curve: C(r) of every layer and head.
    """

    heads: Float[Tensor, "layers heads"]
    ranges: Float[Tensor, " points"]
    curve: Float[Tensor, "layers heads points"]


def diagonality(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Diagonality:
    """Diagonality of all maps of `model`, averaged over the queries of `batches`, one batch at a time.

    Raises `ValueError` where there are no batches, or a map is not finite.
    """
    (found,), _ = mean_over_queries(model, batches, summed_diagonality)
    return diagonality_of(found)


def diagonality_of(mean: Float[Tensor, "layers heads areas_and_points"]) -> Diagonality:
    """From the mean of `summed_diagonality`."""
    return Diagonality(mean[..., 0], torch.arange(_STEPS + 1) / _STEPS, mean[..., 1:])


def summed_diagonality(
    maps: Float[Tensor, "layers heads positions positions"],
) -> Float[Tensor, "layers heads areas_and_points"]:
    """Of each map of one sequence, summed over its queries: the area under C, then C at every range."""
    mass = _mass_by_distance(maps)
    farthest = maps.shape[-1] - 1
    # ∫ [d ≤ r (T − 1)] dr over r from 0 to 1 is 1 − d / (T − 1).
    areas = 1 - torch.arange(farthest + 1, dtype=torch.float64, device=maps.device) / max(farthest, 1)
    reached = torch.arange(_STEPS + 1, device=maps.device) * farthest // _STEPS
    return torch.cat([(mass * areas).sum(-1, keepdim=True), mass.cumsum(-1)[..., reached]], -1)


def _mass_by_distance(
    maps: Float[Tensor, "layers heads positions positions"],
) -> Float[Tensor, "layers heads positions"]:
    """Σ of map[i, j] over |j − i| = d, for every distance d."""
    size = maps.shape[-1]
    # Rows in reverse, each shifted by one more: every diagonal becomes a column, the main one in the middle.
    shifted = nn.functional.pad(maps.flip(-2), (0, size)).flatten(-2)[..., :-size].unflatten(-1, (size, 2 * size - 1))
    diagonals = shifted.sum(-2, dtype=torch.float64)
    mass = diagonals[..., size - 1 :].clone()
    mass[..., 1:] += diagonals[..., : size - 1].flip(-1)
    return mass
