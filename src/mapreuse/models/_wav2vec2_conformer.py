"""Wav2Vec2-Conformer: relative positions without a T×T positional bias; other positions by the original forward."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.maps import RelativePositions, Scores
from mapreuse.models._adapters import register_attention
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import mask_and_bias
from mapreuse.models._sharing_classes import ComputingAttention


class _RelativeComputing(ComputingAttention):
    def _project(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Float[Tensor, "1 distances width"] | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key = self._heads(self.linear_q(hidden_states)), self._heads(self.linear_k(hidden_states))
        assert relative_position_embeddings is not None
        mask, bias = mask_and_bias(self, attention_mask)
        scores = Scores(
            query=query + self.pos_bias_u[:, None],
            key=key,
            scaling=self.scaling,
            mask=mask,
            bias=bias,
            relative=RelativePositions(
                query=query + self.pos_bias_v[:, None],
                key=self._heads(self.linear_pos(relative_position_embeddings)),
            ),
        )
        return scores, self._values(hidden_states)


@register_attention("Wav2Vec2ConformerSelfAttention", "9a5b3c6cf174")
def _wav2vec2_conformer(module: nn.Module) -> AttentionForm:
    relative = module.position_embeddings_type == "relative"
    return AttentionForm(
        query=("linear_q", "pos_bias_u", "pos_bias_v") if relative else ("linear_q",),
        key=("linear_k", "linear_pos") if relative else ("linear_k",),
        value="linear_v",
        output=("linear_out",),
        dropout="dropout.p",
        computing=_RelativeComputing if relative else None,
    )
