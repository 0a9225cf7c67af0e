"""Attention as operators of another runtime, for exports that bring a library of these operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.maps._scores import Scores

_precision: ContextVar[str | None] = ContextVar("precision", default=None)

_INT8_KEYS = 64
"""Maps in 8 bits have a multiple of this number of keys."""


@contextmanager
def runtime_operators(precision: str) -> Iterator[None]:
    """Record attention, while a model is exported, as the operators `mapreuse::Attention` and `mapreuse::Apply`.

    They compute what `attend` and `AttentionMap.apply` do, on tensors of shape (batch, positions, heads, dim).

    Args:
        precision: "float32", or "int8" for products of 8-bit numbers and maps with 8-bit weights.
    """
    before = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(before)


def records_runtime_operators() -> bool:
    """Whether attention must be recorded as operators of another runtime."""
    # Dynamo cannot read a ContextVar, and exports are recorded without it.
    return not torch.compiler.is_dynamo_compiling() and _precision.get() is not None


def record_attention(
    scores: Scores, values: Float[Tensor, "batch heads key value_dim"], *, keep: bool
) -> tuple[Float[Tensor, "batch heads query value_dim"], tuple[Tensor, ...]]:
    """The context of a computing layer and, if `keep`, its map: weights, or weights in 8 bits and their scales."""
    batch, heads, num_queries, num_keys = scores.shape
    relative, int8 = scores.relative, _precision.get() == "int8"
    positions = (None, None) if relative is None else (relative.query, relative.key)
    optional = [*(None if one is None else one.transpose(1, 2) for one in positions), scores.mask, scores.bias]
    dtypes, shapes = [torch.float32], [(batch, num_queries, heads, values.shape[-1])]
    if keep:
        width = (num_keys + _INT8_KEYS - 1) // _INT8_KEYS * _INT8_KEYS if int8 else num_keys
        dtypes.append(torch.uint8 if int8 else torch.float32)
        shapes.append((batch, heads, num_queries, width))
    if keep and int8:
        dtypes.append(torch.float32)
        shapes.append((batch, heads, num_queries, 1))
    attributes = {
        "parts": "".join("01"[one is not None] for one in optional),
        "scaling": scores.scaling,
        "causal": int(scores.is_causal),
        "keeps": int(keep),
        "int8": int(int8),
    }
    inputs = [tensor.transpose(1, 2) for tensor in (scores.query, scores.key, values)]
    context, *stored = _record(
        "Attention", [*inputs, *(one for one in optional if one is not None)], attributes, dtypes, shapes
    )
    return context.transpose(1, 2), tuple(stored)


def record_application(
    stored: tuple[Tensor, ...],
    values: Float[Tensor, "batch value_heads key value_dim"],
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch heads query value_dim"]:
    """The context of a reusing layer: see `AttentionMap.apply`."""
    map_heads, value_heads = ([pair[which] for pair in heads] for which in (0, 1))
    shape = values.shape[0], stored[0].shape[2], len(heads), values.shape[-1]
    attributes = {"map_heads": map_heads, "value_heads": value_heads}
    (context,) = _record("Apply", [*stored, values.transpose(1, 2)], attributes, [torch.float32], [shape])
    return context.transpose(1, 2)


def _record(name: str, inputs: list[Tensor], attributes: Any, dtypes: Any, shapes: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"mapreuse::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=1
        )
    )
