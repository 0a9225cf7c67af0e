"""Storages: the forms in which a shared map is kept until its last reader."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.maps import _c_kernel
from mapreuse.maps._attend import attend
from mapreuse.maps._blocked import Block, blocked
from mapreuse.maps._map import AttentionMap, DenseMap, RecomputedMap
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import BlockDropout, softmax_dtype

STORAGES = ("dense", "dense16", "dense8", "recompute")
"""Weights; weights in 16 or 8 bits with a scale per row; or queries and keys, to compute the weights again."""

_COMPRESSED = {"dense16": (torch.float16, 1.0), "dense8": (torch.uint8, 255.0)}
"""Type of compressed weights, and the number that stores the maximum of a row."""


def compute(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    storage: str,
    *,
    dropout_p: float = 0.0,
    buffer: Tensor | None = None,
) -> tuple[Float[Tensor, "batch heads query value_dim"], AttentionMap]:
    """Compute the context of a computing layer, and its map in the given storage.

    "dense" and "recompute" are exact. "dense16" and "dense8" divide each row by its maximum, round it to 11
    significant bits or to multiples of 1/255, and scale it to a sum of one. The layer's own context always uses the
    exact weights. Compressed maps have no gradient: with gradients enabled, and under `torch.compile`, "dense16" and
    "dense8" store the weights like "dense".

    Args:
        scores, values, dropout_p: as for `attend`.
        storage: one of `STORAGES`.
        buffer: memory for the weights, of the map's shape and `stored_dtype`, that may be overwritten. Used only
            without gradients.
    """
    if storage == "recompute":
        return attend(scores, values, keep=False, dropout_p=dropout_p)[0], RecomputedMap(scores)
    if storage in _COMPRESSED and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _compressed(scores, values, storage, dropout_p, buffer)
    context, weights = attend(scores, values, keep=True, dropout_p=dropout_p, buffer=buffer)
    assert weights is not None
    return context, DenseMap(weights, None, None if torch.compiler.is_compiling() else scores.valid_lengths)


def stored_dtype(storage: str, scores: Scores) -> torch.dtype | None:
    """Type of the weights that `compute` stores without gradients; None if it stores none."""
    if storage == "recompute":
        return None
    return _COMPRESSED[storage][0] if storage in _COMPRESSED else scores.query.dtype


def nbytes(storage: str, scores: Scores) -> int:
    """Size in bytes of a map of these scores."""
    if storage == "recompute":
        return scores.nbytes
    batch, heads, num_queries, num_keys = scores.shape
    if storage in _COMPRESSED:
        per_row = num_keys * _COMPRESSED[storage][0].itemsize + softmax_dtype(scores.query).itemsize
    else:
        per_row = num_keys * scores.query.element_size()
    return batch * heads * num_queries * per_row


def _compressed(
    scores: Scores, values: Tensor, storage: str, dropout_p: float, buffer: Tensor | None
) -> tuple[Tensor, DenseMap]:
    dtype, maximum = _COMPRESSED[storage]
    stored = _c_kernel.map_memory(scores, dtype) if buffer is None else buffer
    # Scales need the wider type: a row can sum to more than half precision resolves.
    scales = values.new_zeros(*scores.shape[:3], 1, dtype=softmax_dtype(values))
    if dropout_p == 0.0 and _c_kernel.computes(scores, values):
        return _c_kernel.compute(scores, values, stored, scales), DenseMap(stored, scales, scores.valid_lengths)
    for item, (rows, _) in enumerate(scores.valid_lengths):
        stored[item, :, rows:] = 0

    def map_of(block: Block) -> Tensor:
        weights = block.compute_map()
        wide = weights.to(scales.dtype)
        numbers = wide * (maximum / wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny))
        numbers = (numbers if dtype.is_floating_point else numbers.round_()).to(dtype)
        place = stored[block.place]
        place[..., : block.keys] = numbers
        place[..., block.keys :] = 0
        total = numbers.sum(-1, keepdim=True, dtype=scales.dtype)
        # NaN cannot be stored in 8 bits, so the scale carries it.
        scales[block.place] = torch.where(total > 0, 1 / total, 0) + 0 * weights.sum(-1, keepdim=True)
        return weights

    context = blocked(scores, values, map_of, BlockDropout.drawn(dropout_p))
    return context, DenseMap(stored, scales, scores.valid_lengths)
