"""Nyström attention: a T × T map made of three maps through M landmarks.

    context = softmax(Q K̃ᵀ / √d) · pinv(softmax(Q̃ K̃ᵀ / √d)) · (softmax(Q̃ Kᵀ / √d) V)

with Q, K, V (H, T, d), and Q̃, K̃ (H, M, d) the means over M equal segments of an utterance's frames. Six steps of
Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))) from Z = Aᵀ / (‖A‖₁ ‖A‖∞) approximate the pseudo-inverse of A.

Cost: 8·T·M·C FLOPs and, for every head, 48·M³ for the pseudo-inverse. Stored: 2·T·M·H numbers.

Segments follow each utterance's own length, so nothing depends on padding. An utterance with fewer than M frames has
as many landmarks as frames, and its context approaches that of full attention without positions. The paper adds a
convolution of the values; here the Conformer's own convolution follows. Positions are dropped: landmarks have none.
Attention dropout is not applied, as in the authors' code.

Paper: https://arxiv.org/abs/2102.03902
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import ContentAttention
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique

_STEPS = 6


class NystromAttention(ContentAttention):
    """Attention through landmarks."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, values = self.project(hidden_states)
        return _attend(query * self.scaling, key, values, valid, self.technique.landmarks).transpose(1, 2)


def _attend(
    query: Float[Tensor, "batch heads frames dim"],
    key: Float[Tensor, "batch heads frames dim"],
    values: Float[Tensor, "batch heads frames value_dim"],
    valid: Bool[Tensor, "batch frames"] | None,
    landmarks: int,
) -> Float[Tensor, "batch heads frames value_dim"]:
    """The context of scaled queries. Means of projected frames are projections of mean frames."""
    batch, heads, frames, _ = query.shape
    lengths = torch.full((batch,), frames, device=query.device) if valid is None else valid.sum(1)
    (few_queries, used), (few_keys, _) = (
        _segment_means(part.transpose(1, 2).flatten(2), lengths, landmarks) for part in (query, key)
    )
    few_queries, few_keys = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (few_queries, few_keys))
    mask = None if valid is None else valid[:, None, None, :]
    gathered = functional.scaled_dot_product_attention(few_queries, key, values, mask, scale=1.0)
    unused = ~used[:, None, None, :]
    between = _softmax(few_queries @ few_keys.mT, unused).masked_fill(unused.mT, 0.0)
    to_landmarks = _softmax(query @ few_keys.mT, unused)
    return to_landmarks @ (_pseudo_inverse(between) @ gathered)


def _segment_means(
    hidden_states: Float[Tensor, "batch frames width"], lengths: Int[Tensor, " batch"], segments: int
) -> tuple[Float[Tensor, "batch segments width"], Bool[Tensor, "batch segments"]]:
    """Means of equal segments of each item's first `lengths` frames, and True for the segments that the item has."""
    batch, frames, width = hidden_states.shape
    lengths = lengths[:, None]
    numbers = lengths.clamp(max=segments)
    places = torch.arange(frames, device=hidden_states.device)
    segment = torch.where(places < lengths, places * numbers // lengths.clamp(min=1), segments)
    sums = hidden_states.new_zeros(batch, segments + 1, width)
    sums = sums.scatter_add(1, segment[..., None].expand_as(hidden_states), hidden_states)
    counts = hidden_states.new_zeros(batch, segments + 1).scatter_add(
        1, segment, hidden_states.new_ones(segment.shape)
    )
    means = sums[:, :segments] / counts[:, :segments, None].clamp(min=1)
    return means, torch.arange(segments, device=hidden_states.device) < numbers


def _pseudo_inverse(maps: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch size size"]:
    """Moore–Penrose inverses by iteration (Razavi et al., 2014); rows and columns of zeros stay zero.

    Paper: https://doi.org/10.1155/2014/563787
    """
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    sums = maps.abs().sum(-1).amax(-1) * maps.abs().sum(-2).amax(-1)
    inverse = maps.mT / sums.clamp(min=torch.finfo(maps.dtype).tiny)[..., None, None]
    for _ in range(_STEPS):
        product = maps @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse


def _softmax(scores: Tensor, unused: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(unused, torch.finfo(scores.dtype).min), dim=-1)


class Nystrom(Technique, notation="nystrom-{landmarks}", label="Nyström, {landmarks} landmarks"):
    """Maps through `landmarks` means of frames."""

    landmarks: int
    source = "Xiong et al., Nyströmformer, AAAI 2021"
    attention = NystromAttention
    not_causal = "its landmarks are means over all tokens, later ones included"

    def attend(self, inputs: AttentionInputs) -> Tensor:
        query = inputs.query * inputs.scaling
        return _attend(query, inputs.key, inputs.values, inputs.valid, self.landmarks)
