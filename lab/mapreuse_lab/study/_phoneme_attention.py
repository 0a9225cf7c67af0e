"""Attention between phonemes: how much do frames of one phoneme attend to frames of another?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mapreuse.measure import maps_by_sequence
from mapreuse.models import MapRecorder


@dataclass(frozen=True)
class PhonemeAttention:
    """Phoneme attention relationship of each attention map of a model, relative to uniform attention.

    C_p are the frames of class p in a sequence of T frames. E(i) is the run of consecutive frames of one class that
    contains frame i. Summed over sequences,

        attended[p, q] = Σ_{i ∈ C_p} Σ_{j ∈ C_q − E(i)} map[i, j]
        even[p, q]     = Σ_{i ∈ C_p} |C_q − E(i)| / T
        matrices[p, q] = attended[p, q] / even[p, q]

    A uniform map has the value 1 everywhere, whatever the frequencies of the classes. Frames without a class are
    excluded, but count in T. The value is nan if there is no pair of frames.

    The measure follows Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech
    Recognition", ICLR 2022. A frame's own run is excluded, because it is both near and alike. The normalisation by
    `even` and the last two summaries below are choices of this implementation.

    Attributes:
        matrices: for each layer and head, frames of class p (rows) attending to frames of class q (columns).
        same: attention to other frames of the same class, Σ_p attended[p, p] / Σ_p even[p, p]. It is large for heads
            that gather similar sounds across the utterance, and below 1 for diagonal maps.
        same_or_own: the same, including the frame's own run. It is large for diagonal maps.
        same_beyond_position: Σ_p attended[p, p], divided by the attention that the same pairs would get if all pairs
            at one distance |j − i| of a sequence had equal attention. It is 1 for maps that depend on j − i only.
        num_frames: number of frames of each class.
    """

    matrices: Float[Tensor, "layers heads classes classes"]
    same: Float[Tensor, "layers heads"]
    same_or_own: Float[Tensor, "layers heads"]
    same_beyond_position: Float[Tensor, "layers heads"]
    num_frames: Int[Tensor, " classes"]


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
    total: _Sums | None = None
    for batch, classes in zip(batches, labels, strict=True):
        for item, rows, maps in maps_by_sequence(recorder(batch)):
            sums = _Sums.of(maps, classes[item].to(maps.device)[rows].long(), num_classes)
            total = sums if total is None else total.plus(sums)
    assert total is not None, "no batches"
    return total.relative()


def phoneme_attention_data(found: Mapping[str, PhonemeAttention], phonemes: Sequence[str]) -> dict[str, Any]:
    """Phoneme attention of several models with the same classes, for JSON: 4 decimals, None for nan.

    {"phonemes": [name, …], "frames": [number of frames, …],
     "matrices": {model: [per layer: [[class × class, mean over heads]]]},
     "same_phoneme": {model: [[per head] per layer]},
     "same_phoneme_or_own": likewise, "same_phoneme_beyond_position": likewise}
    """
    return {
        "phonemes": list(phonemes),
        "frames": next(iter(found.values())).num_frames.tolist(),
        "matrices": {name: _numbers(one.matrices.mean(1)) for name, one in found.items()},
        "same_phoneme": {name: _numbers(one.same) for name, one in found.items()},
        "same_phoneme_or_own": {name: _numbers(one.same_or_own) for name, one in found.items()},
        "same_phoneme_beyond_position": {name: _numbers(one.same_beyond_position) for name, one in found.items()},
    }


@dataclass(frozen=True)
class _Sums:
    """Sums over sequences of actual and uniform attention, in float64."""

    attended: Float[Tensor, "layers heads classes classes"]
    even: Float[Tensor, "classes classes"]
    attended_or_own: Float[Tensor, "layers heads"]
    even_or_own: Float[Tensor, ""]
    by_position: Float[Tensor, "layers heads"]
    num_frames: Int[Tensor, " classes"]

    @classmethod
    def of(
        cls, maps: Float[Tensor, "layers heads frames frames"], classes: Int[Tensor, " frames"], num_classes: int
    ) -> _Sums:
        """Sums of one sequence without padding. Class −1 means none."""
        length = len(classes)
        member = (classes[:, None] == torch.arange(num_classes, device=classes.device)).double()
        alike = (classes[:, None] == classes) & (classes >= 0)
        run = (classes.diff() != 0).cumsum(0)
        run = torch.cat([run.new_zeros(1), run])
        apart = (run[:, None] != run) & (classes[:, None] >= 0) & (classes >= 0)
        by_layer = [weights.double() for weights in maps]
        return cls(
            torch.stack([member.T @ (weights * apart) @ member for weights in by_layer]).cpu(),
            (member.T @ apart.double() @ member / length).cpu(),
            torch.stack([(weights * alike).sum((-2, -1)) for weights in by_layer]).cpu(),
            (alike.sum() / length).double().cpu(),
            torch.stack([_by_position(weights, apart, alike & apart) for weights in by_layer]).cpu(),
            member.sum(0).long().cpu(),
        )

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    def relative(self) -> PhonemeAttention:
        same = self.attended.diagonal(dim1=-2, dim2=-1).sum(-1)
        return PhonemeAttention(
            (self.attended / self.even).float(),
            (same / self.even.trace()).float(),
            (self.attended_or_own / self.even_or_own).float(),
            (same / self.by_position).float(),
            self.num_frames,
        )


def _by_position(
    weights: Float[Tensor, "heads frames frames"],
    pairs: Bool[Tensor, "frames frames"],
    chosen: Bool[Tensor, "frames frames"],
) -> Float[Tensor, " heads"]:
    """Attention of the chosen pairs, if all pairs at one distance |j − i| had equal attention."""
    steps = torch.arange(len(pairs), device=pairs.device)
    distance = (steps - steps[:, None]).abs().flatten()

    def at_distances(values: Float[Tensor, "rows frames frames"]) -> Float[Tensor, "rows distances"]:
        return values.new_zeros(len(values), len(pairs)).index_add_(1, distance, values.flatten(1))

    mass = at_distances(weights * pairs)
    num_pairs, num_chosen = at_distances(torch.stack([pairs, chosen]).double())
    return (mass * (num_chosen / num_pairs.clamp(min=1))).sum(-1)


def _numbers(values: Tensor) -> Any:
    if values.dim() == 0:
        return None if bool(values.isnan()) else round(values.item(), 4)
    return [_numbers(value) for value in values]
