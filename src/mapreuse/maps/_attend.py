"""Attention of a computing layer, by the fastest implementation for the case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import flop_registry

from mapreuse.maps import _c_kernel
from mapreuse.maps._blocked import Block, blocked, blocked_with_gradients, is_short, keeping
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import BlockDropout, drop, softmax

_MIN_SCORES = 1 << 17
"""Minimum number of scores per item, over all heads, for the C kernel, which computes one item after the other."""

_REPEATS = 7
"""Number of interleaved timings of two functions that are compared."""

_MAX_RATIO = 0.9
"""Maximum ratio of times that counts as faster; smaller differences may be noise."""

for _pass in ("", "_backward"):
    # `FlopCounterMode` counts fused attention on GPUs, but not on CPUs.
    _on_gpu, _on_cpu = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{_pass}") for device in ("", "_for_cpu")
    )
    flop_registry.setdefault(_on_cpu, flop_registry[_on_gpu])


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
    are zero. The context is stored as (batch, query, heads, value_dim), the order that output projections read.

    Args:
        scores: scores before the softmax.
        values: values, with as many heads as the scores.
        keep: return the map as well. Otherwise it is never stored as a whole.
        dropout_p: probability of dropping a weight.
        buffer: contiguous memory of the map's shape and type that may be overwritten. Used only without gradients.
    """
    if not keep and scores.relative is None and (dropout_p > 0.0 or not _kernel_is_better(scores, values)):
        return _fused(scores, values, dropout_p), None
    if torch.compiler.is_compiling():
        weights = softmax(scores)
        return drop(weights, dropout_p) @ values, weights if keep else None
    if is_short(*scores.shape[-2:]):
        weights = softmax(scores) if buffer is None or torch.is_grad_enabled() else buffer.copy_(softmax(scores))
        context = (drop(weights, dropout_p) @ values).transpose(1, 2).contiguous().transpose(1, 2)
        return context, weights if keep else None
    if torch.is_grad_enabled():
        return blocked_with_gradients(scores, values, keep=keep, dropout=BlockDropout.drawn(dropout_p))
    kept = None
    if keep:
        kept = _c_kernel.map_memory(scores, values.dtype) if buffer is None else buffer
    if dropout_p == 0.0 and _c_kernel.computes(scores, values):
        return _c_kernel.compute(scores, values, kept), kept
    map_of = Block.compute_map if kept is None else keeping(scores, kept)
    return blocked(scores, values, map_of, BlockDropout.drawn(dropout_p)), kept


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
        _c_kernel.computes(scores, values)
        and not is_short(*scores.shape[-2:])
        and math.prod(scores.shape[1:]) >= _MIN_SCORES
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
    """Whether `one` runs at least 10 % faster than `other` on the CPU, by the minimum of several timings each."""
    times = [(_seconds(one), _seconds(other)) for _ in range(_REPEATS)]
    ones, others = map(min, zip(*times, strict=True))
    return ones < _MAX_RATIO * others


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
