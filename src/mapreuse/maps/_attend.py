"""Exact attention, blocked over query rows: the computing layer's core."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.maps._scores import Scores

_BLOCK_ROWS = 64
"""Query rows computed at a time: their scores stay in cache between product, softmax and context."""


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
        buffer: memory for the map, of its shape and dtype, to be overwritten; used only where no gradient is needed.
    """
    if not keep and scores.relative is None:
        return _fused(scores, values, dropout_p), None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        weights = softmax(scores)
        return drop(weights, dropout_p) @ values, weights if keep else None
    return _blocked(scores, values, keep, dropout_p, buffer)


def drop(weights: Tensor, probability: float) -> Tensor:
    """Weights with dropout drawn anew; the weights themselves where the probability is zero."""
    return functional.dropout(weights, probability) if probability > 0.0 else weights


def softmax(scores: Scores) -> Float[Tensor, "batch heads query key"]:
    """The whole map at once, differentiable. The softmax runs in float32 where the scores are in half precision."""
    dense = scores.dense()
    weights = torch.softmax(dense, dim=-1, dtype=_softmax_dtype(dense)).to(dense.dtype)
    allowed = scores.allowed(0, dense.shape[-2])
    return weights if allowed is None else weights * allowed.any(-1, keepdim=True)


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
        attn_mask=None if mask is None else mask.expand(scores.shape),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scores.scaling,
    )


def _blocked(
    scores: Scores, values: Tensor, keep: bool, dropout_p: float, buffer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    batch, heads, num_queries, num_keys = scores.shape
    query = scores.query
    context = query.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    weights = None
    if keep:
        weights = query.new_empty(scores.shape) if buffer is None else buffer
    block = min(_BLOCK_ROWS, num_queries)
    scratch = None if keep else query.new_empty(heads * block * num_keys)
    distances = None
    if scores.relative is not None:
        distances = query.new_empty(heads * block * (num_keys + block - 1))
    clear_empty = scores.mask is not None and (scores.is_causal or not bool(scores.mask.any(-1).all()))
    for item in range(batch):
        for start in range(0, num_queries, block):
            rows = slice(start, min(start + block, num_queries))
            if weights is not None:
                out = weights[item, :, rows]
            else:
                assert scratch is not None
                size = rows.stop - rows.start
                out = scratch[: heads * size * num_keys].view(heads, size, num_keys)
            _map_rows(scores, item, rows, distances, clear_empty, out)
            dropped = drop(out, dropout_p)
            for head in range(heads):
                torch.mm(dropped[head], values[item, head], out=context[item, head, rows])
    return context, weights


def _map_rows(
    scores: Scores, item: int, rows: slice, distances: Tensor | None, clear_empty: bool, out: Tensor
) -> None:
    """Write the map's rows of one batch item into `out` (heads, rows, keys)."""
    query, key = scores.query[item, :, rows], scores.key[item].mT
    if scores.relative is None:
        torch.baddbmm(out, query, key, beta=0, alpha=scores.scaling, out=out)
    else:
        assert distances is not None
        shifted = _relative_rows(scores, item, rows, distances)
        torch.baddbmm(shifted, query, key, beta=scores.scaling, alpha=scores.scaling, out=out)
    if scores.bias is not None:
        out += _item(scores.bias, item, rows)
    allowed = scores.allowed(rows.start, rows.stop)
    if allowed is not None:
        allowed = _item(allowed, item, slice(None))
        out.masked_fill_(~allowed, torch.finfo(out.dtype).min)
    if _softmax_dtype(out) == out.dtype:
        torch.softmax(out, dim=-1, out=out)
    else:
        out.copy_(torch.softmax(out, dim=-1, dtype=_softmax_dtype(out)))
    if clear_empty and allowed is not None:
        out *= allowed.any(-1, keepdim=True)


def _relative_rows(scores: Scores, item: int, rows: slice, distances: Tensor) -> Tensor:
    # Rows start … stop meet keys 0 … T − 1 at distances stop − 1 … start − T + 1: a window of T + rows − 1 of them.
    assert scores.relative is not None
    size, num_keys = rows.stop - rows.start, scores.shape[-1]
    width = num_keys + size - 1
    first = num_keys - rows.stop
    window = _item(scores.relative.key, item, slice(first, first + width))
    out = distances[: len(window) * size * width].view(len(window), size, width)
    torch.bmm(scores.relative.query[item, :, rows], window.mT, out=out)
    return out.as_strided((len(window), size, num_keys), (size * width, width - 1, 1), size - 1)


def _item(tensor: Tensor, item: int, rows: slice) -> Tensor:
    tensor = tensor[item if tensor.shape[0] > 1 else 0]
    return tensor[:, rows] if tensor.shape[-2] > 1 else tensor


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
