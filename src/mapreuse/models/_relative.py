"""Parakeet (FastConformer) and Wav2Vec2-Conformer: relative positions without a T×T positional bias."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import RelativePositions, Scores
from mapreuse.models._adapters import register_attention
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import mask_and_bias
from mapreuse.models._sharing_classes import ComputingAttention
from mapreuse.models._source import Unsupported


class _ParakeetComputing(ComputingAttention):
    def _project(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        position_embeddings: Float[Tensor, "batch distances width"] | None = None,
        attention_mask: Bool[Tensor, "batch 1 frames frames"] | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key = self.q_proj(hidden_states), self._heads(self.k_proj(hidden_states))
        assert position_embeddings is not None
        if self.config.dropout_positions == 0.0 or not self.training:
            position_embeddings = position_embeddings[:1]  # the same for all items, except under dropout
        distances = self._heads(self.relative_k_proj(position_embeddings))
        relative = RelativePositions(self._heads(query + self.bias_v.flatten()), distances)
        query = self._heads(query + self.bias_u.flatten())
        scores = Scores(query, key, self.scaling, mask=attention_mask, relative=relative)
        return scores, self._values(hidden_states)


@register_attention("ParakeetEncoderAttention", "332d3b922a29", "94b7e854896c")
def _parakeet(module: nn.Module) -> AttentionForm:
    if module.num_key_value_groups != 1:
        raise Unsupported("ParakeetEncoderAttention: grouped keys and values (num_key_value_heads) are not supported")
    return AttentionForm(
        query=("q_proj", "bias_u", "bias_v"),
        key=("k_proj", "relative_k_proj"),
        value="v_proj",
        output=("o_proj",),
        dropout="attention_dropout",
        computing=_ParakeetComputing,
    )


class _Wav2Vec2ConformerComputing(ComputingAttention):
    def _project(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Float[Tensor, "1 distances width"] | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key = self.linear_q(hidden_states), self._heads(self.linear_k(hidden_states))
        assert relative_position_embeddings is not None
        distances = self._heads(self.linear_pos(relative_position_embeddings))
        relative = RelativePositions(self._heads(query + self.pos_bias_v.flatten()), distances)
        query = self._heads(query + self.pos_bias_u.flatten())
        mask, bias = mask_and_bias(self, query, key, attention_mask)
        scores = Scores(query, key, self.scaling, mask=mask, bias=bias, relative=relative)
        return scores, self._values(hidden_states)


@register_attention("Wav2Vec2ConformerSelfAttention", "9a5b3c6cf174")
def _wav2vec2_conformer(module: nn.Module) -> AttentionForm:
    """With other positions, the original forward computes the maps."""
    relative = module.position_embeddings_type == "relative"
    return AttentionForm(
        query=("linear_q", "pos_bias_u", "pos_bias_v") if relative else ("linear_q",),
        key=("linear_k", "linear_pos") if relative else ("linear_k",),
        value="linear_v",
        output=("linear_out",),
        dropout="dropout.p",
        computing=_Wav2Vec2ConformerComputing if relative else None,
    )
