"""Falcon: one projection makes queries, keys and values of each group of heads; with rotary positions or ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from mapreuse.maps import Scores, as_index
from mapreuse.models._adapters import register_attention
from mapreuse.models._deriving import Probe
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import make_scores
from mapreuse.models._sharing_classes import ComputingAttention


class _FalconComputing(ComputingAttention):
    """The projection stays whole, so that queries and keys of all heads are there."""

    def _project(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        heads = self._split_heads(self.query_key_value(hidden_states))
        query, key, values = (one.transpose(1, 2) for one in heads)
        group = key.shape[1] // self._layout.num_value_heads  # new models repeat keys and values of a group
        key, values = key[:, ::group], values[:, ::group]
        if alibi is None:
            assert position_embeddings is not None
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, values = self._cached(key, values, kwargs)
        if alibi is not None and self.config._attn_implementation == "eager":  # otherwise it is part of the mask
            positions = alibi.view(len(hidden_states), self.num_heads, 1, -1) * self.inv_norm_factor
            attention_mask = positions if attention_mask is None else positions + attention_mask
        query = query[:, as_index(self._layout.queries)]
        return make_scores(self, query, key, attention_mask, self.inv_norm_factor, kwargs.get("is_causal")), values


@register_attention("FalconAttention", "b57a49b14869")
def _falcon(module: Any) -> AttentionForm:
    """Rotary models drop no weights of a map."""
    fused = module.query_key_value
    rows = torch.arange(fused.out_features, device="cpu").view(1, 1, -1)
    values = module._split_heads(rows)[2][0, 0]  # (heads or value heads, head_dim)
    values = values[:: len(values) // module.num_kv_heads]
    probe = Probe(module.num_heads, len(values), module.head_dim, "query_key_value", tuple(values.flatten().tolist()))
    dropout = "attention_dropout.p" if module.config.alibi else None
    return AttentionForm(
        *((), (), "query_key_value", ("dense",), dropout), computing=_FalconComputing, cache="layer_idx", probe=probe
    )
