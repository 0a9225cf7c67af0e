"""How a computing layer's map is carried to its readers: the storages."""

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
"""Weights as they are; compressed to 16 or 8 bits with a scale per row; queries and keys instead of weights."""

_LEVELS = {"dense16": (torch.float16, 1.0), "dense8": (torch.uint8, 255.0)}
"""Type and greatest number of compressed weights."""


def compute(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    storage: str,
    *,
    dropout_p: float = 0.0,
    buffer: Tensor | None = None,
) -> tuple[Float[Tensor, "batch heads query value_dim"], AttentionMap]:
    """Context of a computing layer, and its map as `storage` carries it.

    Compressed weights are the exact ones, over the greatest of their row, rounded: to 11 significant bits for
    "dense16"; to whole 255ths of the greatest, at most 1/510 of it away, for "dense8"; and scaled so that the row
    sums to one again. The layer's own context is made of the exact ones. A compressed map has no gradient: where
    gradients are on, and while `torch.compile` traces, weights are kept as they are.

    Args:
        scores, values, dropout_p: as for `attend`.
        buffer: memory for the weights, of their shape and `stored_dtype`, to be overwritten; without gradients only.
        storage: one of `STORAGES`.
    """
    if storage == "recompute":
        return attend(scores, values, keep=False, dropout_p=dropout_p)[0], RecomputedMap(scores)
    if storage in _LEVELS and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _compressed(scores, values, storage, dropout_p, buffer)
    context, weights = attend(scores, values, keep=True, dropout_p=dropout_p, buffer=buffer)
    assert weights is not None
    return context, DenseMap(weights, extents=None if torch.compiler.is_compiling() else scores.extents)


def stored_dtype(storage: str, scores: Scores) -> torch.dtype | None:
    """Type of the weights that `compute` stores without gradients; None where it stores none."""
    if storage == "recompute":
        return None
    return _LEVELS[storage][0] if storage in _LEVELS else scores.query.dtype


def nbytes(storage: str, scores: Scores) -> int:
    """Bytes that a map of these scores keeps alive until its last reader."""
    if storage == "recompute":
        return scores.nbytes
    batch, heads, num_queries, num_keys = scores.shape
    if storage in _LEVELS:
        per_row = num_keys * _LEVELS[storage][0].itemsize + softmax_dtype(scores.query).itemsize
    else:
        per_row = num_keys * scores.query.element_size()
    return batch * heads * num_queries * per_row


def _compressed(
    scores: Scores, values: Tensor, storage: str, dropout_p: float, buffer: Tensor | None
) -> tuple[Tensor, DenseMap]:
    dtype, greatest = _LEVELS[storage]
    levels = _c_kernel.map_memory(scores, dtype) if buffer is None else buffer
    # 255 times the row's sum over its greatest weight is more than half precision can tell.
    scales = values.new_zeros(*scores.shape[:3], 1, dtype=softmax_dtype(values))
    if dropout_p == 0.0 and _c_kernel.computes(scores, values):
        return _c_kernel.compute(scores, values, levels, scales), DenseMap(levels, scales, scores.extents)
    for item, (rows, _) in enumerate(scores.extents):
        levels[item, :, rows:] = 0

    def map_of(block: Block) -> Tensor:
        weights = block.compute_map()
        wide = weights.to(scales.dtype)
        numbers = wide * (greatest / wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny))
        numbers = (numbers if dtype.is_floating_point else numbers.round_()).to(dtype)
        place = levels[block.place]
        place[..., : block.keys] = numbers
        place[..., block.keys :] = 0
        total = numbers.sum(-1, keepdim=True, dtype=scales.dtype)
        # A weight that is not a number has none in 8 bits: the scale hands it on.
        scales[block.place] = torch.where(total > 0, 1 / total, 0) + 0 * weights.sum(-1, keepdim=True)
        return weights

    context = blocked(scores, values, map_of, BlockDropout.drawn(dropout_p))
    return context, DenseMap(levels, scales, scores.extents)
