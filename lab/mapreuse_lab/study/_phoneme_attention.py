"""Attention between phonemes: how much do frames of one phoneme attend to frames of another?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapreuse.measure import maps_by_sequence
from mapreuse.models import MapRecorder


@dataclass(frozen=True)
class PhonemeAttention:
    """Phoneme attention relationship of each attention map of a model, relative to uniform attention.

    C_p are the frames of class p in a sequence of T frames. E(i) is the run of consecutive frames of one class that
    contains frame i. Summed over sequences,

        attended[p, q] = Σ_{i ∈ C_p} Σ_{j ∈ C_q − E(i)} map[i, j]
        uniform[p, q]  = Σ_{i ∈ C_p} |C_q − E(i)| / T

    A uniform map has the value 1 everywhere, whatever the frequencies of the classes. Frames without a class are
    excluded, but count in T. The value is nan if there is no pair of frames.

    The measure follows Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech
    Recognition", ICLR 2022. A frame's own run is excluded, because it is both near and alike. The normalisation by
    `uniform` is a choice of this implementation.

    Attributes:
        matrices: attended / uniform, for frames of class p (rows) that attend to frames of class q (columns).
        same: attention to other frames of the same class, Σ_p attended[p, p] / Σ_p uniform[p, p]. It is large
            for heads that gather similar sounds across the utterance, and below 1 for diagonal maps.
    """

    matrices: Float[Tensor, "layers heads classes classes"]
    same: Float[Tensor, "layers heads"]


def phoneme_attention(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    labels: Iterable[Tensor],
    *,
    num_classes: int,
) -> PhonemeAttention:
    """Attention between frames of each pair of classes, in all maps of `model`.

    Args:
        model: a model that `apply` accepts, with or without a plan. It is not changed. A reusing layer counts
            with the map that it applies.
        batches: keyword dictionaries for the model's forward.
        labels: for each batch, integers of shape (batch, frames): the class of each position of the maps, from 0 to
            `num_classes` − 1, or −1 for none. Labels of padding are ignored.
        num_classes: number of classes.

    Raises:
        ValueError: if there are more batches than labels or the reverse, or a map is not finite.
    """
    recorder = MapRecorder(model, under_plan=True)
    attended = uniform = torch.zeros((), dtype=torch.float64)
    for batch, classes in zip(batches, labels, strict=True):
        for item, rows, maps in maps_by_sequence(recorder(batch)):
            here = _attended_and_uniform(maps, classes[item].to(maps.device)[rows].long(), num_classes)
            attended, uniform = attended + here[0].cpu(), uniform + here[1].cpu()
    same = attended.diagonal(dim1=-2, dim2=-1).sum(-1) / uniform.trace()
    return PhonemeAttention((attended / uniform).float(), same.float())


def _attended_and_uniform(
    maps: Float[Tensor, "layers heads frames frames"], classes: Int[Tensor, " frames"], num_classes: int
) -> tuple[Float[Tensor, "layers heads classes classes"], Float[Tensor, "classes classes"]]:
    """Actual and uniform attention in one sequence without padding, in float64. Class −1 means none."""
    member = (classes[:, None] == torch.arange(num_classes, device=classes.device)).double()
    changes = (classes.diff() != 0).cumsum(0)
    run = torch.cat([changes.new_zeros(1), changes])
    apart = run[:, None] != run
    attended = torch.stack([member.T @ (weights.double() * apart) @ member for weights in maps])
    return attended, member.T @ apart.double() @ member / len(classes)
