"""Softmax of a block of scores, with what is added to them: in C where that was built, in PyTorch elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.maps import _c_kernel
from mapreuse.maps._softmax import softmax_dtype


def softmax_of_sum(
    scores: Float[Tensor, "heads rows keys"],
    addend: Float[Tensor, "heads rows keys"] | None,
    out: Float[Tensor, "heads rows keys"],
) -> None:
    """out = softmax(scores + addend) over keys; the scores are overwritten.

    In C a row stays in the first-level cache from the sum to the last division, and the exponential is a polynomial,
    good to 4e-6 of every weight; in PyTorch, the sum is a pass of its own over the block.

    Args:
        scores: of adjacent keys; of half precision, they are softmaxed in float32.
        addend: of adjacent keys, which may overlap from row to row, or None.
        out: of adjacent keys; it may be `scores`.
    """
    if scores.stride(2) == out.stride(2) == 1 and _c_kernel.serves(scores, out):
        _c_kernel.softmax_of_sum(scores, addend, out)
        return
    if addend is not None:
        scores += addend
    if softmax_dtype(scores) != scores.dtype:
        out.copy_(torch.softmax(scores, dim=-1, dtype=softmax_dtype(scores)))
        return
    for head in range(len(scores)):  # whose rows lie side by side, also in a place between other rows
        torch.softmax(scores[head], dim=-1, out=out[head])
