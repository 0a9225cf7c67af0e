"""Exact attention in PyTorch, computed in blocks of heads and query rows: the twin of the C kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import BlockDropout, softmax_of_sum

_BLOCK_SCORES = 1 << 17
"""Number of scores per thread in a block of small maps, which takes all rows of a head."""
_MIN_ROWS, _MAX_ROWS, _KEYS_PER_ROW = 128, 256, 20
"""Number of rows in a block of large maps. With fewer, products are slow; with more, the scores leave the caches."""
_GPU_ROWS = 1024
"""Enough rows to keep a GPU busy; not tuned."""
_MAX_SHORT = 1 << 13
"""Maximum number of weights per head for which one product of the whole batch, padding included, is fastest."""


def is_short(num_queries: int, num_keys: int) -> bool:
    """Whether a map of this size is computed and applied for the whole batch at once."""
    return num_queries * num_keys <= _MAX_SHORT


def blocked(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    map_of: Callable[[Block], Tensor],
    dropout: BlockDropout | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Compute the context block by block, without gradients.

    A block computes its scores in place, from the content product and, with relative positions, the product with the
    T + rows − 1 distances that its rows span, which is read through a slanted view. Padding beyond the valid lengths
    is not computed, nor, if the scores are causal, the keys after a block's last row.

    Args:
        scores: scores before the softmax.
        values: values, with as many heads as the scores.
        map_of: computes the weights of a block, and may store them.
        dropout: dropout of the weights.
    """
    batch, heads, num_queries, _ = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    for item, (rows, _) in enumerate(scores.valid_lengths):
        context[item, :, rows:] = 0
    for block in blocks(scores, values):
        weights = map_of(block)
        dropped = weights if dropout is None else weights * dropout.factors(weights, block.number)
        torch.bmm(dropped, block.values, out=context[block.place])
    return context


def keeping(scores: Scores, weights: Float[Tensor, "batch heads query key"]) -> Callable[[Block], Tensor]:
    """A `map_of` for `blocked` that computes each block inside `weights` and sets the padding to zero."""
    for item, (rows, _) in enumerate(scores.valid_lengths):
        weights[item, :, rows:] = 0

    def map_of(block: Block) -> Tensor:
        rows = weights[block.place]
        rows[..., block.keys :] = 0
        return block.compute_map(rows[..., : block.keys])

    return map_of


class Block:
    """A block of one item: some heads, at least one per thread, and some rows of each.

    Attributes:
        number: position in the order of blocks.
        item, heads, rows, keys: index of the item, slices of heads and rows, and number of keys.
        place: index of the block in a tensor of shape (batch, heads, query, …).
        shape: (heads, rows, keys).
        query, key, values: its part of the tensors; queries include the scaling of the scores.
        distances: indices of the distances between its rows and keys, from row stop − 1 and key 0 downwards.
        relative: queries for relative positions, times the scaling, and keys of these distances; or None.
    """

    def __init__(self, number: int, item: _Item, heads: slice, rows: slice, memory: tuple[Tensor, Tensor]) -> None:
        self.number = number
        self.item, self.heads, self.rows = self.place = item.index, heads, rows
        self.keys = min(item.key.shape[1], rows.stop) if item.is_causal else item.key.shape[1]
        self.shape = heads.stop - heads.start, rows.stop - rows.start, self.keys
        self.query = item.query[heads, rows]
        self.key = item.key[heads, : self.keys]
        self.values = item.values[heads, : self.keys]
        first = item.num_keys - rows.stop
        self.distances = slice(first, first + self.keys + self.shape[1] - 1)
        self.relative: tuple[Tensor, Tensor] | None = None
        if item.relative is not None:
            self.relative = item.relative[0][heads, rows], item.relative[1][heads, self.distances]
        self._item = item
        self._memory = memory

    def positional(self) -> tuple[Float[Tensor, "heads rows distances"], Float[Tensor, "heads rows keys"]]:
        """Memory for the scores of each row at each distance, and the slanted view of it by key."""
        heads, rows, keys = self.shape
        width = keys + rows - 1
        by_distance = self._memory[1][: heads * rows * width].view(heads, rows, width)
        return by_distance, by_distance.as_strided(self.shape, (rows * width, width - 1, 1), rows - 1)

    def compute_map(self, place: Tensor | None = None) -> Float[Tensor, "heads rows keys"]:
        """Compute the weights in `place`, or in memory that the next block overwrites."""
        scores, positional = self._scores()
        allowed = self._allowed()
        if self._item.bias is not None:
            scores += _select(self._item.bias, self.heads, self.rows, self.keys)
        if allowed is not None:
            if positional is not None:
                scores += positional
            scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
            positional = None
        out = scores if place is None else place
        softmax_of_sum(scores, positional, out)
        if allowed is not None and self._item.allowed is not None:
            out *= allowed.any(-1, keepdim=True)
        return out

    def _scores(self) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"] | None]:
        """Scores by content and by position, which are added later."""
        heads, rows, keys = self.shape
        content = self._memory[0][: heads * rows * keys].view(self.shape)
        torch.bmm(self.query, self.key.mT, out=content)
        if self.relative is None:
            return content, None
        relative_query, relative_key = self.relative
        by_distance, by_key = self.positional()
        torch.bmm(relative_query, relative_key.mT, out=by_distance)
        return content, by_key

    def _allowed(self) -> Bool[Tensor, "#heads #rows keys"] | None:
        mask = self._item.allowed
        allowed = None if mask is None else _select(mask, self.heads, self.rows, self.keys)
        if self._item.is_causal:
            rows = torch.arange(self.rows.start, self.rows.stop, device=self._memory[0].device)[:, None]
            causal = (torch.arange(self.keys, device=rows.device) <= rows)[None]
            allowed = causal if allowed is None else allowed & causal
        return allowed


