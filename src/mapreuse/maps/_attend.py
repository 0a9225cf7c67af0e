"""Attention of a computing layer, by the fastest implementation for the case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from mapreuse.maps import _c_kernel
from mapreuse.maps._blocked import is_short
from mapreuse.maps._operators import attention, needs_plain_operators, store_attention
from mapreuse.maps._runtime_operators import record_attention, records_runtime_operators
from mapreuse.maps._scores import Scores, product_of_heads
from mapreuse.maps._softmax import drop, softmax

_MIN_SCORES = 1 << 17
"""Minimum number of scores per item, over all heads, for the C kernel, which computes one item after the other."""

_REPEATS = 7
"""Number of interleaved timings of two functions that are compared."""

_MAX_RATIO = 0.9
"""Maximum ratio of times that counts as faster; smaller differences may be noise."""


def attend(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    *,
    keep: bool,
    dropout_p: float = 0.0,
    buffer: Tensor | None = None,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query key"] | None]:
    """Compute the context of an attention layer and, if `keep`, its attention map.

        map = softmax(scores),    context = dropout(map, dropout_p) @ values

    The returned map is the one before dropout. If a query may attend to no key, its row of the map and its context
    are zero. The context is stored as (batch, query, heads, value_dim), the order that output projections read. With
    a cap or sinks, the whole map is computed at once.

    Args:
        scores: scores before the softmax.
        values: values, with as many heads as the scores.
        keep: return the map as well. Otherwise it is never stored as a whole.
        dropout_p: probability of dropping a weight.
        buffer: contiguous memory of the map's shape and type that may be overwritten. Used only without gradients.
    """
    context, weights, _ = attend_with_lengths(scores, values, keep=keep, dropout_p=dropout_p, buffer=buffer)
    return context, weights


def attend_with_lengths(
    scores: Scores, values: Tensor, *, keep: bool, dropout_p: float = 0.0, buffer: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Int[Tensor, "batch 2"] | None]:
    """`attend`, and the lengths beyond which the map is zero (see `DenseMap`), or None."""
    if records_runtime_operators() and not scores.beyond_kernels:
        return record_attention(scores, values, keep=False)[0], None, None
    plain = needs_plain_operators(values, *scores.factors)
    can_fuse = not keep and scores.relative is None and not scores.beyond_kernels
    if can_fuse and (plain or dropout_p > 0.0 or not _kernel_is_better(scores, values)):
        return _fused(scores, values, dropout_p), None, None
    if plain or scores.beyond_kernels or is_short(values, scores.shape):
        weights = softmax(scores)
        if buffer is not None and not plain and not torch.is_grad_enabled():
            weights = buffer.copy_(weights)
        context = (drop(weights, dropout_p) @ values).transpose(1, 2).contiguous().transpose(1, 2)
        return context, weights if keep else None, None
    if keep and not torch.is_grad_enabled():
        weights = torch.empty(scores.shape, dtype=values.dtype, device=values.device) if buffer is None else buffer
        context, lengths = store_attention(scores, values, weights, None, dropout_p=dropout_p)
        return context, weights, lengths
    return attention(scores, values, keep=keep, dropout_p=dropout_p)


def attend_step(
    scores: Scores,
    values: Float[Tensor, "batch value_heads key value_dim"],
    value_heads: Sequence[int],
    *,
    dropout_p: float = 0.0,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Float[Tensor, "batch heads 1 key"]]:
    """`attend` for a decoding step: one query per head, and keys and values that heads may share.

    Args:
        scores: scores with `key_heads`.
        values: values.
        value_heads: for each head of the scores, its head of the values.
        dropout_p: as for `attend`.
    """
    weights = softmax(scores)
    return product_of_heads(drop(weights, dropout_p), values, value_heads), weights


def _fused(scores: Scores, values: Tensor, dropout_p: float) -> Tensor:
    # `scaled_dot_product_attention` accepts causality or a mask, not both. Rows without any allowed key become zero.
    mask, is_causal = scores.mask, scores.is_causal
    if is_causal and (mask is not None or scores.bias is not None or scores.shape[-2] != scores.shape[-1]):
        mask, is_causal = scores.allowed(), False
    if scores.bias is not None:
        mask = scores.bias if mask is None else scores.bias.masked_fill(~mask, float("-inf"))
    return functional.scaled_dot_product_attention(
        scores.query,
        scores.key,
        values,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scores.scaling,
    )


def _kernel_is_better(scores: Scores, values: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # a compiler cannot follow the timing
        and not is_short(values, scores.shape)
        and math.prod(scores.shape[1:]) >= _MIN_SCORES
        and _c_kernel.computes(scores, values)
        and _kernel_is_faster(torch.get_num_threads(), scores.query.shape[-1])
    )


@cache
def _kernel_is_faster(threads: int, dim: int) -> bool:
    """Whether the C kernel is faster than fused attention with this number of threads; measured once."""
    with torch.inference_mode():
        one = torch.ones(1, 4, 512, dim, dtype=torch.float32, device="cpu")
        scores = Scores(one, one, dim**-0.5)
        return is_clearly_faster(lambda: _c_kernel.compute(scores, one), lambda: _fused(scores, one, 0.0))


def is_clearly_faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `one` runs at least 10 % faster than `other` on the CPU, by the minimum of several timings each.

    Dispatch modes, such as FLOP counters, do not see these calls.
    """
    with _disable_current_modes():
        times = [(_seconds(one), _seconds(other)) for _ in range(_REPEATS)]
    ones, others = map(min, zip(*times, strict=True))
    return ones < _MAX_RATIO * others


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
