"""Attentions that make queries, keys and values with one projection and pass no keyword arguments on.

`torch.nn.TransformerEncoder`, and attention in timm's style, which many vision models have copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.maps import Scores
from mapreuse.models._adapters import Adapter, register_style
from mapreuse.models._fused import FusedComputing
from mapreuse.models._reading import AttentionForm
from mapreuse.models._sharing import ReusingAttention, make_scores
from mapreuse.models._source import Unsupported, body_of, fingerprint_of, parameter_names
from mapreuse.models._stack import Stack

_ENCODER = {
    nn.TransformerEncoder: "e9a4cca52e60",
    nn.TransformerEncoderLayer: "3ebc5d705d1c",
    nn.MultiheadAttention: "f66a230d7957",
}
"""Fingerprints of the forwards that `UnpackedAttention` fits into."""


class UnpackedAttention(FusedComputing):
    """`torch.nn.MultiheadAttention` as self-attention in a `torch.nn.TransformerEncoder` that reuses maps.

    Its packed projection is a module of its own. It holds no `in_proj_bias`, so that the layer around it does not
    take its fast path, which computes all of the layer by itself.
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

    def forward(  # type: ignore[override]  # it is called as torch's attention is
        self, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3 or query.is_nested:
            raise ValueError("an encoder that reuses attention maps takes a batch of padded sequences, with a mask")
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
            raise ValueError("is_causal is a hint about the mask: pass the mask too, as without reuse")
        mask = attn_mask
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


@contextmanager
def unpacked(stack: Stack) -> Iterator[Stack]:
    """The stack, the attention modules of a `torch.nn.TransformerEncoder` in it unpacked; as it was on failure.

    Raises `Unsupported` where its forwards have changed or an attention has more than queries, keys and values.
    """
    encoder: Any = stack.module
    if type(encoder) is not nn.TransformerEncoder:
        yield stack
        return
    for index, layer in enumerate(stack.layers):
        _check_packed(f"layer {index}", layer.layer, layer.attention)
    packed = [layer.attention for layer in stack.layers]
    nested = encoder.use_nested_tensor
    try:
        layers = []
        for layer in stack.layers:
            attention = UnpackedAttention(layer.attention)  # type: ignore[arg-type]
            layer.layer.self_attn = attention
            layers.append(replace(layer, attention=attention))
        encoder.use_nested_tensor = False  # nested tensors have no mask that a map could be computed with
        yield replace(stack, layers=tuple(layers))
    except BaseException:
        for layer, original in zip(stack.layers, packed, strict=True):
            layer.layer.self_attn = original
        encoder.use_nested_tensor = nested
        raise


def _check_packed(name: str, layer: nn.Module, attention: nn.Module) -> None:
    if type(layer) is not nn.TransformerEncoderLayer or type(attention) is not nn.MultiheadAttention:
        raise Unsupported(
            f"{name} ({type(layer).__name__}, {type(attention).__name__}): of torch.nn.TransformerEncoder only "
            "TransformerEncoderLayer with MultiheadAttention is served, and none of their subclasses"
        )
    for cls, fingerprint in _ENCODER.items():
        found = fingerprint_of(cls)
        if found != fingerprint:
            raise Unsupported(
                f"{cls.__name__}: its forward has changed (fingerprint {found}, expected {fingerprint}); "
                "this version of torch is not supported"
            )
    if "forward" in vars(attention):
        raise Unsupported(f"{name} (MultiheadAttention): its forward was replaced on the module itself")
    if type(attention._parameters.get("in_proj_weight")) is not nn.Parameter:
        raise Unsupported(f"{name} (MultiheadAttention): its queries, keys and values are not one plain projection")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported(f"{name} (MultiheadAttention): add_bias_kv and add_zero_attn add keys of their own")
    output = attention.out_proj
    if (
        type(output).__module__ != "torch.nn.modules.linear"
        or type(output._parameters.get("weight")) is not nn.Parameter
    ):
        raise Unsupported(f"{name}: out_proj is a {type(output).__name__}, not a plain projection")


class _OneTensor:
    """Mixed in before a sharing class: attention whose forward returns its output and no weights."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs)[0]  # type: ignore[misc]


class _TimmComputing(_OneTensor, FusedComputing):  # type: ignore[misc]  # it returns one tensor, they two
    def _project(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        query, key, values = self._split(hidden_states)
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        mask = attn_mask
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
        return make_scores(self, query, key, mask, self.scale, is_causal), values


class _TimmReusing(_OneTensor, ReusingAttention):  # type: ignore[misc]
    pass


_TIMM = re.compile(
    r"""(?P<B>\w+),\ (?P<N>\w+),\ (?P<C>\w+)\ =\ (?P<x>\w+)\.shape\n
    qkv\ =\ self\.qkv\((?P=x)\)\.reshape\((?P=B),\ (?P=N),\ 3,\ self\.num_heads,
        \ (self\.head_dim|(?P=C)\ //\ self\.num_heads)\)\.permute\(2,\ 0,\ 3,\ 1,\ 4\)\n
    (q,\ k,\ v\ =\ qkv\.unbind\(0\)|q,\ k,\ v\ =\ \(qkv\[0\],\ qkv\[1\],\ qkv\[2\]\))\n
    (?P<normed>q,\ k\ =\ \(self\.q_norm\(q\),\ self\.k_norm\(k\)\)\n)?
    (?P<fused>if\ self\.fused_attn:\n
    \ {4}(?P=x)\ =\ (F|functional|nn\.functional|torch\.nn\.functional)\.scaled_dot_product_attention\(q,\ k,\ v
        (,\ attn_mask=attn_mask)?,\ dropout_p=self\.attn_drop\.p\ if\ self\.training\ else\ 0\.0
        (,\ is_causal=is_causal)?\)\nelse:\n)?
    ((\ {4})?q\ =\ q\ \*\ self\.scale\n(\ {4})?attn\ =\ q\ @\ k\.transpose\(-2,\ -1\)\n
        |(\ {4})?attn\ =\ q\ @\ k\.transpose\(-2,\ -1\)\ \*\ self\.scale\n
        |(\ {4})?attn\ =\ \(q\ @\ k\.transpose\(-2,\ -1\)\)\ \*\ self\.scale\n
        |(\ {4})?attn\ =\ q\ \*\ self\.scale\ @\ k\.transpose\(-2,\ -1\)\n)
    ((\ {4})?attn_bias\ =\ resolve_self_attn_mask\((?P=N),\ attn,\ attn_mask,\ is_causal\)\n)?
    ((\ {4})?attn\ =\ maybe_add_mask\(attn,\ (attn_mask|attn_bias)\)\n)?
    (\ {4})?attn\ =\ attn\.softmax\(dim=-1\)\n
    (\ {4})?attn\ =\ self\.attn_drop\(attn\)\n
    ((\ {4})?(?P=x)\ =\ attn\ @\ v\n
        (?P=x)\ =\ (?P=x)\.transpose\(1,\ 2\)\.reshape\((?P=B),\ (?P=N),\ ((?P=C)|self\.attn_dim)\)\n
        |(?P=x)\ =\ \(attn\ @\ v\)\.transpose\(1,\ 2\)\.reshape\((?P=B),\ (?P=N),\ ((?P=C)|self\.attn_dim)\)\n)
    (?P<scaled>(?P=x)\ =\ self\.norm\((?P=x)\)\n)?
    (?P=x)\ =\ self\.proj\((?P=x)\)\n
    (?P=x)\ =\ self\.proj_drop\((?P=x)\)\n
    return\ (?P=x)""",
    re.VERBOSE,
)
"""timm's `Attention.forward`, as it is and as it was, statement by statement."""


@register_style
def _packed(module: nn.Module) -> Adapter | None:
    if type(module) is UnpackedAttention:
        form = AttentionForm((), (), "in_proj", ("out_proj",), "dropout", takes_maps=False)
        return Adapter(form, fused="in_proj", interface=False)
    if isinstance(module, nn.MultiheadAttention):
        raise Unsupported(
            f"{type(module).__name__}: torch's attention is served by apply() inside a plain "
            "torch.nn.TransformerEncoder, not elsewhere"
        )
    if not {"qkv", "proj", "proj_drop", "attn_drop"} <= module._modules.keys():
        return None
    cls = type(module)
    match = _TIMM.fullmatch(body_of(cls))
    if match is None:
        raise Unsupported(f"{cls.__name__}: its forward is not that of timm's Attention, which its modules resemble")
    _check_helpers(cls)
    attention: Any = module
    head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    if match["fused"] and abs(attention.scale - head_dim**-0.5) > 1e-9:
        raise Unsupported(
            f"{cls.__name__}: its scale is {attention.scale}, but its fused attention takes {head_dim**-0.5}"
        )
    norms = ("q_norm",), ("k_norm",)
    query, key = norms if match["normed"] else ((), ())
    output = ("norm", "proj", "proj_drop") if match["scaled"] else ("proj", "proj_drop")
    form = AttentionForm(query, key, "qkv", output, "attn_drop.p", takes_maps=False)
    return Adapter(form, _TimmComputing, _TimmReusing, fused="qkv", interface=False, head_dim=head_dim)


def _check_helpers(cls: Any) -> None:
    """timm's two functions on masks, where the class calls them: what they do is tried."""
    names = cls.forward.__globals__
    scores = torch.zeros(1, 1, 2, 2)
    mask = torch.tensor([[0.0, -1.0], [-2.0, 0.0]])
    allowed = torch.tensor([[True, False], [True, True]])
    lowest = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    body = body_of(cls)
    right = True
    if "maybe_add_mask" in body:
        add = names["maybe_add_mask"]
        right = torch.equal(add(scores, mask), scores + mask) and torch.equal(add(scores, None), scores)
    if "resolve_self_attn_mask" in body:
        resolve = names["resolve_self_attn_mask"]
        right = (
            right
            and resolve(2, scores, None, False) is None
            and torch.equal(resolve(2, scores, mask, False), mask)
            and torch.equal(resolve(2, scores, allowed, False), lowest)
            and torch.equal(resolve(2, scores, None, True), lowest)
        )
    if not right:
        raise Unsupported(f"{cls.__name__}: its functions on masks are not timm's")
