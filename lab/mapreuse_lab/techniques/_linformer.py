"""Linformer: keys and values projected along time to a fixed number of slots.

    K', V' = Wk(E x), Wv(E x),    E (k, T);    context = softmax(Q K'ᵀ / √d) V'

Cost: 2·k·T·C FLOPs to project along time, 4·k·T·C for scores and context; key and value projections of k frames.
Stored: k·T weights of E, H·T·k of the map.

Linformer's E has a column for every position up to a greatest length. Utterances differ in length, so here E is
learned at 256 points from the beginning to the end of an utterance and interpolated to its frames (times √256 / T, so
that sums do not grow with T, and a step of the optimiser moves them about as far as other projections): every slot
reads the same part of an utterance however long it is, and nothing depends on padding. E is shared by keys, values
and heads (the paper's key-value sharing), so frames are mixed before they are projected, which is the same but for
the biases; every layer has its own. Positions are dropped: a slot has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import ContentAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register

POINTS = 256
"""Points of an utterance at which the projection along time is learned."""


@register("linformer-K", r"linformer-(?P<slots>\d+)")
@dataclass(frozen=True)
class Linformer:
    """Keys and values of `slots` learned mixtures of frames."""

    slots: int
    source: ClassVar[str] = "Wang et al., Linformer, arXiv 2006.04768"
    positions: ClassVar[str] = "dropped"

    def __post_init__(self) -> None:
        check_at_least_one(slots=self.slots)

    @property
    def name(self) -> str:
        return f"linformer-{self.slots}"

    @property
    def title(self) -> str:
        return f"Linformer, {self.slots} slots"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: LinformerAttention(original, self.slots))
        return model


class LinformerAttention(ContentAttention):
    """Attention over learned mixtures of all frames."""

    def __init__(self, original: ParakeetEncoderAttention, slots: int) -> None:
        super().__init__(original)
        weight = original.q_proj.weight
        self.mixture = nn.Parameter(weight.new_empty(slots, POINTS).normal_())

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        mixed = self._weights(hidden_states, valid).to(hidden_states.dtype) @ hidden_states
        key, values = self.split(self.k_proj(mixed)), self.split(self.v_proj(mixed))
        query = self.split(self.q_proj(hidden_states))
        context = functional.scaled_dot_product_attention(query, key, values, dropout_p=self.dropout_p())
        return context.transpose(1, 2)

    def _weights(
        self, hidden_states: Float[Tensor, "batch frames width"], valid: Bool[Tensor, "batch frames"] | None
    ) -> Float[Tensor, "some slots frames"]:
        """E of every item, by linear interpolation; zero for padding."""
        frames = hidden_states.shape[1]
        lengths = hidden_states.new_full((1, 1), frames) if valid is None else valid.sum(1, keepdim=True).clamp(min=1)
        places = (torch.arange(frames, device=hidden_states.device) + 0.5) * POINTS / lengths - 0.5
        places = places.clamp(0, POINTS - 1)
        left = places.floor().long().clamp(max=POINTS - 2)
        share = (places - left).to(self.mixture.dtype)
        between = self.mixture[:, left] * (1 - share) + self.mixture[:, left + 1] * share
        weights = between.transpose(0, 1) * (POINTS**0.5 / lengths)[:, None]
        return weights if valid is None else weights * valid[:, None]
