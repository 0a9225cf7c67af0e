"""The encoder that a technique changes: found, checked, and its attention modules replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.plan import ReusePlan


def untouched_encoder(model: nn.Module) -> ParakeetEncoder:
    """The Parakeet encoder in `model`, all of whose attention is as `transformers` makes it.

    Raises `ValueError` where there is none, or more than one, or its attention was changed already.
    """
    encoders = [module for module in model.modules() if isinstance(module, ParakeetEncoder)]
    if len(encoders) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(encoders)} Parakeet encoders, and a technique changes one"
        )
    encoder = encoders[0]
    for index, block in enumerate(encoder.layers):
        if type(block.self_attn) is not ParakeetEncoderAttention:
            raise ValueError(
                f"layer {index} of {type(encoder).__name__} has another attention already "
                f"({type(block.self_attn).__name__}); apply a technique to the original model"
            )
    if encoder.config.num_key_value_heads != encoder.config.num_attention_heads:
        raise ValueError(
            f"{type(encoder).__name__} has {encoder.config.num_key_value_heads} key/value heads for "
            f"{encoder.config.num_attention_heads} heads; a technique is for one with as many of both"
        )
    return encoder


def check_plan(encoder: ParakeetEncoder, plan: ReusePlan, num_heads: int) -> None:
    """Raises `ValueError` where a plan does not fit an encoder whose layers have `num_heads` heads."""
    if plan.num_layers != len(encoder.layers):
        raise ValueError(f"the plan speaks of {plan.num_layers} layers, but the encoder has {len(encoder.layers)}")
    if plan.num_heads not in (None, num_heads):
        raise ValueError(f"the plan speaks of {plan.num_heads} heads, but the layers have {num_heads}")


def replace_attention(
    encoder: ParakeetEncoder,
    technique: str,
    make: Callable[[int, ParakeetEncoderAttention], nn.Module],
    *,
    start: int = 0,
) -> None:
    """Put `make(index, attention)`, named after its technique, in the place of every layer's from `start` up."""
    made = {index: make(index, block.self_attn) for index, block in enumerate(encoder.layers) if index >= start}
    for index, attention in made.items():
        attention.technique = technique  # type: ignore[assignment]
        encoder.layers[index].self_attn = attention


def head_rows(heads: Sequence[int], head_dim: int, kept_dim: int | None = None) -> Tensor:
    """The rows of a projection that hold the first `kept_dim` (all, where None) dimensions of these heads."""
    return torch.tensor([head * head_dim + row for head in heads for row in range(kept_dim or head_dim)])


def some_outputs(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """A new projection of some of the outputs of another, with its weights."""
    return _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def some_inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """A new projection from some of the inputs of another, with its weights."""
    return _linear(linear.weight[:, columns], linear.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = skip_init(nn.Linear, inputs, outputs, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
