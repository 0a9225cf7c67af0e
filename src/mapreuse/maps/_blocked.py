"""Exact attention in PyTorch, in blocks of heads and rows, and its gradients: the twin of the C kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mapreuse.maps._scores import RelativePositions, Scores, as_index, on_gpu, part_of_item
from mapreuse.maps._softmax import BlockDropout, softmax_of_sum

_BLOCK_SCORES = 1 << 17
"""Number of scores per thread in a block of small maps, which takes all rows of a head."""
_MIN_ROWS, _MAX_ROWS, _KEYS_PER_ROW = 128, 256, 20
"""Number of rows in a block of large maps. With fewer, products are slow; with more, the scores leave the caches."""
_GPU_ROWS, _MAX_SHORT_ON_GPU = 1024, 1 << 25
"""On a GPU: rows in a block, and number of weights up to which the whole batch is computed at once. Not tuned."""
_MAX_SHORT = 1 << 13
"""Maximum number of weights per head for which one product of the whole batch, padding included, is fastest."""
_KEYS_PER_QUERY = 64
"""Minimum ratio of keys to queries for which it is fastest, too: in decoding, where one position attends to many."""


def is_short(values: Tensor, shape: Sequence[int]) -> bool:
    """Whether a map of this shape is computed and applied for the whole batch at once.

    On a GPU, a block costs several kernel launches, so that larger maps count as short. Gradients need more memory.
    """
    _, _, num_queries, num_keys = shape
    if num_queries * num_keys <= _MAX_SHORT or _KEYS_PER_QUERY * num_queries <= num_keys:
        return True
    return on_gpu(values) and not torch.is_grad_enabled() and math.prod(shape) <= _MAX_SHORT_ON_GPU


def blocked(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    map_of: Callable[[Block], Tensor],
    dropout: BlockDropout | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Compute the context block by block, without gradients.

    A block computes its scores in place. With relative positions, it also multiplies its queries by the keys of the
    T + rows − 1 distances that its rows span, and adds a slanted view of the products. Padding is not computed. If
    the scores are causal, the keys after a block's last row are not computed either.

    Args:
        scores, values: as for `attend`.
        map_of: computes the weights of a block, and may store them.
        dropout: dropout of the weights.
    """
    batch, heads, num_queries, _ = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    for item, (rows, _) in enumerate(scores.valid_lengths):
        context[item, :, rows:] = 0
    for block in blocks(scores, values):
        weights = map_of(block)
        dropped = weights if dropout is None else weights * dropout.factors(weights, block.numbers)
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


def compressing(
    scores: Scores, stored: Tensor, scales: Float[Tensor, "batch heads query 1"]
) -> Callable[[Block], Tensor]:
    """A `map_of` for `blocked` that also writes compressed weights to `stored` and `scales`, and zeros as padding.

    Each row is divided by its maximum, and in uint8 rounded to multiples of 1/255.
    """
    maximum = 1.0 if stored.is_floating_point() else 255.0
    for item, (rows, _) in enumerate(scores.valid_lengths):
        stored[item, :, rows:] = 0
        scales[item, :, rows:] = 0

    def map_of(block: Block) -> Tensor:
        weights = block.compute_map()
        wide = weights.to(scales.dtype)
        numbers = wide * (maximum / wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny))
        numbers = (numbers if stored.is_floating_point() else numbers.round_()).to(stored.dtype)
        place = stored[block.place]
        place[..., : block.keys] = numbers
        place[..., block.keys :] = 0
        total = numbers.sum(-1, keepdim=True, dtype=scales.dtype)
        # NaN cannot be stored in 8 bits, so the scale carries it.
        scales[block.place] = torch.where(total > 0, 1 / total, 0) + 0 * weights.sum(-1, keepdim=True)
        return weights

    return map_of


