"""Softmax of a block of scores, with what is added to them: in C where that was built, in PyTorch elsewhere."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.maps._softmax import softmax_dtype

_Strides = ctypes.c_int64 * 2


def softmax_of_sum(
    scores: Float[Tensor, "heads rows keys"],
    addend: Float[Tensor, "heads rows keys"] | None,
    out: Float[Tensor, "heads rows keys"],
) -> None:
    """out = softmax(scores + addend) over keys; the scores are overwritten.

    In C (`_rows.c`) a row stays in the first-level cache from the sum to the last division, and the exponential is a
    polynomial, good to 2e-6 of every weight; in PyTorch, the sum is a pass of its own over the block.

    Args:
        scores: of adjacent keys; of half precision, they are softmaxed in float32.
        addend: of adjacent keys, which may overlap from row to row, or None.
        out: of adjacent keys; it may be `scores`.
    """
    in_c = _in_c() if _fits(scores, out) else None
    if in_c is None:
        _in_pytorch(scores, addend, out)
    else:
        in_c(scores, addend, out)


def is_built() -> bool:
    """Whether the C function was built when the package was installed."""
    return _in_c() is not None


def _fits(scores: Tensor, out: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.stride(2) == out.stride(2) == 1


def _in_pytorch(scores: Tensor, addend: Tensor | None, out: Tensor) -> None:
    if addend is not None:
        scores += addend
    if softmax_dtype(scores) != scores.dtype:
        out.copy_(torch.softmax(scores, dim=-1, dtype=softmax_dtype(scores)))
        return
    for head in range(len(scores)):  # whose rows lie side by side, also in a place between other rows
        torch.softmax(scores[head], dim=-1, out=out[head])


@cache
def _in_c() -> Callable[[Tensor, Tensor | None, Tensor], None] | None:
    found = importlib.util.find_spec("mapreuse.maps._rows_in_c")
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(found.origin).mapreuse_softmax_of_sum
    except OSError:  # built for another machine
        return None
    function.restype = None

    def call(scores: Tensor, addend: Tensor | None, out: Tensor) -> None:
        function(
            *_memory(scores),
            *((None, None) if addend is None else _memory(addend)),
            *_memory(out),
            *map(ctypes.c_int64, scores.shape),
        )

    return call


def _memory(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_void_p(tensor.data_ptr()), _Strides(tensor.stride(0), tensor.stride(1))
