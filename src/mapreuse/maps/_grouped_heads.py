"""Grouped-query attention: several heads of the queries share one head of the keys and values."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from mapreuse.maps._scores import Scores


def with_all_heads(scores: Scores) -> Scores:
    """Scores with one head of the keys for each head of the queries."""
    return replace(scores, key=repeated(scores.key, scores), key_heads=None)


def repeated(
    tensor: Float[Tensor, "batch key_heads key dim"], scores: Scores
) -> Float[Tensor, "batch heads key dim"]:
    """Keys or values with one head for each head of the queries."""
    times = scores.query.shape[1] // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, 1)