class Block:
    """A block of one item: some heads, at least one per thread, and some rows of each.

    Attributes:
        numbers: a number for each of its heads, which differs between items, heads and rows.
        item, heads, rows, keys: index of the item, slices of heads and rows, and number of keys.
        place: index of the block in a tensor of shape (batch, heads, query, …).
        shape: (heads, rows, keys).
        query, key, values: its part of the tensors; queries include the scaling of the scores.
        distances: indices of the distances between its rows and keys, from row stop − 1 and key 0 downwards.
        relative: queries for relative positions, times the scaling, and keys of these distances; or None.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        place: tuple[int, slice, slice],
        scores: Scores,
        values: Tensor,
        num_keys: int,
        memory: tuple[Tensor, Tensor],
    ) -> None:
        self.numbers, self.place = numbers, place
        self.item, self.heads, self.rows = _, heads, rows = place
        valid_keys = scores.key.shape[2]
        self.keys = min(valid_keys, rows.stop) if scores.is_causal else valid_keys
        self.shape = heads.stop - heads.start, rows.stop - rows.start, self.keys
        self.query = scores.query[0, heads, rows]
        self.key = scores.key[0, heads, : self.keys]
        self.values = values[heads, : self.keys]
        first = num_keys - rows.stop
        self.distances = slice(first, first + self.keys + self.shape[1] - 1)
        self.relative: tuple[Tensor, Tensor] | None = None
        if scores.relative is not None:
            self.relative = scores.relative.query[0, heads, rows], scores.relative.key[0, heads, self.distances]
        self._scores = scores
        self._memory = memory

    def positional(self) -> tuple[Float[Tensor, "heads rows distances"], Float[Tensor, "heads rows keys"]]:
        """Memory for the scores of each row at each distance, and the slanted view of it by key."""
        heads, rows, keys = self.shape
        width = keys + rows - 1
        by_distance = self._memory[1][: heads * rows * width].view(heads, rows, width)
        return by_distance, by_distance.as_strided(self.shape, (rows * width, width - 1, 1), rows - 1)

    def compute_map(self, place: Tensor | None = None) -> Float[Tensor, "heads rows keys"]:
        """Compute the weights in `place`, or in memory that the next block overwrites."""
        scores, positional = self._products()
        allowed = self._allowed()
        if self._scores.bias is not None:
            scores += self._part(self._scores.bias)
        if allowed is not None:
            if positional is not None:
                scores += positional
            scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
            positional = None
        out = scores if place is None else place
        softmax_of_sum(scores, positional, out)
        if allowed is not None and self._scores.mask is not None:
            out *= allowed.any(-1, keepdim=True)
        return out

    def _products(self) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"] | None]:
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
        allowed = None if self._scores.mask is None else self._part(self._scores.mask)
        if self._scores.is_causal:
            rows = torch.arange(self.rows.start, self.rows.stop, device=self._memory[0].device)[:, None]
            causal = (torch.arange(self.keys, device=rows.device) <= rows)[None]
            allowed = causal if allowed is None else allowed & causal
        return allowed

    def _part(self, tensor: Tensor) -> Tensor:
        """This block's part of a mask or bias, of which heads and rows may broadcast."""
        tensor = tensor[0, self.heads] if tensor.shape[1] > 1 else tensor[0]
        return tensor[:, self.rows, : self.keys] if tensor.shape[1] > 1 else tensor[..., : self.keys]


def blocks(scores: Scores, values: Tensor) -> Iterator[Block]:
    """Divide an attention into blocks, without its padding."""
    _, heads, num_queries, num_keys = scores.shape
    if on_gpu(values):  # it has no cache to fit into, and each block costs several kernel launches
        num_rows, num_heads = max(1, min(num_queries, _GPU_ROWS)), heads
    else:
        num_rows = rows_per_block(num_queries, num_keys)
        num_heads = _heads_per_block(heads, num_rows, num_keys)
    width = 0 if scores.relative is None else num_keys + num_rows - 1
    memory = values.new_empty(num_heads * num_rows * num_keys), values.new_empty(num_heads * num_rows * width)
    for index, (valid_rows, valid_keys) in enumerate(scores.valid_lengths):
        of_item = _scores_of_item(scores, index, valid_rows, valid_keys)
        item_values = values[index, :, :valid_keys].contiguous()
        for of_heads in slices(heads, num_heads):
            for of_rows in slices(valid_rows, num_rows):
                numbers = [
                    (index * heads + head) * num_queries + of_rows.start
                    for head in range(of_heads.start, of_heads.stop)
                ]
                yield Block(numbers, (index, of_heads, of_rows), of_item, item_values, num_keys, memory)


def _scores_of_item(scores: Scores, item: int, rows: int, keys: int) -> Scores:
    """The scores of one item without padding, in contiguous tensors. Queries include the scaling."""
    relative = scores.relative
    if relative is not None:
        shared = relative.key.shape[0] == 1
        relative = RelativePositions(
            (relative.query[item, None, :, :rows] * scores.scaling).contiguous(),
            relative.key[0 if shared else item, None].contiguous(),
        )
    mask = part_of_item(scores.mask, item, rows, keys)
    bias = part_of_item(scores.bias, item, rows, keys)
    return Scores(
        query=(scores.query[item, None, :, :rows] * scores.scaling).contiguous(),
        key=scores.key[item, None, :, :keys].contiguous(),
        scaling=1.0,
        mask=None if mask is None or _allows_all(mask) else mask[None],
        bias=None if bias is None else bias[None],
        is_causal=scores.is_causal,
        relative=relative,
    )


def _allows_all(mask: Tensor) -> bool:
    """Whether a mask allows everything. On a GPU it is not read, because that would wait for the GPU."""
    return not on_gpu(mask) and bool(mask.all())


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


