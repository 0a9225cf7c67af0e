"""Exact attention, some heads and query rows at a time: computing layers' core in PyTorch, the twin of `_c_kernel.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mapreuse.maps._rows import softmax_of_sum
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import BlockDropout

_BLOCK_SCORES = 1 << 17
"""Scores for every thread that are computed at a time where maps are so small that all their rows are."""
_FEWEST_ROWS, _MOST_ROWS, _KEYS_PER_ROW = 128, 256, 20
"""Rows at a time of greater maps: fewer, and products are far from their peak; more, and scores leave the caches."""
_GPU_ROWS = 1024
"""Not measured: enough to keep a GPU busy."""
_SHORT = 1 << 13
"""Weights of a head up to which products for the whole batch, padding included, are faster than one for each item."""


def is_short(num_queries: int, num_keys: int) -> bool:
    """Whether maps of this size are best computed and applied for the whole batch at once."""
    return num_queries * num_keys <= _SHORT


def blocked(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    map_of: Callable[[Block], Tensor],
    dropout: BlockDropout | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Context, block by block, without a tape; `map_of` computes a block's weights, and keeps them if it likes.

    Positional scores of the T + rows − 1 distances that a block's rows span are read as a slanted view while they are
    added to the content scores; the softmax is in place; the product with the values follows. Nothing is
    computed beyond the last query and key of an item that attend anything, nor, where the scores are causal, for keys
    after a block's last row.
    """
    batch, heads, num_queries, _ = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    for item, (rows, _) in enumerate(scores.extents):
        context[item, :, rows:] = 0
    for block in blocks(scores, values):
        weights = map_of(block)
        dropped = weights if dropout is None else weights * dropout.factors(weights, block.number)
        torch.bmm(dropped, block.values, out=context[block.place])
    return context


def keeping(scores: Scores, weights: Float[Tensor, "batch heads query key"]) -> Callable[[Block], Tensor]:
    """For `blocked`: computes blocks where they belong in `weights`, whose padding is set to zero."""
    for item, (rows, _) in enumerate(scores.extents):
        weights[item, :, rows:] = 0

    def map_of(block: Block) -> Tensor:
        rows = weights[block.place]
        rows[..., block.keys :] = 0
        return block.compute_map(rows[..., : block.keys])

    return map_of


class Block:
    """Some heads of one item, at least one for every thread, each by some rows."""

    def __init__(self, number: int, part: _Part, heads: slice, rows: slice, rooms: tuple[Tensor, Tensor]) -> None:
        self.number = number
        self.item = part.item
        self.heads = heads
        self.rows = rows
        self.keys = min(part.key.shape[1], rows.stop) if part.is_causal else part.key.shape[1]
        self._part = part
        self._rooms = rooms

    @property
    def place(self) -> tuple[int, slice, slice]:
        """Where its rows are in a tensor of (batch, heads, query, …)."""
        return self.item, self.heads, self.rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, rows, keys)."""
        return self.heads.stop - self.heads.start, self.rows.stop - self.rows.start, self.keys

    @property
    def query(self) -> Float[Tensor, "heads rows dim"]:
        """Queries times the scores' scaling."""
        return self._part.query[self.heads, self.rows]

    @property
    def key(self) -> Float[Tensor, "heads keys dim"]:
        return self._part.key[self.heads, : self.keys]

    @property
    def values(self) -> Float[Tensor, "heads keys value_dim"]:
        return self._part.values[self.heads, : self.keys]

    @property
    def distances(self) -> slice:
        """Rows start … stop meet keys 0 … keys − 1 at the distances stop − 1 … start − keys + 1, a window of them."""
        first = self._part.num_keys - self.rows.stop
        return slice(first, first + self.keys + self.shape[1] - 1)

    @property
    def relative(self) -> tuple[Float[Tensor, "heads rows dim"], Float[Tensor, "heads window dim"]] | None:
        """The rows' queries of relative positions, times the scores' scaling, and the window's keys."""
        if self._part.relative is None:
            return None
        query, key = self._part.relative
        return query[self.heads, self.rows], key[self.heads, self.distances]

    def positional(self) -> tuple[Float[Tensor, "heads rows window"], Float[Tensor, "heads rows keys"]]:
        """Memory for a score of every row at every distance of the window, and the slanted view of it by key."""
        heads, rows, keys = self.shape
        width = keys + rows - 1
        room = self._rooms[1][: heads * rows * width].view(heads, rows, width)
        return room, room.as_strided(self.shape, (rows * width, width - 1, 1), rows - 1)

    def compute_map(self, place: Tensor | None = None) -> Float[Tensor, "heads rows keys"]:
        """The block's weights, in `place`, or in memory that the next block overwrites."""
        scores, positional = self._scores()
        allowed = self._allowed()
        if self._part.bias is not None:
            scores += _some(self._part.bias, self.heads, self.rows, self.keys)
        if allowed is not None:
            if positional is not None:
                scores += positional
            scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
            positional = None
        out = scores if place is None else place
        softmax_of_sum(scores, positional, out)
        if allowed is not None and self._part.allowed is not None:
            out *= allowed.any(-1, keepdim=True)
        return out

    def _scores(self) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"] | None]:
        """By content, and by position; their sum counts."""
        heads, rows, keys = self.shape
        content = self._rooms[0][: heads * rows * keys].view(self.shape)
        torch.bmm(self.query, self.key.mT, out=content)
        if self.relative is None:
            return content, None
        relative_query, relative_key = self.relative
        room, slanted = self.positional()
        torch.bmm(relative_query, relative_key.mT, out=room)
        return content, slanted

    def _allowed(self) -> Bool[Tensor, "#heads #rows keys"] | None:
        mask = self._part.allowed
        allowed = None if mask is None else _some(mask, self.heads, self.rows, self.keys)
        if self._part.is_causal:
            rows = torch.arange(self.rows.start, self.rows.stop, device=self._rooms[0].device)[:, None]
            causal = (torch.arange(self.keys, device=rows.device) <= rows)[None]
            allowed = causal if allowed is None else allowed & causal
        return allowed


