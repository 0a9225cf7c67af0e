"""Moonshine: heads are padded with zeros for attention, and the context is cut to their width again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import MoonshinePreTrainedModel

from mapreuse.models._adapters import register_attention
from mapreuse.models._reading import AttentionForm

_FINGERPRINTS = "44bb0de08ee8", "b5dcbbd36b9a"


@register_attention("MoonshineAttention", *_FINGERPRINTS)
def _moonshine(module: nn.Module) -> AttentionForm:
    """Zeros change neither scores nor contexts, so a reusing layer pads nothing."""
    return AttentionForm(
        *(("q_proj",), ("k_proj",), "v_proj", ("o_proj",), "attention_dropout"), fixed_heads=True, cache="layer_idx"
    )


@register_attention("MoonshineAttention", *_FINGERPRINTS, cross=True)
def _moonshine_cross(module: nn.Module) -> AttentionForm:
    return replace(_moonshine(module), states="key_value_states")


def with_integer_lengths(model: nn.Module) -> None:
    """Let Moonshine count its positions in integers, in place.

    `torch.export` keeps integer divisions symbolic. Its own `int(length / 64 + 1)` would become a constant.
    """
    for module in model.modules():
        if isinstance(module, MoonshinePreTrainedModel):
            module._get_feat_extract_output_lengths = _num_positions


def _num_positions(length: int | torch.SymInt) -> int | torch.SymInt:
    """The number of positions after the convolutions, whose kernels are 127, 7 and 3, and strides 64, 3 and 2."""
    return (((length - 127) // 64 + 1 - 7) // 3 + 1 - 3) // 2 + 1
