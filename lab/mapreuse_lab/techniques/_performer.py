"""Performer: softmax attention estimated with positive random features (FAVOR+).

    context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1)
    φ(x) = exp(Ω x' − ‖x'‖²/2 − m) + ε,    x' = x / d^¼

with Q, K, V (H, T, d) and Ω (M, d). Rows of Ω are orthogonal in blocks of d and have the lengths of normal vectors,
so that E[φ(q) · φ(k)] ∝ exp(q · k / √d). m keeps exponents near zero: the maximum of a query's row, and the maximum
over all keys. ε = 10⁻⁴, as in the authors' code.

Cost: 4·T·H·M·d FLOPs for features, 4·T·H·M·(d + 1) for contexts. Stored: features, 2·T·H·M numbers.

Ω is drawn once for each layer, shared by its heads, and saved with the weights; the authors may draw it anew during
training. There are no scores and no weights, so positions are dropped and attention dropout is not applied.

Paper: https://arxiv.org/abs/2009.14794
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import ContentAttention
from mapreuse_lab.techniques._linear import attend_by_features
from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core
from mapreuse_lab.techniques._technique import Technique

_EPSILON = 1e-4


class PerformerAttention(ContentAttention):
    """Attention by positive random features."""

    directions: Tensor

    def __init__(self, original: ParakeetEncoderAttention, technique: Performer, layer: int) -> None:
        super().__init__(original, technique, layer)
        directions = _orthogonal_directions(technique.num_features, self.head_dim)
        self.register_buffer("directions", directions.to(original.q_proj.weight))

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, values = self.project(hidden_states)
        return attend_by_features(*_features(query, key, self.scaling, self.directions, valid), values)


class PerformerCore(Core):
    """Attention by positive random features in a pretrained model."""

    directions: Tensor

    def __init__(self, technique: Performer, layer: AttentionLayer) -> None:
        super().__init__(technique, layer)
        directions = _orthogonal_directions(technique.num_features, layer.head_dim)
        self.register_buffer("directions", directions.to(layer.projection("query").weight))

    def forward(self, inputs: AttentionInputs) -> Tensor:
        features = _features(inputs.query, inputs.key, inputs.scaling, self.directions, inputs.valid)
        return attend_by_features(*features, inputs.values).transpose(1, 2)


def _features(
    query: Float[Tensor, "batch heads frames dim"],
    key: Float[Tensor, "batch heads frames dim"],
    scaling: float,
    directions: Float[Tensor, "features dim"],
    valid: Bool[Tensor, "batch frames"] | None,
) -> tuple[Tensor, Tensor]:
    """φ(Q), and φ(K) with zeros for padding."""
    query, key = query * scaling**0.5, key * scaling**0.5
    by_direction = query @ directions.mT
    query_features = _positive(by_direction, query, by_direction.amax(-1, keepdim=True))
    by_direction = key @ directions.mT
    unpadded = by_direction.detach()
    if valid is not None:
        unpadded = unpadded.masked_fill(~valid[:, None, :, None], -torch.inf)
    maximum = unpadded.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(key.dtype).min)
    key_features = _positive(by_direction, key, maximum)
    if valid is not None:
        key_features = key_features.masked_fill(~valid[:, None, :, None], 0.0)
    return query_features, key_features


def _positive(
    by_direction: Float[Tensor, "batch heads frames features"],
    vectors: Float[Tensor, "batch heads frames dim"],
    maximum: Tensor,
) -> Float[Tensor, "batch heads frames features"]:
    return (by_direction - vectors.square().sum(-1, keepdim=True) / 2 - maximum.detach()).exp() + _EPSILON


def _orthogonal_directions(number: int, dim: int) -> Float[Tensor, "number dim"]:
    """Rows that are orthogonal in blocks of `dim`, each with the length of a random normal vector."""
    blocks = [torch.linalg.qr(torch.randn(dim, dim))[0].mT for _ in range(-(-number // dim))]
    lengths = torch.randn(number, dim).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:number] * lengths


class Performer(Technique, notation="performer-{num_features}", label="Performer, {num_features} features"):
    """Softmax attention estimated with `num_features` random features of every query and key."""

    num_features: int
    source = "Choromanski et al., Rethinking Attention with Performers, ICLR 2021"
    attention = PerformerAttention
    core = PerformerCore
    not_causal = "its features of keys are scaled by a maximum over all tokens, later ones included"
