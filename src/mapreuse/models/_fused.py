"""ModernBERT and GPT-2: one projection makes queries, keys and values."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from mapreuse.maps import Scores
from mapreuse.models._adapters import register_attention
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import make_scores
from mapreuse.models._sharing_classes import ComputingAttention
from mapreuse.models._source import Unsupported


class FusedComputing(ComputingAttention):
    """Computes maps with one projection that makes queries, keys and values, as three blocks in this order."""

    def _split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the heads that compute, and values of all heads."""
        fused = getattr(self, self._form.value)(hidden_states)
        own = len(self._layout.computing) * self.head_dim
        query, key, values = fused.split([own, own, fused.shape[-1] - 2 * own], dim=-1)
        values = values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._heads(query), self._heads(key), values


class _ModernBertComputing(FusedComputing):
    def _project(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key, values = self._split(hidden_states)
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=1)
        scores = make_scores(self, query, key, attention_mask, self.head_dim**-0.5, kwargs.get("is_causal"))
        return scores, values


class _GPT2Computing(FusedComputing):
    def _project(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key, values = self._split(hidden_states)
        key, values = self._cached(key, values, kwargs)
        return make_scores(self, query, key, attention_mask, self.scaling, kwargs.get("is_causal")), values


@register_attention("ModernBertAttention", "5ab3dda290ea")
def _modernbert(module: nn.Module) -> AttentionForm:
    output = ("Wo", "out_drop")
    return AttentionForm((), (), "Wqkv", output, "attention_dropout", fused=True, computing=_ModernBertComputing)


@register_attention("GPT2Attention", "2c4ecea331d8", "08ea3ecc8853")
def _gpt2(module: nn.Module) -> AttentionForm:
    if module.reorder_and_upcast_attn:
        raise Unsupported("GPT2Attention: reorder_and_upcast_attn=True is not supported; load the model with False")
    output, dropout = ("c_proj", "resid_dropout"), "attn_dropout.p"
    computing = _GPT2Computing
    return AttentionForm((), (), "c_attn", output, dropout, fused=True, computing=computing, cache="layer_idx")
