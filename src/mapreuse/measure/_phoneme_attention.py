"""How much do frames attend to other frames of the same phoneme, and to those of every other phoneme?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mapreuse.measure._over_queries import sequences
from mapreuse.models import MapRecorder

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PhonemeAttention:
    """Phoneme attention relationship of every attention map of a model, relative to attending to all frames alike.

    With C_p the frames of class p in a sequence of T frames, and E(i) the run of consecutive frames of one class that
    frame i lies in, summed over sequences,

        attended[p, q] = Σ_{i ∈ C_p} Σ_{j ∈ C_q − E(i)} map[i, j]
        even[p, q]     = Σ_{i ∈ C_p} |C_q − E(i)| / T
        matrices[p, q] = attended[p, q] / even[p, q]

    A map that attends to all frames alike has 1 everywhere, however frequent the classes are. Frames without a class
    neither attend nor are attended here, but count in T. Where no pair of frames is there to be counted, nan.

    The measure is that of Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech
    Recognition", ICLR 2022, as far as summaries of the paper tell, which give C_p − E(i): a frame's own run is left
    out, for it is near as well as alike. Its text was out of reach: how it normalises could not be confirmed.
    Dividing by `even`, and the last two summaries below, are choices made here.

    Attributes:
        matrices: for every layer and head, frames of class p (rows) attending to frames of class q (columns).
        same: attention to other frames of a frame's own class, Σ_p attended[p, p] / Σ_p even[p, p]. The more a head
            gathers from alike sounds all over the utterance, the larger; a diagonal map, which stays near, has less
            than 1.
        same_or_own: the same with the own run and the frame itself; a diagonal map has a large one.
        same_beyond_position: Σ_p attended[p, p], over what the same pairs of frames would be paid if, in each
            sequence, attended mass were shared evenly among all pairs at one distance |j − i|. A map that depends on
            j − i alone, diagonal or not, has 1.
        num_frames: how many frames of every class there were.
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
    """How much frames of one class attend to those of another, in all maps of `model`; one batch at a time.

    Args:
        model: a model that `apply` accepts, or to which a plan was applied; it is left as it is. A layer that reuses
            a map counts with the map it applies.
        batches: keyword dictionaries for the model's forward.
        labels: for every batch, integers of shape (batch, frames): the class, from 0 to `num_classes` − 1, of every
            position of the maps, −1 where it has none. Those of padding are not looked at.
        num_classes: how many classes there are.

    Raises:
        ValueError: where there are no batches or no frame has a class, batches and labels are not of one number and
            shape, a label is not a class, or a map is not finite.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    recorder = MapRecorder(model, under_plan=True)
    total: _Sums | None = None
    for number, (batch, classes) in enumerate(zip_longest(batches, labels)):
        if batch is None or classes is None:
            more, fewer = ("batches", "labels") if classes is None else ("labels", "batches")
            raise ValueError(f"there are more {more} than {fewer}, of which there are {number}: give as many of each")
        recording = recorder(batch)
        _check(classes, recording.valid, number)
        for item, rows, maps in sequences(recording):
            sums = _Sums.of(maps, _classes(classes[item].to(maps.device)[rows], num_classes, number), num_classes)
            total = sums if total is None else total.plus(sums)
    if total is None:
        raise ValueError("no calibration batches: give at least one, such as [{'input_features': …}]")
    if not bool(total.num_frames.any()):
        raise ValueError("no frame has a class: all labels are −1, or those of padding")
    return total.relative()


def phoneme_attention_data(found: Mapping[str, PhonemeAttention], phonemes: Sequence[str]) -> dict[str, Any]:
    """What JSON can hold of the phoneme attention of several models of the same classes: to 4 decimals, None for nan.

        {"phonemes": [name, …], "frames": [how many, …],
         "matrices": {model: [per layer: [[class × class, mean over heads]]]},
         "same_phoneme": {model: [[per head] per layer]},
         "same_phoneme_or_own": likewise, "same_phoneme_beyond_position": likewise}

    Raises `ValueError` where there is not one name for every class.
    """
    for name, one in found.items():
        if len(phonemes) != len(one.num_frames):
            raise ValueError(f"{len(phonemes)} phonemes are named, but {name} has {len(one.num_frames)} classes")
    frames = [one.num_frames for one in found.values()]
    return {
        "phonemes": list(phonemes),
        "frames": frames[0].tolist() if frames else [],
        "matrices": {name: _numbers(one.matrices.mean(1)) for name, one in found.items()},
        "same_phoneme": {name: _numbers(one.same) for name, one in found.items()},
        "same_phoneme_or_own": {name: _numbers(one.same_or_own) for name, one in found.items()},
        "same_phoneme_beyond_position": {name: _numbers(one.same_beyond_position) for name, one in found.items()},
    }


@dataclass(frozen=True)
class _Sums:
    """Of some sequences: what is attended, and what would be, in float64."""

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
        """Of one sequence without its padding; a class of −1 is none."""
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
    """What the chosen of the pairs would be paid if all pairs at one distance were paid alike.

    Both directions are one distance: with (i, j), (j, i) is a pair, and chosen or not like it.
    """
    steps = torch.arange(len(pairs), device=pairs.device)
    distance = (steps - steps[:, None]).abs().flatten()

    def at_distances(values: Float[Tensor, "rows frames frames"]) -> Float[Tensor, "rows distances"]:
        return values.new_zeros(len(values), len(pairs)).index_add_(1, distance, values.flatten(1))

    mass = at_distances(weights * pairs)
    there, wanted = at_distances(torch.stack([pairs, chosen]).double())
    return (mass * (wanted / there.clamp(min=1))).sum(-1)


def _check(labels: Tensor, valid: Bool[Tensor, "batch frames"], number: int) -> None:
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"the labels of batch {number} must be integers, got {labels.dtype}")
    if labels.shape != valid.shape:
        raise ValueError(
            f"the labels of batch {number} are of shape {tuple(labels.shape)}, its maps of {tuple(valid.shape)} "
            "(batch, frames): give one label for every frame that attends, not for every frame of features"
        )


def _classes(labels: Tensor, num_classes: int, number: int) -> Int[Tensor, " frames"]:
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"batch {number} has the label {int(wrong[0])}: a class is one of 0 to {num_classes - 1}, none is −1"
        )
    return labels.long()


def _numbers(values: Tensor) -> Any:
    if values.dim() == 0:
        return None if bool(values.isnan()) else round(values.item(), 4)
    return [_numbers(value) for value in values]
