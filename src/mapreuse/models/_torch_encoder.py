"""`torch.nn.TransformerEncoder`: its packed attention is replaced by modules that can share maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.maps import Scores
from mapreuse.models._adapters import check_fingerprint, register_style
from mapreuse.models._fused import FusedComputing
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import make_scores
from mapreuse.models._sharing_classes import ReusingAttention
from mapreuse.models._source import Unsupported, parameter_names
from mapreuse.models._stack import Stack

_FINGERPRINTS = {
    nn.TransformerEncoder: ("e9a4cca52e60",),
    nn.TransformerEncoderLayer: ("3ebc5d705d1c",),
    nn.MultiheadAttention: ("f66a230d7957",),
}
"""Fingerprints of the forwards that `UnpackedAttention` works in."""


class UnpackedAttention(FusedComputing):
    """`torch.nn.MultiheadAttention` as self-attention in a `torch.nn.TransformerEncoder` that shares maps.

    The packed projection becomes a module. Without an `in_proj_bias`, the layer around it does not take its fast
    path, which would compute the whole layer by itself.
    """

    in_proj_bias = None
    _qkv_same_embed_dim = False
    _parameter_names = parameter_names(nn.MultiheadAttention)

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)
        self.register_load_state_dict_pre_hook(_rename_packed)

    def forward(  # type: ignore[override]  # called like torch's attention
        self, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3 or query.is_nested:
            raise ValueError(
                "an encoder that shares attention maps takes a padded batch of shape (batch, positions, width), with "
                f"a mask; got a {'nested' if query.is_nested else f'{query.dim()}-dimensional'} tensor"
            )
        hidden_states = query if self.batch_first else query.transpose(0, 1)
        if self._layout.computing:
            context, weights = super().forward(hidden_states, *args, **kwargs)
        else:
            context, weights = ReusingAttention.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return context if self.batch_first else context.transpose(0, 1), weights

    def _project(
        self,
        hidden_states: Float[Tensor, "batch positions width"],
        attn_mask: Float[Tensor, "query key"] | Float[Tensor, "batch_heads query key"] | None = None,
        key_padding_mask: Float[Tensor, "batch key"] | None = None,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key, values = self._split(hidden_states)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about the mask; pass the mask as well, as without shared maps")
        mask: Tensor | None = attn_mask
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = key_padding_mask[:, None, None]
            mask = padding if mask is None else mask + padding
        return make_scores(self, query, key, mask, self.head_dim**-0.5, is_causal=False), values


def _linear(weight: Any, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _rename_packed(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: take the packed projection of `torch.nn.MultiheadAttention`."""
    for name in ("weight", "bias"):
        if (packed := state_dict.pop(f"{prefix}in_proj_{name}", None)) is not None:
            state_dict[f"{prefix}in_proj.{name}"] = packed


def unpack(stack: Stack) -> Stack:
    """Unpack the attention modules of a `torch.nn.TransformerEncoder`, in place; returns the new stack.

    Raises:
        Unsupported: if a forward has changed, or an attention has more than one packed projection and an output.
    """
    encoder: Any = stack.module
    if type(encoder) is not nn.TransformerEncoder:
        return stack
    layers = []
    for index, layer in enumerate(stack.layers):
        _check_packed(f"layer {index}", layer.layer, layer.attention)
        attention = UnpackedAttention(layer.attention)  # type: ignore[arg-type]
        layer.layer.self_attn = attention
        layers.append(replace(layer, attention=attention))
    encoder.use_nested_tensor = False  # maps need a mask, which nested tensors do not have
    return replace(stack, layers=tuple(layers))


def _check_packed(name: str, layer: nn.Module, attention: nn.Module) -> None:
    if type(layer) is not nn.TransformerEncoderLayer or type(attention) is not nn.MultiheadAttention:
        raise Unsupported(
            f"{name} ({type(layer).__name__}, {type(attention).__name__}): torch.nn.TransformerEncoder is supported "
            "only with TransformerEncoderLayer and MultiheadAttention, not with subclasses"
        )
    for cls, fingerprints in _FINGERPRINTS.items():
        check_fingerprint(cls, fingerprints, f"torch {torch.__version__}")
    name = f"{name} (MultiheadAttention)"
    if "forward" in vars(attention):
        raise Unsupported(f"{name}: its forward was replaced on the module itself")
    if type(attention._parameters.get("in_proj_weight")) is not nn.Parameter:
        raise Unsupported(f"{name}: its queries, keys and values are not one plain projection")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported(f"{name}: add_bias_kv and add_zero_attn are not supported, as they add keys")
    output = attention.out_proj
    if (
        type(output).__module__ != "torch.nn.modules.linear"
        or type(output._parameters.get("weight")) is not nn.Parameter
    ):
        raise Unsupported(f"{name}: out_proj is a {type(output).__name__}, not a plain projection")


@register_style
def _torch_attention(module: nn.Module) -> AttentionForm | None:
    if type(module) is UnpackedAttention:
        return AttentionForm((), (), "in_proj", ("out_proj",), "dropout", takes_maps=False, fused=True)
    if isinstance(module, nn.MultiheadAttention):
        raise Unsupported(
            f"{type(module).__name__}: torch's attention is supported only inside a plain torch.nn.TransformerEncoder"
        )
    return None
