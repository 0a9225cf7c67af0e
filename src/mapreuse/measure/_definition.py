"""Reuse by its definition, in `transformers`' own eager attention: what every contestant must agree with."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from mapreuse.models import find_stack
from mapreuse.plan import ReusePlan

DEFINITION = "mapreuse-definition"
"""The attention implementation with which a model follows the plan that `follow` gave it."""


def follow(layers: nn.Module, plan: ReusePlan) -> None:
    """Make a model that was built with `DEFINITION` share maps as `plan` says; every layer still computes its own."""
    maps: dict[int, Tensor] = {}
    for index, layer in enumerate(find_stack(layers).layers):
        layer.attention._definition = (plan, index, maps)  # type: ignore[assignment]


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch heads key dim"],
    value: Float[Tensor, "batch heads key dim"],
    attention_mask: Float[Tensor, "batch heads query key"] | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query heads dim"], None]:
    plan, layer, maps = module._definition  # type: ignore[misc]
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    own = scores.softmax(-1)
    if plan.readers(layer):
        maps[layer] = own
    heads = [
        own[:, head] if source is None else maps[source[0]][:, source[1]]
        for head, source in enumerate(plan.heads(layer, own.shape[1]))
    ]
    for source in plan.sources(layer):
        if plan.readers(source)[-1] == layer:
            del maps[source]
    return (torch.stack(heads, 1) @ value).transpose(1, 2), None


AttentionInterface.register(DEFINITION, _attention)
