"""Similarity, entropy and diagonality of attention maps, measured in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.console import tracked
from mapreuse.models import MapRecorder, Recording, check_batch

CURVE_STEPS = 20
"""Number of steps of r, from 0 to 1; see `Analysis.diagonality_curve`."""
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


@dataclass(frozen=True)
class Analysis:
    """Properties of a model's attention maps, by layer and head. Values are means over queries, without padding.

    Attributes:
        similarity: similarity of each pair of maps. It shows which layers can share a map.
        entropy: − Σ_k map[q, k] ln map[q, k], in nats: 0 if each query attends to one key.
        relative_entropy: entropy ÷ ln K, for sequences of K keys: 0 if each query attends to one key or K = 1, and 1
            if all keys get equal attention. Causal maps stay below 1, because early queries see few keys.
        diagonality: cumulative attention diagonality (Shim, Choi & Sung, "Understanding the Role of Self Attention
            for Efficient Speech Recognition", ICLR 2022), for a sequence of length T:

                C(r) = 1/T Σ_i Σ_{|j − i| ≤ r (T − 1)} map[i, j]
                diagonality = ∫₀¹ C(r) dr = 1 − 1/T Σ_ij map[i, j] |j − i| / (T − 1)

            A diagonal map has diagonality 1, a uniform map 1 − (T + 1) / 3T, about two thirds for long sequences.
        diagonality_curve: C(r) for r = 0, 0.05, …, 1.
    """

    similarity: Similarity
    entropy: Float[Tensor, "layers heads"]
    relative_entropy: Float[Tensor, "layers heads"]
    diagonality: Float[Tensor, "layers heads"]
    diagonality_curve: Float[Tensor, "layers heads points"]


def analyze(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Analysis:
    """Measure similarity, entropy and diagonality of all maps of `model`, in one pass.

    Args:
        model: a model that `apply` accepts. It is not changed.
        batches: keyword dictionaries for the model's forward.

    Raises:
        ValueError: if there are no batches, or a map is not finite.
    """
    measures = (summed_similarity, summed_entropy, summed_diagonality)
    recorder = MapRecorder(model, under_plan=True)
    totals: list[Tensor | float] = [0.0] * len(measures)
    num_queries = 0
    for batch in tracked("Analyzing", batches):
        check_batch(batch)
        for _, rows, maps in maps_by_sequence(recorder(batch)):
            totals = [total + measure(maps).cpu() for total, measure in zip(totals, measures, strict=True)]
            num_queries += int(rows.sum())
    if num_queries == 0:
        raise ValueError(
            "no calibration batches, or only padding: pass at least one batch, such as [{'input_ids': …}]"
        )
    means = [(torch.as_tensor(total) / num_queries).float() for total in totals]
    heads, (entropy, relative_entropy), diagonalities = means
    similarity = Similarity(heads, num_queries)
    return Analysis(similarity, entropy, relative_entropy, diagonalities[..., 0], diagonalities[..., 1:])


def maps_by_sequence(
    recording: Recording,
) -> Iterator[tuple[int, Bool[Tensor, " positions"], Float[Tensor, "layers heads query key"]]]:
    """For each sequence of a batch: its index, a mask of its valid positions, and its maps without padding.

    Maps in half precision are converted to float32. Sequences with padding only are skipped.

    Raises:
        ValueError: if a map is not finite.
    """
    for item, rows in enumerate(recording.valid):
        if not bool(rows.any()):
            continue
        maps = torch.stack([weights[item][:, rows][:, :, rows] for weights in recording.maps])
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if not bool(torch.isfinite(maps).all()):
            raise ValueError("an attention map is not finite: check the model's weights and the calibration batches")
        yield item, rows, maps


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


def summed_entropy(maps: Float[Tensor, "layers heads query key"]) -> Float[Tensor, "2 layers heads"]:
    """Entropy of each map of one sequence, summed over its queries: in nats, and relative to ln K."""
    nats = torch.special.entr(maps).sum((-2, -1), dtype=torch.float64)
    num_keys = maps.shape[-1]
    return torch.stack([nats, nats / math.log(num_keys) if num_keys > 1 else torch.zeros_like(nats)])


def summed_diagonality(
    maps: Float[Tensor, "layers heads positions positions"],
) -> Float[Tensor, "layers heads areas_and_points"]:
    """Area under C, then C at each range, of each map of one sequence, summed over its queries."""
    mass = _mass_by_distance(maps)
    farthest = maps.shape[-1] - 1
    # ∫ [d ≤ r (T − 1)] dr over r from 0 to 1 is 1 − d / (T − 1).
    areas = 1 - torch.arange(farthest + 1, dtype=torch.float64, device=maps.device) / max(farthest, 1)
    reached = torch.arange(CURVE_STEPS + 1, device=maps.device) * farthest // CURVE_STEPS
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