def blocked_gradients(
    scores: Scores,
    values: Tensor,
    weights: Tensor | None,
    dropout: BlockDropout | None,
    d_context: Tensor | None,
    d_weights: Tensor | None,
) -> list[Tensor]:
    """Gradients of `blocked` for queries, keys, values, bias and relative positions; empty tensors for absent ones.

    With the scores S, the map P, the context C and the gradient G of the map from its readers, a block of rows needs
    only its own rows of the map:

        dV = Pᵀ dC,    dP = dC Vᵀ + G,    dS = P ∘ (dP − rowsum(P ∘ dP))

    If the map was not kept, its rows are computed again (Dao et al. 2022). No other T × T tensor is stored.

    Args:
        scores, values, dropout: as in the forward pass.
        weights: the map, or None if it was not kept.
        d_context: gradient of the context, or None.
        d_weights: gradient of the map, or None.
    """
    relative, bias = scores.relative, scores.bias
    query, key = scores.query, scores.key
    d_query, d_key, d_values = (tensor.new_zeros(tensor.shape) for tensor in (query, key, values))
    d_bias = query.new_zeros(0 if bias is None else bias.shape)
    d_positions = [query.new_zeros(0 if relative is None else t.shape) for t in scores.factors[2:] or [query, query]]
    for block in blocks(scores, values):
        rows = block.place
        keys = block.item, block.heads, slice(block.keys)
        block_map = block.compute_map() if weights is None else weights[rows][..., : block.keys]
        d_map = torch.zeros_like(block_map)
        if d_context is not None:
            d_rows = d_context[rows]
            d_map = d_rows @ block.values.mT
            if dropout is None:
                d_values[keys] += block_map.mT @ d_rows
            else:
                factors = dropout.factors(d_map, block.numbers)
                d_values[keys] += (block_map * factors).mT @ d_rows
                d_map *= factors
        if d_weights is not None:
            d_map += d_weights[rows][..., : block.keys]
        d_scores = block_map * (d_map - (block_map * d_map).sum(-1, keepdim=True))
        d_query[rows] = d_scores @ block.key * scores.scaling
        d_key[keys] += d_scores.mT @ block.query
        if bias is not None:
            _add_reduced(d_bias, block, d_scores)
        if block.relative is not None:
            by_distance, by_key = block.positional()
            by_distance.zero_()
            by_key.copy_(d_scores)
            relative_query, relative_key = block.relative
            d_positions[0][rows] = by_distance @ relative_key * scores.scaling
            item = block.item if d_positions[1].shape[0] > 1 else 0
            d_positions[1][item, block.heads, block.distances] += by_distance.mT @ relative_query
    return [d_query, d_key, d_values, d_bias, *d_positions]


def dropout_factors(scores: Scores, values: Tensor, dropout: BlockDropout) -> Float[Tensor, "batch heads query key"]:
    """The factors by which `blocked` multiplies the weights of the whole map; zero for padding."""
    factors = values.new_zeros(scores.shape)
    for block in blocks(scores, values):
        factors[block.place][..., : block.keys] = dropout.factors(values.new_empty(block.shape), block.numbers)
    return factors


def applied_in_blocks(
    weights: Float[Tensor, "batch map_heads query key"] | UInt8[Tensor, "batch map_heads query key"],
    scales: Float[Tensor, "batch map_heads query 1"] | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    heads: Sequence[tuple[int, int]],
    valid_lengths: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch heads query value_dim"]:
    """Apply weights to another layer's values block by block: the twin of `_c_kernel.apply`."""
    batch, _, num_queries, _ = weights.shape
    context = values.new_empty(batch, num_queries, len(heads), values.shape[-1]).transpose(1, 2)
    map_heads, value_heads = (as_index([pair[which] for pair in heads]) for which in (0, 1))
    if on_gpu(values):  # the whole batch: a GPU computes padding faster than it starts more kernels
        of_heads = values[:, value_heads]
        for block in slices(num_queries, num_queries if scales is None else _GPU_ROWS):
            part = weights[:, map_heads, block]
            if scales is not None:
                part = (part * scales[:, map_heads, block]).to(values.dtype)
            context[:, :, block] = part @ of_heads
        return context
    for item, (rows, keys) in enumerate(valid_lengths):
        context[item, :, rows:] = 0
        item_values = values[item, value_heads, :keys]
        for block in slices(rows, rows_per_block(rows, keys)):
            block_weights = weights[item, :, block, :keys][map_heads]
            if scales is not None:
                # Unscaled products of uint8 weights could overflow in half precision.
                block_weights = (block_weights * scales[item, :, block][map_heads]).to(values.dtype)
            torch.bmm(block_weights, item_values, out=context[item, :, block])
    return context


def _add_reduced(total: Tensor, block: Block, addend: Tensor) -> None:
    """Add a block's (heads, rows, keys) to the gradient of a tensor whose batch, heads or rows broadcast."""
    heads, rows = block.heads, block.rows
    if total.shape[1] == 1:
        heads, addend = slice(0, 1), addend.sum(0, keepdim=True)
    if total.shape[2] == 1:
        rows, addend = slice(0, 1), addend.sum(1, keepdim=True)
    total[block.item if total.shape[0] > 1 else 0, heads, rows, : addend.shape[-1]] += addend