def blocks(scores: Scores, values: Tensor) -> Iterator[Block]:
    """All that is to be computed, block by block, without what nothing attends."""
    _, heads, num_queries, num_keys = scores.shape
    if values.device.type == "cpu":
        size = rows_at_a_time(num_queries, num_keys)
        at_once = _heads_at_a_time(heads, size, num_keys)
    else:  # no cache to stay in, and every block is several launches
        size, at_once = max(1, min(num_queries, _GPU_ROWS)), heads
    width = 0 if scores.relative is None else num_keys + size - 1
    rooms = values.new_empty(at_once * size * num_keys), values.new_empty(at_once * size * width)
    number = 0
    for item, (rows, keys) in enumerate(scores.extents):
        part = _Part.of(scores, values, item, rows, keys)
        for some in slices(heads, at_once):
            for few in slices(rows, size):
                yield Block(number, part, some, few, rooms)
                number += 1


@dataclass(frozen=True)
class _Part:
    """One item's operands, contiguous, without what nothing attends; scaling is folded into the queries."""

    item: int
    query: Float[Tensor, "heads rows dim"]
    key: Float[Tensor, "heads keys dim"]
    values: Float[Tensor, "heads keys value_dim"]
    relative: tuple[Float[Tensor, "heads rows dim"], Float[Tensor, "heads distances dim"]] | None
    num_keys: int  # with those that nothing attends: distances are counted from the last of them
    allowed: Bool[Tensor, "#heads #rows keys"] | None
    bias: Float[Tensor, "#heads #rows keys"] | None
    is_causal: bool

    @classmethod
    def of(cls, scores: Scores, values: Tensor, item: int, rows: int, keys: int) -> _Part:
        relative = None
        if scores.relative is not None:
            relative_query = scores.relative.query[item, :, :rows] * scores.scaling
            relative_key = scores.relative.key[item if scores.relative.key.shape[0] > 1 else 0]
            relative = relative_query.contiguous(), relative_key.contiguous()
        allowed = _rows(_item(scores.mask, item), slice(0, rows), keys)
        return cls(
            item=item,
            query=(scores.query[item, :, :rows] * scores.scaling).contiguous(),
            key=scores.key[item, :, :keys].contiguous(),
            values=values[item, :, :keys].contiguous(),
            relative=relative,
            num_keys=scores.shape[-1],
            allowed=None if allowed is None or bool(allowed.all()) else allowed,
            bias=_rows(_item(scores.bias, item), slice(0, rows), keys),
            is_causal=scores.is_causal,
        )


def rows_at_a_time(num_queries: int, num_keys: int) -> int:
    """Rows of one head that are computed at a time: all of a small map, more the longer those of a great one are."""
    if num_queries * num_keys <= _BLOCK_SCORES:
        return max(1, num_queries)
    return min(num_queries, max(_FEWEST_ROWS, min(_MOST_ROWS, num_keys // _KEYS_PER_ROW // 16 * 16)))


def _heads_at_a_time(heads: int, rows: int, num_keys: int) -> int:
    """One for every thread, more where they are small."""
    threads = torch.get_num_threads()
    return max(1, min(heads, max(threads, threads * _BLOCK_SCORES // max(1, rows * num_keys))))


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + size, length))


def _item(tensor: Tensor | None, item: int) -> Tensor | None:
    return None if tensor is None else tensor[item if tensor.shape[0] > 1 else 0]


def _rows(tensor: Tensor | None, rows: slice, keys: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor[:, rows, :keys] if tensor.shape[-2] > 1 else tensor[..., :keys]


def _some(tensor: Tensor, some: slice, block: slice, keys: int) -> Tensor:
    tensor = tensor[some] if tensor.shape[0] > 1 else tensor
    return tensor[:, block, :keys] if tensor.shape[1] > 1 else tensor[..., :keys]
