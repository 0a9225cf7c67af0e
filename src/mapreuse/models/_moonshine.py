"""Moonshine: heads are padded with zeros for attention, and the context is cut to their width again."""

from __future__ import annotations

from torch import nn

from mapreuse.models._adapters import register_attention
from mapreuse.models._reading import AttentionForm


@register_attention("MoonshineAttention", "44bb0de08ee8", "b5dcbbd36b9a")
def _moonshine(module: nn.Module) -> AttentionForm:
    """Zeros change neither scores nor contexts, so a reusing layer pads nothing."""
    return AttentionForm(
        *(("q_proj",), ("k_proj",), "v_proj", ("o_proj",), "attention_dropout"), fixed_heads=True, cache="layer_idx"
    )
