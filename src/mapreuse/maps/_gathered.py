"""Attention to published keys: dense products of blocks of queries and gathered keys, without a T × T tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapreuse.maps._places import Places, is_near
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import softmax_dtype

_CHUNK_SCORES = 1 << 18
"""Number of scores that are computed at a time."""


def gathered(
    scores: Scores,
    values: Float[Tensor, "batch value_heads key value_dim"],
    published: Int[Tensor, "batch blocks keys"],
    places: Places,
    window: int,
    block: int,
) -> Float[Tensor, "batch heads query value_dim"]:
    """The context of a layer that attends to published keys, its window and the first key, with gradients.

    Args:
        scores: scores without relative positions. Heads of the queries share heads of the keys in equal groups.
        values: values, with as many heads as the keys.
        published, places: as in `SharedKeys`. Positions of successive queries must be successive.
        window, block: as in `KeySettings`.
    """
    batch, heads, num_queries, _ = scores.query.shape
    value_heads, num_keys = values.shape[1:3]
    per_head = heads // value_heads
    items = torch.arange(batch, device=values.device)
    heads_of_items = items[:, None] * value_heads + torch.arange(value_heads, device=values.device)
    key_rows, value_rows = (tensor.flatten(0, 2) for tensor in (scores.key, values))
    contexts = []
    for blocks in _chunks(published.shape[1], heads * block * (published.shape[2] + 2 * window + block)):
        numbers = torch.arange(blocks.start * block, blocks.stop * block, device=values.device).view(-1, block)
        rows = (places.first_query[:, None, None] + numbers).clamp(max=num_queries - 1)
        keys, attended = _attended(scores, published[:, blocks], places, rows, window)
        index = (heads_of_items[:, :, None, None] * num_keys + keys[:, None]).flatten()
        shape = batch, value_heads, len(numbers), keys.shape[-1], -1
        of_keys, of_values = (tensor.index_select(0, index).view(shape) for tensor in (key_rows, value_rows))
        query = scores.query[items[:, None, None], :, rows].unflatten(3, (value_heads, per_head))
        query = query.permute(0, 3, 1, 4, 2, 5).flatten(3, 4) * scores.scaling
        products = (query @ of_keys.mT).unflatten(3, (per_head, block))
        if scores.bias is not None:
            products = products + _part(scores.bias, rows, keys, per_head)
        context = (_softmax(products, attended).flatten(3, 4) @ of_values).unflatten(3, (per_head, block))
        contexts.append(context.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2))
    found = torch.cat(contexts, 1)
    index = torch.arange(num_queries, device=values.device) - places.first_query[:, None]
    padding = (index < 0)[..., None, None]  # queries before the first block attend to no key
    return found[items[:, None], index.clamp(min=0)].masked_fill(padding, 0.0).transpose(1, 2)


def _chunks(blocks: int, scores_of_block: int) -> Iterator[slice]:
    size = max(1, _CHUNK_SCORES // scores_of_block)
    for start in range(0, blocks, size):
        yield slice(start, min(start + size, blocks))


def _attended(
    scores: Scores, published: Tensor, places: Places, rows: Int[Tensor, "batch blocks block"], window: int
) -> tuple[Tensor, Tensor]:
    """The keys that each block gathers, and which of them each of its queries attends to.

    Gathered are the first key, the published keys and all windows. Published keys inside a window count once.

    Returns:
        Keys of shape (batch, blocks, keys), and booleans that broadcast to (batch, key heads, blocks, query heads of
        each, block, keys).
    """
    batch, _, num_queries, num_keys = scores.shape
    count = published.shape[2]
    of_rows = places.positions[torch.arange(batch, device=rows.device)[:, None, None], rows]
    after = 0 if scores.is_causal or num_queries != num_keys else window - 1
    first = places.first_key[:, None, None].expand(-1, rows.shape[1], 1)
    local = of_rows[..., :1] + torch.arange(1 - window, rows.shape[2] + after, device=rows.device)
    keys = torch.cat([first, published, local], -1)
    near = is_near(keys[:, :, None], of_rows[..., None], first[..., None], window)
    is_other = (keys != first)[:, :, None, 1 + count :]
    once = [torch.ones_like(near[..., :1]), ~near[..., 1 : 1 + count], near[..., 1 + count :] & is_other]
    attended = torch.cat(once, -1) & ((keys >= 0) & (keys < num_keys))[:, :, None]
    if scores.is_causal:
        attended = attended & (keys[:, :, None] <= rows[..., None])
    keys, attended = keys.clamp(0, num_keys - 1), attended[:, None, :, None]
    if scores.mask is not None:
        attended = attended & _part(scores.mask, rows, keys, scores.shape[1] // scores.key.shape[1])
    return keys, attended


def _part(
    tensor: Tensor, rows: Int[Tensor, "batch blocks block"], keys: Int[Tensor, "batch blocks keys"], per_head: int
) -> Tensor:
    """The part of a mask or a bias for these queries and keys, in the shape of `_attended`."""
    batch, heads, num_rows, _ = tensor.shape
    items = torch.arange(batch, device=tensor.device).view(-1, 1, 1, 1, 1, 1)
    numbers = torch.arange(heads, device=tensor.device).view(1, -1, 1, per_head if heads > 1 else 1, 1, 1)
    rows = rows if num_rows > 1 else torch.zeros_like(rows)
    return tensor[items, numbers, rows[:, None, :, None, :, None], keys[:, None, :, None, None]]


def _softmax(scores: Tensor, attended: Tensor) -> Tensor:
    """Softmax over the attended keys; zero for queries that attend to none."""
    scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=softmax_dtype(scores)).to(scores.dtype)
    return weights * attended.any(-1, keepdim=True)
