"""FlexAttention with a `score_mod`: PyTorch's fastest fused attention with relative positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.measure import use_attention


def use_flex_attention(model: nn.Module) -> None:
    """Make the attention of a model run FlexAttention, in place."""
    parakeet = [module for module in model.modules() if type(module) is ParakeetEncoderAttention]
    for module in parakeet:
        module.__class__ = _FlexParakeetAttention
        module.compiled_attention = _compiled_attention()  # type: ignore[assignment]
    if not parakeet:
        use_attention(model, "flex_attention")


class _FlexParakeetAttention(ParakeetEncoderAttention):
    compiled_attention: Callable[..., Tensor]

    def forward(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        position_embeddings: Float[Tensor, "batch distances width"] | None = None,
        attention_mask: None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        distances = self.relative_k_proj(position_embeddings).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        positional = ((query + self.bias_v[:, None]) @ distances.mT) * self.scaling
        context = self.compiled_attention(query + self.bias_u[:, None], key, value, positional, self.scaling)
        return self.o_proj(context.transpose(1, 2).flatten(2)), None


@functools.cache
def _compiled_attention() -> Callable[..., Tensor]:
    # Uncompiled, FlexAttention falls back to a plain implementation. The compiler is slow to import.
    return torch.compile(_attention, dynamic=False)


def _attention(
    query: Float[Tensor, "batch heads frames dim"],
    key: Float[Tensor, "batch heads frames dim"],
    value: Float[Tensor, "batch heads frames dim"],
    positional: Float[Tensor, "batch heads frames distances"],
    scaling: float,
) -> Float[Tensor, "batch heads frames dim"]:
    """Reads positional scores without a shifted copy: the score of (i, j) is at (i, T − 1 − i + j)."""
    last = query.shape[2] - 1

    def add_position(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + positional[batch, head, row, last - row + column]

    return flex_attention(query, key, value, score_mod=add_position, scale=scaling)
