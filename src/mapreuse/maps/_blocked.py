"""Exact attention without a tape, some heads and query rows at a time: the computing layer's core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import drop, softmax_dtype

_BLOCK_SCORES = 1 << 18
"""Scores of one head that are computed at a time: with their positional part, what the cache of one core holds."""
_FEWEST_ROWS, _MOST_ROWS = 32, 128
"""Between these, matrix products are near their peak and the rows' scores stay in cache."""


def blocked(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    *,
    keep: bool,
    dropout_p: float,
    buffer: Tensor | None,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query key"] | None]:
    """What `attend` promises, where no gradient is needed.

    A block is as many heads as there are threads, each by a few rows: positional scores of the T + rows − 1 distances
    that those rows span, read as a slanted view while the content scores are added to them; softmax in place; product
    with the values. Nothing is computed beyond the last query and key of an item that attend anything, nor, where the
    scores are causal, for keys after a block's last row.
    """
    batch, heads, num_queries, num_keys = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    weights = None
    if keep:
        weights = values.new_empty(scores.shape) if buffer is None else buffer
    at_once = min(heads, torch.get_num_threads()) if values.device.type == "cpu" else heads
    size = min(num_queries, max(_FEWEST_ROWS, min(_MOST_ROWS, _BLOCK_SCORES // max(num_keys, 1) // 16 * 16)))
    room = values.new_empty(at_once * size * num_keys)
    positional_room = None
    if scores.relative is not None:
        positional_room = values.new_empty(at_once * size * (num_keys + size - 1))
    for item, (rows, keys) in enumerate(scores.extents):
        part = _Part.of(scores, values, item, rows, keys)
        context[item, :, rows:] = 0
        if weights is not None:
            weights[item, :, rows:] = 0
            weights[item, :, :rows, keys:] = 0
        for some in _slices(heads, at_once):
            for block in _slices(rows, size):
                used = min(keys, block.stop) if scores.is_causal else keys
                shape = (some.stop - some.start, block.stop - block.start, used)
                out = room[: shape[0] * shape[1] * shape[2]].view(shape)
                part.write_scores(some, block, out, positional_room)
                part.write_map(some, block, out)
                torch.bmm(drop(out, dropout_p), part.values[some, :used], out=context[item, some, block])
                if weights is not None:
                    weights[item, some, block, :used] = out
                    weights[item, some, block, used:keys] = 0
    return context, weights


@dataclass(frozen=True)
class _Part:
    """One item's operands, contiguous, without what nothing attends; scaling is folded into the queries."""

    query: Float[Tensor, "heads rows dim"]
    key: Float[Tensor, "heads keys dim"]
    values: Float[Tensor, "heads keys value_dim"]
    relative_query: Float[Tensor, "heads rows dim"] | None
    relative_key: Float[Tensor, "heads distances dim"] | None
    num_keys: int  # with those that nothing attends: distances are counted from the last of them
    allowed: Bool[Tensor, "#heads #rows keys"] | None
    bias: Float[Tensor, "#heads #rows keys"] | None
    is_causal: bool

    @classmethod
    def of(cls, scores: Scores, values: Tensor, item: int, rows: int, keys: int) -> _Part:
        relative_query = relative_key = None
        if scores.relative is not None:
            relative_query = (scores.relative.query[item, :, :rows] * scores.scaling).contiguous()
            relative_key = scores.relative.key[item if scores.relative.key.shape[0] > 1 else 0].contiguous()
        allowed = _rows(_item(scores.mask, item), slice(0, rows), keys)
        return cls(
            query=(scores.query[item, :, :rows] * scores.scaling).contiguous(),
            key=scores.key[item, :, :keys].contiguous(),
            values=values[item, :, :keys].contiguous(),
            relative_query=relative_query,
            relative_key=relative_key,
            num_keys=scores.shape[-1],
            allowed=None if allowed is None or bool(allowed.all()) else allowed,
            bias=_rows(_item(scores.bias, item), slice(0, rows), keys),
            is_causal=scores.is_causal,
        )

    def write_scores(self, some: slice, block: slice, out: Tensor, positional_room: Tensor | None) -> None:
        """Content and positional scores, and the bias, of these heads and rows and the first keys."""
        query, key = self.query[some, block], self.key[some, : out.shape[-1]].mT
        if self.relative_query is None or self.relative_key is None or positional_room is None:
            torch.bmm(query, key, out=out)
        else:
            heads, rows, keys = out.shape
            # Rows start … stop meet keys 0 … keys − 1 at the distances stop − 1 … start − keys + 1, a window of them.
            width = keys + rows - 1
            first = self.num_keys - block.stop
            positional = positional_room[: heads * rows * width].view(heads, rows, width)
            window = self.relative_key[some, first : first + width].mT
            torch.bmm(self.relative_query[some, block], window, out=positional)
            slanted = positional.as_strided(out.shape, (rows * width, width - 1, 1), rows - 1)
            torch.baddbmm(slanted, query, key, out=out)
        if self.bias is not None:
            out += _some(self.bias, some, block, out.shape[-1])

    def write_map(self, some: slice, block: slice, out: Tensor) -> None:
        """Scores to weights, in place."""
        allowed = None if self.allowed is None else _some(self.allowed, some, block, out.shape[-1])
        if self.is_causal:
            rows = torch.arange(block.start, block.stop, device=out.device)[:, None]
            causal = (torch.arange(out.shape[-1], device=out.device) <= rows)[None]
            allowed = causal if allowed is None else allowed & causal
        if allowed is not None:
            out.masked_fill_(~allowed, torch.finfo(out.dtype).min)
        if softmax_dtype(out) == out.dtype:
            torch.softmax(out, dim=-1, out=out)
        else:
            out.copy_(torch.softmax(out, dim=-1, dtype=softmax_dtype(out)))
        if self.allowed is not None and allowed is not None:
            out *= allowed.any(-1, keepdim=True)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
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
