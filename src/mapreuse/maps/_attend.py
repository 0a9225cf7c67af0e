"""Context and map of a computing layer, by the way that suits what is wanted of them."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.maps import _c_kernel
from mapreuse.maps._blocked import Block, blocked, is_short, keeping
from mapreuse.maps._gradients import blocked_with_gradients
from mapreuse.maps._microbenchmark import is_clearly_faster
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import BlockDropout, drop, softmax

_FEWEST_SCORES = 1 << 17
"""Of one item, over all heads, from which the core in C is tried: it takes items one after the other."""

_HEADS, _LENGTH = 4, 512
"""Of the attention by which the core in C and fused attention are compared."""


def attend(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    *,
    keep: bool,
    dropout_p: float = 0.0,
    buffer: Tensor | None = None,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query key"] | None]:
    """Context and, where it is to be kept, the attention map.

        map = softmax(scores),    context = dropout(map, dropout_p) @ values

    The map returned is the one before dropout. A row that may attend nothing has an all-zero map and context. The
    context is a view of memory laid out as (batch, query, heads, value_dim), the layout an output projection reads.

    Args:
        scores: pre-softmax scores.
        values: one head of values for each head of the scores.
        keep: return the map too; otherwise it is never stored as a whole.
        dropout_p: probability with which a weight is dropped (training).
        buffer: contiguous memory for the map, of its shape and dtype, to be overwritten; used only where no gradient
            is needed.
    """
    if not keep and scores.relative is None and (dropout_p > 0.0 or not _core_is_better(scores, values)):
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
    # `scaled_dot_product_attention` takes either causality or a mask, and leaves rows that attend nothing at zero.
    mask, is_causal = scores.mask, scores.is_causal
    if is_causal and (mask is not None or scores.bias is not None or scores.shape[-2] != scores.shape[-1]):
        mask, is_causal = scores.allowed(0, scores.shape[-2]), False
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


def _core_is_better(scores: Scores, values: Tensor) -> bool:
    """Whether the core in C can compute this context, and takes less time than fused attention."""
    return (
        _c_kernel.computes(scores, values)
        and not is_short(*scores.shape[-2:])
        and math.prod(scores.shape[1:]) >= _FEWEST_SCORES
        and _core_is_faster(torch.get_num_threads(), scores.query.shape[-1])
    )


@cache
def _core_is_faster(threads: int, dim: int) -> bool:
    """Whether the core in C takes clearly less time than fused attention, with so many threads; measured once."""
    with torch.inference_mode():
        one = torch.ones(1, _HEADS, _LENGTH, dim, dtype=torch.float32, device="cpu")
        scores = Scores(one, one, dim**-0.5)
        return is_clearly_faster(lambda: _c_kernel.compute(scores, one), lambda: _fused(scores, one, 0.0))