def blocks(scores: Scores, values: Tensor) -> Iterator[Block]:
    """Divide an attention into blocks, without its padding."""
    _, heads, num_queries, num_keys = scores.shape
    if values.device.type == "cpu":
        num_rows = rows_per_block(num_queries, num_keys)
        num_heads = _heads_per_block(heads, num_rows, num_keys)
    else:  # a GPU has no cache to fit into, and each block costs several kernel launches
        num_rows, num_heads = max(1, min(num_queries, _GPU_ROWS)), heads
    width = 0 if scores.relative is None else num_keys + num_rows - 1
    memory = values.new_empty(num_heads * num_rows * num_keys), values.new_empty(num_heads * num_rows * width)
    number = 0
    for index, (valid_rows, valid_keys) in enumerate(scores.valid_lengths):
        item = _Item.of(scores, values, index, valid_rows, valid_keys)
        for of_heads in slices(heads, num_heads):
            for of_rows in slices(valid_rows, num_rows):
                yield Block(number, item, of_heads, of_rows, memory)
                number += 1


@dataclass(frozen=True)
class _Item:
    """Contiguous tensors of one item of the batch, without padding; queries include the scaling."""

    index: int
    query: Float[Tensor, "heads rows dim"]
    key: Float[Tensor, "heads keys dim"]
    values: Float[Tensor, "heads keys value_dim"]
    relative: tuple[Float[Tensor, "heads rows dim"], Float[Tensor, "heads distances dim"]] | None
    num_keys: int  # padding included: it is the origin of the distances
    allowed: Bool[Tensor, "#heads #rows keys"] | None
    bias: Float[Tensor, "#heads #rows keys"] | None
    is_causal: bool

    @classmethod
    def of(cls, scores: Scores, values: Tensor, index: int, rows: int, keys: int) -> _Item:
        def select(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return _select(tensor[index if tensor.shape[0] > 1 else 0], slice(None), slice(0, rows), keys)

        relative = None
        if scores.relative is not None:
            relative_query = scores.relative.query[index, :, :rows] * scores.scaling
            relative_key = scores.relative.key[index if scores.relative.key.shape[0] > 1 else 0]
            relative = relative_query.contiguous(), relative_key.contiguous()
        allowed = select(scores.mask)
        return cls(
            index=index,
            query=(scores.query[index, :, :rows] * scores.scaling).contiguous(),
            key=scores.key[index, :, :keys].contiguous(),
            values=values[index, :, :keys].contiguous(),
            relative=relative,
            num_keys=scores.shape[-1],
            allowed=None if allowed is None or bool(allowed.all()) else allowed,
            bias=select(scores.bias),
            is_causal=scores.is_causal,
        )


def rows_per_block(num_queries: int, num_keys: int) -> int:
    """Number of rows per head in a block: all rows of a small map; of a large map, more for longer rows."""
    if num_queries * num_keys <= _BLOCK_SCORES:
        return max(1, num_queries)
    return min(num_queries, max(_MIN_ROWS, min(_MAX_ROWS, num_keys // _KEYS_PER_ROW // 16 * 16)))


def _heads_per_block(heads: int, rows: int, num_keys: int) -> int:
    """Number of heads in a block: one per thread, more if they are small."""
    threads = torch.get_num_threads()
    return max(1, min(heads, max(threads, threads * _BLOCK_SCORES // max(1, rows * num_keys))))


def slices(length: int, size: int) -> Iterator[slice]:
    """Divide `length` positions into slices of at most `size`."""
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + size, length))


def _select(tensor: Tensor, heads: slice, rows: slice, keys: int) -> Tensor:
    """Part of a tensor of shape (#heads, #rows, keys), where sizes of one broadcast."""
    tensor = tensor[heads] if tensor.shape[0] > 1 else tensor
    return tensor[:, rows, :keys] if tensor.shape[1] > 1 else tensor[..., :keys]
