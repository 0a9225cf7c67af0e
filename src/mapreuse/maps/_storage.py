"""Storages: the forms in which a shared map is kept until its last reader."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.maps._attend import attend, attend_with_lengths
from mapreuse.maps._map import AttentionMap, DenseMap, RecomputedMap, RuntimeMap
from mapreuse.maps._operators import is_plain, store_attention
from mapreuse.maps._runtime_operators import record_attention, records_runtime_operators
from mapreuse.maps._scores import Scores
from mapreuse.maps._softmax import softmax_dtype

STORAGES = ("dense", "dense16", "dense8", "recompute")
"""Weights; weights in 16 or 8 bits with a scale per row; or queries and keys, to compute the weights again."""

_COMPRESSED = {"dense16": torch.float16, "dense8": torch.uint8}
"""Types of compressed weights."""


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
    exact weights. Compressed maps have no gradient: with gradients enabled, and where a pass needs PyTorch's own
    operators (`is_plain`), "dense16" and "dense8" store the weights like "dense".

    Args:
        scores, values, dropout_p: as for `attend`.
        storage: one of `STORAGES`.
        buffer: memory for the weights, of the map's shape and `stored_dtype`, that may be overwritten. Used only
            without gradients.
    """
    if records_runtime_operators() and not scores.beyond_kernels:
        context, weights_and_scales = record_attention(scores, values, keep=True)
        return context, RuntimeMap(weights_and_scales)
    if storage == "recompute":
        return attend(scores, values, keep=False, dropout_p=dropout_p)[0], RecomputedMap(scores)
    if storage in _COMPRESSED and not torch.is_grad_enabled() and not is_plain(scores, values):
        stored = (
            torch.empty(scores.shape, dtype=_COMPRESSED[storage], device=values.device) if buffer is None else buffer
        )
        # Scales need the wider type: a row can sum to more than half precision resolves.
        scales: Tensor = values.new_empty(*scores.shape[:3], 1, dtype=softmax_dtype(values))
        context, used = store_attention(scores, values, stored, scales, dropout_p=dropout_p)
        return context, DenseMap(stored, scales, used)
    context, weights, lengths = attend_with_lengths(scores, values, keep=True, dropout_p=dropout_p, buffer=buffer)
    assert weights is not None
    return context, DenseMap(weights, None, lengths)


def stored_dtype(storage: str, scores: Scores) -> torch.dtype | None:
    """Type of the weights that `compute` stores without gradients; None if it stores none."""
    if storage == "recompute":
        return None
    return _COMPRESSED.get(storage, scores.query.dtype)


def nbytes(storage: str, scores: Scores) -> int:
    """Size in bytes of a map of these scores."""
    if storage == "recompute":
        return scores.nbytes
    batch, heads, num_queries, num_keys = scores.shape
    if storage in _COMPRESSED:
        per_row = num_keys * _COMPRESSED[storage].itemsize + softmax_dtype(scores.query).itemsize
    else:
        per_row = num_keys * scores.query.element_size()
    return batch * heads * num_queries * per_row
