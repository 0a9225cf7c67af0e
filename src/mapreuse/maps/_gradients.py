"""Exact attention in blocks with gradients; the backward pass runs in blocks as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mapreuse.maps._blocked import Block, blocked, blocks, keeping
from mapreuse.maps._scores import RelativePositions, Scores
from mapreuse.maps._softmax import BlockDropout


def blocked_with_gradients(
    scores: Scores, values: Tensor, *, keep: bool, dropout: BlockDropout | None
) -> tuple[Tensor, Tensor | None]:
    """`blocked` with first-order gradients for queries, keys, values, bias and relative positions.

    With the scores S, the map P, the context C and the gradient G of the map from its readers, a block of rows needs
    only its own rows of the map:

        dV = Pᵀ dC,    dP = dC Vᵀ + G,    dS = P ∘ (dP − rowsum(P ∘ dP))

    Only the inputs are saved for the backward pass, and the map if it is kept. Otherwise the rows of the map are
    computed again (Dao et al. 2022), so that no other T × T tensor is ever stored.

    Returns:
        The context, and the map or None.
    """
    relative = scores.relative
    tensors = (scores.query, scores.key, values, scores.bias)
    positions = (None, None) if relative is None else (relative.query, relative.key)
    return _Blocked.apply(*tensors, *positions, scores, keep, dropout)


class _Blocked(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        values: Tensor,
        bias: Tensor | None,
        relative_query: Tensor | None,
        relative_key: Tensor | None,
        scores: Scores,
        keep: bool,
        dropout: BlockDropout | None,
    ) -> tuple[Tensor, Tensor | None]:
        weights = values.new_empty(scores.shape) if keep else None
        map_of = Block.compute_map if weights is None else keeping(scores, weights)
        context = blocked(scores, values, map_of, dropout)
        ctx.save_for_backward(query, key, values, bias, relative_query, relative_key, scores.mask, weights)
        ctx.scaling, ctx.is_causal, ctx.dropout = scores.scaling, scores.is_causal, dropout
        return context, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: Tensor, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, values, bias, *positions, mask, weights = ctx.saved_tensors
        relative = None if positions[0] is None else RelativePositions(*positions)
        scores = Scores(query, key, ctx.scaling, mask=mask, bias=bias, is_causal=ctx.is_causal, relative=relative)
        d_query, d_key, d_values = (tensor.new_zeros(tensor.shape) for tensor in (query, key, values))
        d_bias = None if bias is None else bias.new_zeros(bias.shape)
        d_relative = None
        if relative is not None:
            d_relative = RelativePositions(*(t.new_zeros(t.shape) for t in (relative.query, relative.key)))
        with torch.autocast(values.device.type, enabled=False):
            for block in blocks(scores, values):
                rows = block.place
                keys = block.item, block.heads, slice(block.keys)
                block_map = block.compute_map() if weights is None else weights[rows][..., : block.keys]
                d_rows = d_context[rows]
                d_map = d_rows @ block.values.mT
                if ctx.dropout is None:
                    d_values[keys] += block_map.mT @ d_rows
                else:
                    factors = ctx.dropout.factors(d_map, block.number)
                    d_values[keys] += (block_map * factors).mT @ d_rows
                    d_map *= factors
                if d_weights is not None:
                    d_map += d_weights[rows][..., : block.keys]
                d_scores = block_map * (d_map - (block_map * d_map).sum(-1, keepdim=True))
                d_query[rows] = d_scores @ block.key * ctx.scaling
                d_key[keys] += d_scores.mT @ block.query
                if d_bias is not None:
                    _add_reduced(d_bias, block, d_scores)
                if d_relative is not None and block.relative is not None:
                    by_distance, by_key = block.positional()
                    by_distance.zero_()
                    by_key.copy_(d_scores)
                    relative_query, relative_key = block.relative
                    d_relative.query[rows] = by_distance @ relative_key * ctx.scaling
                    item = block.item if d_relative.key.shape[0] > 1 else 0
                    d_relative.key[item, block.heads, block.distances] += by_distance.mT @ relative_query
        d_positions = (None, None) if d_relative is None else (d_relative.query, d_relative.key)
        return d_query, d_key, d_values, d_bias, *d_positions, None, None, None


def _add_reduced(total: Tensor, block: Block, addend: Tensor) -> None:
    """Add a block's (heads, rows, keys) to the gradient of a tensor whose batch, heads or rows broadcast."""
    heads, rows = block.heads, block.rows
    if total.shape[1] == 1:
        heads, addend = slice(0, 1), addend.sum(0, keepdim=True)
    if total.shape[2] == 1:
        rows, addend = slice(0, 1), addend.sum(1, keepdim=True)
    total[block.item if total.shape[0] > 1 else 0, heads, rows, : addend.shape[-1]] += addend
