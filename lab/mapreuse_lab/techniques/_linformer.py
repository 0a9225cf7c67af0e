"""Linformer: keys and values projected along time to a fixed number of slots.

    K', V' = Wk(E x), Wv(E x);    context = softmax(Q K'ᵀ / √d) V'

with frames x (T, C), E (k, T), Q (H, T, d), K' and V' (H, k, d).

Cost: 2·k·T·C FLOPs to project along time, 4·k·T·C for scores and context; key and value projections of k frames.
Stored: k·T weights of E, H·T·k of the map.

In the paper E has a column for every position up to a maximum length. Utterances differ in length, so here E is
learned at 256 points from the beginning to the end of an utterance and interpolated to its frames. Every slot then
reads the same part of an utterance at any length, and nothing depends on padding. The factor √256 / T keeps sums
from growing with T. It also makes an optimiser step change them about as much as other projections.

Keys, values and heads of a layer share E (the paper's key-value sharing). Frames can therefore be mixed before they
are projected, which is the same but for the biases. Positions are dropped: a slot has none.

Paper: https://arxiv.org/abs/2006.04768
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import ContentAttention
from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core
from mapreuse_lab.techniques._technique import Technique

POINTS = 256
"""Points of an utterance at which the projection along time is learned."""


class LinformerAttention(ContentAttention):
    """Attention over learned mixtures of all frames."""

    def __init__(self, original: ParakeetEncoderAttention, technique: Linformer, layer: int) -> None:
        super().__init__(original, technique, layer)
        self.mixture = nn.Parameter(original.q_proj.weight.new_empty(technique.slots, POINTS).normal_())

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        mixed = _weights(self.mixture, hidden_states.shape[1], valid).to(hidden_states.dtype) @ hidden_states
        key, values = self.split(self.k_proj(mixed)), self.split(self.v_proj(mixed))
        query = self.split(self.q_proj(hidden_states))
        context = functional.scaled_dot_product_attention(query, key, values, dropout_p=self.dropout_p())
        return context.transpose(1, 2)


class LinformerCore(Core):
    """Attention over mixtures of keys and values in a pretrained model; at first, each is a mean of a segment."""

    def __init__(self, technique: Linformer, layer: AttentionLayer) -> None:
        super().__init__(technique, layer)
        slots = technique.slots
        segment = torch.arange(POINTS) * slots // POINTS
        means = (segment == torch.arange(slots)[:, None]) * slots / POINTS**0.5
        self.mixture = nn.Parameter(means.to(layer.projection("query").weight))

    def forward(self, inputs: AttentionInputs) -> Tensor:
        weights = _weights(self.mixture, inputs.key.shape[2], inputs.valid)[:, None].to(inputs.key.dtype)
        return functional.scaled_dot_product_attention(
            inputs.query,
            weights @ inputs.key,
            weights @ inputs.values,
            dropout_p=inputs.dropout_p,
            scale=inputs.scaling,
        )


def _weights(
    mixture: Float[Tensor, "slots points"], frames: int, valid: Bool[Tensor, "batch frames"] | None
) -> Float[Tensor, "some slots frames"]:
    """E of every item, by linear interpolation; zero for padding."""
    lengths = mixture.new_full((1, 1), frames) if valid is None else valid.sum(1, keepdim=True).clamp(min=1)
    places = (torch.arange(frames, device=mixture.device) + 0.5) * POINTS / lengths - 0.5
    places = places.clamp(0, POINTS - 1)
    left = places.floor().long().clamp(max=POINTS - 2)
    share = (places - left).to(mixture.dtype)
    between = mixture[:, left] * (1 - share) + mixture[:, left + 1] * share
    weights = between.transpose(0, 1) * (POINTS**0.5 / lengths)[:, None]
    return weights if valid is None else weights * valid[:, None]


class Linformer(Technique, notation="linformer-{slots}", label="Linformer, {slots} slots"):
    """Keys and values of `slots` learned mixtures of frames."""

    slots: int
    source = "Wang et al., Linformer, arXiv 2006.04768"
    attention = LinformerAttention
    core = LinformerCore
    not_causal = "its slots are mixtures of all tokens, later ones included"
