"""Performer: softmax attention estimated with positive random features (FAVOR+).

    context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1)
    φ(x) = exp(Ω x' − ‖x'‖²/2 − m) + ε,    x' = x / d^¼,    Ω (M, d)

Rows of Ω are orthogonal in blocks of d, with the lengths of normal vectors, so that E[φ(q) · φ(k)] ∝ exp(q · k / √d).
m keeps exponents near zero: the greatest of a query's row, the greatest of all keys. ε = 10⁻⁴, as the authors' code.

Cost: 4·T·H·M·d FLOPs for features, 4·T·H·M·(d + 1) for contexts. Stored: features, 2·T·H·M numbers.

Ω is drawn once for each layer, shared by its heads, and kept with the weights; the authors may draw it anew during
training. Positions are dropped, and attention dropout is not applied: there are no scores and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import ContentAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._kernels import kernel_attention
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register

_EPSILON = 1e-4


@register("performer-M", r"performer-(?P<num_features>\d+)")
@dataclass(frozen=True)
class Performer:
    """Softmax attention estimated with `num_features` random features of every query and key."""

    num_features: int
    source: ClassVar[str] = "Choromanski et al., Rethinking Attention with Performers, ICLR 2021"
    positions: ClassVar[str] = "dropped"

    def __post_init__(self) -> None:
        check_at_least_one(num_features=self.num_features)

    @property
    def name(self) -> str:
        return f"performer-{self.num_features}"

    @property
    def title(self) -> str:
        return f"Performer, {self.num_features} features"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: PerformerAttention(original, self.num_features))
        return model


class PerformerAttention(ContentAttention):
    """Attention by positive random features."""

    directions: Tensor

    def __init__(self, original: ParakeetEncoderAttention, num_features: int) -> None:
        super().__init__(original)
        directions = orthogonal_directions(num_features, self.head_dim)
        self.register_buffer("directions", directions.to(original.q_proj.weight))

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        query = self.split(self.q_proj(hidden_states)) * self.head_dim**-0.25
        key = self.split(self.k_proj(hidden_states)) * self.head_dim**-0.25
        by_direction = query @ self.directions.mT
        query_features = _positive(by_direction, query, by_direction.amax(-1, keepdim=True))
        by_direction = key @ self.directions.mT
        unpadded = by_direction.detach()
        if valid is not None:
            unpadded = unpadded.masked_fill(~valid[:, None, :, None], -torch.inf)
        greatest = unpadded.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(key.dtype).min)
        key_features = _positive(by_direction, key, greatest)
        if valid is not None:
            key_features = key_features.masked_fill(~valid[:, None, :, None], 0.0)
        return kernel_attention(query_features, key_features, self.split(self.v_proj(hidden_states))).transpose(1, 2)


def _positive(
    by_direction: Float[Tensor, "batch heads frames features"],
    vectors: Float[Tensor, "batch heads frames dim"],
    greatest: Tensor,
) -> Float[Tensor, "batch heads frames features"]:
    return (by_direction - vectors.square().sum(-1, keepdim=True) / 2 - greatest.detach()).exp() + _EPSILON


def orthogonal_directions(number: int, dim: int) -> Float[Tensor, "number dim"]:
    """Rows that are orthogonal in blocks of `dim`, each as long as a normal vector of its own."""
    blocks = [torch.linalg.qr(torch.randn(dim, dim))[0].mT for _ in range(-(-number // dim))]
    lengths = torch.randn(number, dim).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:number] * lengths
