"""Attention in timm's style, which many vision models have copied: one projection makes queries, keys and values."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.maps import Scores
from mapreuse.models._adapters import register_style
from mapreuse.models._fused import FusedComputing
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import make_scores
from mapreuse.models._source import Unsupported, body_of


class _TimmComputing(FusedComputing):
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
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        return make_scores(self, query, key, attn_mask, self.scale, is_causal), values


_FORWARD = re.compile(
    r"""(?P<B>\w+),\ (?P<N>\w+),\ (?P<C>\w+)\ =\ (?P<x>\w+)\.shape\n
    qkv\ =\ self\.qkv\((?P=x)\)\.reshape\((?P=B),\ (?P=N),\ 3,\ self\.num_heads,
        \ (self\.head_dim|(?P=C)\ //\ self\.num_heads)\)\.permute\(2,\ 0,\ 3,\ 1,\ 4\)\n
    (q,\ k,\ v\ =\ qkv\.unbind\(0\)|q,\ k,\ v\ =\ \(qkv\[0\],\ qkv\[1\],\ qkv\[2\]\))\n
    (?P<normed>q,\ k\ =\ \(self\.q_norm\(q\),\ self\.k_norm\(k\)\)\n)?
    (?P<fused>if\ self\.fused_attn:\n
    \ {4}(?P=x)\ =\ (F|functional|nn\.functional|torch\.nn\.functional)\.scaled_dot_product_attention\(q,\ k,\ v
        (,\ attn_mask=attn_mask)?,\ dropout_p=self\.attn_drop\.p\ if\ self\.training\ else\ 0\.0
        (,\ is_causal=is_causal)?\)\nelse:\n)?
    (q\ =\ q\ \*\ self\.scale\nattn\ =\ q\ @\ k\.transpose\(-2,\ -1\)\n
        |attn\ =\ q\ @\ k\.transpose\(-2,\ -1\)\ \*\ self\.scale\n
        |attn\ =\ q\ \*\ self\.scale\ @\ k\.transpose\(-2,\ -1\)\n)
    (attn_bias\ =\ resolve_self_attn_mask\((?P=N),\ attn,\ attn_mask,\ is_causal\)\n)?
    (attn\ =\ maybe_add_mask\(attn,\ (attn_mask|attn_bias)\)\n)?
    attn\ =\ attn\.softmax\(dim=-1\)\n
    attn\ =\ self\.attn_drop\(attn\)\n
    ((?P=x)\ =\ attn\ @\ v\n
        (?P=x)\ =\ (?P=x)\.transpose\(1,\ 2\)\.reshape\((?P=B),\ (?P=N),\ ((?P=C)|self\.attn_dim)\)\n
        |(?P=x)\ =\ \(attn\ @\ v\)\.transpose\(1,\ 2\)\.reshape\((?P=B),\ (?P=N),\ ((?P=C)|self\.attn_dim)\)\n)
    (?P<scaled>(?P=x)\ =\ self\.norm\((?P=x)\)\n)?
    (?P=x)\ =\ self\.proj\((?P=x)\)\n
    (?P=x)\ =\ self\.proj_drop\((?P=x)\)\n
    return\ (?P=x)""",
    re.VERBOSE,
)
"""The statements of the `forward` of timm's `Attention`, in its current and earlier versions."""

_ELSE_BLOCK = re.compile(r"^ {4}(?=(q|attn|attn_bias) = |\w+ = attn @ v$)", re.MULTILINE)
"""The indentation of the statements that current versions run unless attention is fused."""


@register_style
def _timm(module: nn.Module) -> AttentionForm | None:
    if not {"qkv", "proj", "proj_drop", "attn_drop"} <= module._modules.keys():
        return None
    cls = type(module)
    body = body_of(cls)
    match = _FORWARD.fullmatch(_ELSE_BLOCK.sub("", body))
    if match is None:
        raise Unsupported(f"{cls.__name__}: its modules resemble those of timm's Attention, but its forward differs")
    _check_mask_functions(cls, body)
    attention: Any = module
    head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    if match["fused"] and abs(attention.scale - head_dim**-0.5) > 1e-9:
        raise Unsupported(
            f"{cls.__name__}: its scale is {attention.scale}, but its fused attention uses {head_dim**-0.5}"
        )
    return AttentionForm(
        query=("q_norm",) if match["normed"] else (),
        key=("k_norm",) if match["normed"] else (),
        value="qkv",
        output=("norm", "proj", "proj_drop") if match["scaled"] else ("proj", "proj_drop"),
        dropout="attn_drop.p",
        takes_maps=False,
        returns_map=False,
        fused=True,
        computing=_TimmComputing,
        head_dim=head_dim,
    )


def _check_mask_functions(cls: Any, body: str) -> None:
    """Call timm's two mask functions, if the class uses them, and compare their results with those of timm."""
    scores = torch.zeros(1, 1, 2, 2)
    mask = torch.tensor([[0.0, -1.0], [-2.0, 0.0]])
    allowed = torch.tensor([[True, False], [True, True]])
    lowest = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    calls: list[tuple[str, tuple, Tensor | None]] = [
        ("maybe_add_mask", (scores, mask), scores + mask),
        ("maybe_add_mask", (scores, None), scores),
        ("resolve_self_attn_mask", (2, scores, None, False), None),
        ("resolve_self_attn_mask", (2, scores, mask, False), mask),
        ("resolve_self_attn_mask", (2, scores, allowed, False), lowest),
        ("resolve_self_attn_mask", (2, scores, None, True), lowest),
    ]
    for name, arguments, expected in calls:
        found: Any = cls.forward.__globals__[name](*arguments) if name in body else expected
        same = torch.equal(found, expected) if isinstance(expected, Tensor) else found is None
        if not same:
            raise Unsupported(f"{cls.__name__}: its functions on masks are not those of timm")
