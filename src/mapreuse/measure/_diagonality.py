"""Diagonality of attention maps."""

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
    """Cumulative attention diagonality of each attention map of a model.

    C(r) is the share of attention between positions at most r (T − 1) apart, in a sequence of length T:

        C(r) = 1/T Σ_i Σ_{|j − i| ≤ r (T − 1)} map[i, j]
        diagonality = ∫₀¹ C(r) dr = 1 − 1/T Σ_ij map[i, j] |j − i| / (T − 1)

    (Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech Recognition", ICLR 2022). A
    diagonal map has diagonality 1, a uniform map 1 − (T + 1) / 3T, about two thirds for long sequences. Sequences of
    length 1 have diagonality 1. Values are means over the queries of all sequences, without padding.

    Attributes:
        heads: diagonality of each layer and head.
        ranges: values of r, from 0 to 1.
        curve: C(r) of each layer and head.
    """

    heads: Float[Tensor, "layers heads"]
    ranges: Float[Tensor, " points"]
    curve: Float[Tensor, "layers heads points"]


def diagonality(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Diagonality:
    """Diagonality of all maps of `model`, averaged over the queries of `batches`.

    Raises:
        ValueError: if there are no batches, or a map is not finite.
    """
    (found,), _ = mean_over_queries(model, batches, summed_diagonality)
    return diagonality_of(found)


def diagonality_of(mean: Float[Tensor, "layers heads areas_and_points"]) -> Diagonality:
    """Diagonality from the mean of `summed_diagonality`."""
    return Diagonality(mean[..., 0], torch.arange(_STEPS + 1) / _STEPS, mean[..., 1:])


def summed_diagonality(
    maps: Float[Tensor, "layers heads positions positions"],
) -> Float[Tensor, "layers heads areas_and_points"]:
    """Area under C, then C at each range, of each map of one sequence, summed over its queries."""
    mass = _mass_by_distance(maps)
    farthest = maps.shape[-1] - 1
    # ∫ [d ≤ r (T − 1)] dr over r from 0 to 1 is 1 − d / (T − 1).
    areas = 1 - torch.arange(farthest + 1, dtype=torch.float64, device=maps.device) / max(farthest, 1)
    reached = torch.arange(_STEPS + 1, device=maps.device) * farthest // _STEPS
    return torch.cat([(mass * areas).sum(-1, keepdim=True), mass.cumsum(-1)[..., reached]], -1)


def _mass_by_distance(
    maps: Float[Tensor, "layers heads positions positions"],
) -> Float[Tensor, "layers heads positions"]:
    """Sum of map[i, j] over |j − i| = d, for each distance d."""
    size = maps.shape[-1]
    # Reversed rows, each shifted by one more: each diagonal becomes a column, the main one in the middle.
    shifted = nn.functional.pad(maps.flip(-2), (0, size)).flatten(-2)[..., :-size].unflatten(-1, (size, 2 * size - 1))
    diagonals = shifted.sum(-2, dtype=torch.float64)
    mass = diagonals[..., size - 1 :].clone()
    mass[..., 1:] += diagonals[..., : size - 1].flip(-1)
    return mass
