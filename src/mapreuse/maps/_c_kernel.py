"""The C kernels of `_kernel.c`, if they were compiled: attention on a CPU, in float32."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast

from mapreuse.maps._scores import Scores, part_of_item

_TYPES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}
"""Types of stored weights and their numbers in C."""
_MAX_ISA = 2
"""Newest instruction set to use if the processor has it: 0 for any processor, 1 for AVX2, 2 for AVX-512."""
_MIN_ROWS, _MAX_ROWS = 12, 48
"""Number of rows of a head that a thread computes at a time, in tiles of six. With fewer, keys are read too often."""
_MAX_KEPT = 1 << 24
"""Maximum size in bytes of the working memory that a thread keeps for the next call."""
_MIN_LARGE = 1 << 23
"""Minimum size in bytes of a map whose memory is requested in large pages."""

KERNEL_RANGE = "mapreuse C kernel"
"""Name of the profiler range around the kernel of a computing layer, inside `recorded_phases`."""
_PHASES = ("positional_scores", "scores", "softmax", "context")
_recorded: ContextVar[list[dict[str, float]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recorded_phases() -> Iterator[list[dict[str, float]]]:
    """Record the time that each call of a computing layer's C kernel spends in its phases.

    Yields:
        A list that grows by one dictionary per call in this thread: seconds by phase ("positional_scores", "scores",
        "softmax", "context"), summed over the kernel's threads.
    """
    found: list[dict[str, float]] = []
    before = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(before)


def _integers(*names: str) -> tuple[tuple[str, type[c_int64]], ...]:
    return tuple((name, c_int64) for name in names)


class _Matrices(ctypes.Structure):
    _fields_ = (("data", c_void_p), *_integers("head", "row"))

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Matrices:
        """Describe a tensor of shape (heads, rows, columns) with adjacent columns; sizes of one broadcast."""
        if tensor is None:
            return cls(None, 0, 0)
        return cls(tensor.data_ptr(), _stride(tensor, 0), _stride(tensor, 1))


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *_integers("head", "row", "type"),
        ("scales", c_void_p),
        *_integers("scales_head", "scales_row"),
    )

    @classmethod
    def of(cls, weights: Tensor | None, scales: Tensor | None) -> _Map:
        if weights is None:
            return cls(None, 0, 0, 0, None, 0, 0)
        of_scales = (None, 0, 0) if scales is None else (scales.data_ptr(), scales.stride(0), scales.stride(1))
        return cls(weights.data_ptr(), weights.stride(0), weights.stride(1), _TYPES[weights.dtype], *of_scales)


class _ComputeArguments(ctypes.Structure):
    _fields_ = (
        *_integers("heads", "rows", "keys", "dim", "value_dim"),
        ("scaling", c_float),
        ("is_causal", c_int64),
        *((name, _Matrices) for name in ("query", "key", "values", "relative_query", "relative_key")),
        ("num_keys", c_int64),
        *((name, _Matrices) for name in ("bias", "allowed", "context")),
        ("weights", _Map),
        *_integers("width", "rows_at_a_time", "threads", "max_isa"),
        ("seconds", c_void_p),
        ("maxima", _Matrices),
        *_integers("window", "block", "first_query"),
    )


class _ApplyArguments(ctypes.Structure):
    _fields_ = (
        *_integers("map_heads", "rows", "keys", "value_dim"),
        ("weights", _Map),
        ("values", _Matrices),
        ("contexts", c_int64),
        ("map_of", c_void_p),
        ("values_of", c_void_p),
        ("context", _Matrices),
        *_integers("threads", "max_isa"),
    )


def serves(*tensors: Tensor) -> bool:
    """Whether the C kernels can process these tensors: float32 on a CPU, and the kernels are compiled."""
    return all(one.dtype == torch.float32 and _is_memory(one) for one in tensors) and library() is not None


def computes(scores: Scores, values: Tensor) -> bool:
    """Whether `compute` supports these. Shapes that do not fit are left to PyTorch, which raises an error."""
    batch, heads, num_queries, num_keys = scores.shape
    relative, mask, bias = scores.relative, scores.mask, scores.bias
    return (
        values.shape[:3] == scores.key.shape[:3] == (batch, heads, num_keys)
        and (relative is None or relative.query.shape[:3] == (batch, heads, num_queries))
        and (relative is None or relative.key.shape[1:3] == (heads, 2 * num_keys - 1))
        and (relative is None or num_queries == num_keys)
        and (mask is None or (mask.dtype == torch.bool and mask.shape[-1] == num_keys))
        and (bias is None or bias.shape[-1] == num_keys)
        and serves(values, *scores.factors, *([] if bias is None else [bias]))
    )


@dataclass(frozen=True)
class Maxima:
    """Memory for the largest weights of each block of queries, without keys inside the window of their query.

    Attributes:
        weights: zeros; receives the maximum over heads and over the queries of a block.
        first_query: for each item, the query that blocks are counted from.
        window, block: as in `KeySettings`.
    """

    weights: Float[Tensor, "batch blocks key"]
    first_query: Int[Tensor, " batch"]
    window: int
    block: int


def compute(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    weights: Tensor | None = None,
    scales: Float[Tensor, "batch heads query 1"] | None = None,
    maxima: Maxima | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Compute the context of a computing layer and, in `weights`, its map.

    Each thread takes some rows of a head through scores, softmax and context inside its own cache. Padding is not
    computed. If the scores are causal, the keys after the last of these rows are not computed either.

    Args:
        scores, values: as for `attend`.
        weights: contiguous memory for the map, of shape (batch, heads, query, key). float32 stores the weights;
            float16 and uint8 store them relative to the maximum of their row, uint8 in steps of 1/255.
        scales: memory for the scales of float16 and uint8 weights; rows of `scales * weights` sum to one.
        maxima: memory for the largest weights. They need as many queries as keys.
    """
    batch, heads, num_queries, num_keys = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    relative, phases = scores.relative, _recorded.get()
    for item, (rows, keys) in enumerate(scores.valid_lengths):
        context[item, :, rows:] = 0
        if weights is not None:
            weights[item, :, rows:] = 0
        if scales is not None:
            scales[item, :, rows:] = 0
        if rows == 0:
            continue
        # These names keep the tensors alive while the kernel reads them.
        allowed, bias = (_adjacent(part_of_item(part, item, rows, keys)) for part in (scores.mask, scores.bias))
        if allowed is not None and bool(allowed.all()):
            allowed = None
        query, key, item_values = (_adjacent(tensor[item]) for tensor in (scores.query, scores.key, values))
        relative_query = relative_key = None
        if relative is not None:
            relative_query = _adjacent(relative.query[item])
            relative_key = _adjacent(relative.key[item if relative.key.shape[0] > 1 else 0])
        of_threads = None
        if maxima is not None:
            of_threads = maxima.weights.new_zeros(torch.get_num_threads(), *maxima.weights.shape[1:])
        seconds = (c_double * len(_PHASES))()
        arguments = _ComputeArguments(
            heads=heads,
            rows=rows,
            keys=keys,
            dim=query.shape[-1],
            value_dim=item_values.shape[-1],
            scaling=scores.scaling,
            is_causal=scores.is_causal,
            query=_Matrices.of(query),
            key=_Matrices.of(key),
            values=_Matrices.of(item_values),
            relative_query=_Matrices.of(relative_query),
            relative_key=_Matrices.of(relative_key),
            num_keys=num_keys,
            bias=_Matrices.of(bias),
            allowed=_Matrices.of(allowed),
            context=_Matrices.of(context[item]),
            weights=_Map.of(None if weights is None else weights[item], None if scales is None else scales[item]),
            width=num_keys,
            rows_at_a_time=_rows_at_a_time(rows, heads),
            threads=torch.get_num_threads(),
            max_isa=_MAX_ISA,
            seconds=ctypes.addressof(seconds),
            maxima=_Matrices.of(of_threads),
            window=0 if maxima is None else maxima.window,
            block=0 if maxima is None else maxima.block,
            first_query=0 if maxima is None else int(maxima.first_query[item]),
        )
        with nullcontext() if phases is None else _RecordFunctionFast(KERNEL_RANGE):
            _call("mapreuse_compute", arguments)
        if phases is not None:
            phases.append(dict(zip(_PHASES, seconds, strict=True)))
        if maxima is not None and of_threads is not None:
            torch.amax(of_threads, 0, out=maxima.weights[item])
    return context


def apply(
    weights: Float[Tensor, "batch map_heads query key"] | UInt8[Tensor, "batch map_heads query key"],
    scales: Float[Tensor, "batch map_heads query 1"] | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    heads: Sequence[tuple[int, int]],
    valid_lengths: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch heads query value_dim"]:
    """Apply weights that `compute` stored to another layer's values.

        context[h] = (scales · weights)[m_h] @ values[v_h],    (m_h, v_h) = heads[h]

    Each head of the map is read once for all heads that apply it, and decompressed inside a thread's own cache.

    Raises:
        ValueError: if the values or heads do not fit the map.
    """
    batch, map_heads, num_queries, num_keys = weights.shape
    if values.shape[0] != batch or values.shape[2] != num_keys:
        raise ValueError(f"values of shape {tuple(values.shape)} do not fit a map of shape {tuple(weights.shape)}")
    if any(not (0 <= m < map_heads and 0 <= v < values.shape[1]) for m, v in heads):
        raise ValueError(
            f"heads {heads} do not fit a map with {map_heads} heads and values with {values.shape[1]} heads"
        )
    context = values.new_empty(batch, num_queries, len(heads), values.shape[-1]).transpose(1, 2)
    map_of, values_of = ((c_int64 * len(heads))(*(pair[which] for pair in heads)) for which in (0, 1))
    for item, (rows, keys) in enumerate(valid_lengths):
        context[item, :, rows:] = 0
        if rows == 0:
            continue
        item_weights, item_values = _adjacent(weights[item]), _adjacent(values[item])
        arguments = _ApplyArguments(
            map_heads=map_heads,
            rows=rows,
            keys=keys,
            value_dim=item_values.shape[-1],
            weights=_Map.of(item_weights, None if scales is None else scales[item]),
            values=_Matrices.of(item_values),
            contexts=len(heads),
            map_of=ctypes.addressof(map_of),
            values_of=ctypes.addressof(values_of),
            context=_Matrices.of(context[item]),
            threads=torch.get_num_threads(),
            max_isa=_MAX_ISA,
        )
        _call("mapreuse_apply", arguments)
    return context


def applies(weights: Tensor, values: Tensor) -> bool:
    """Whether `apply` supports these."""
    return weights.dtype in _TYPES and _is_memory(weights) and serves(values)


def use_large_pages(weights: Tensor) -> None:
    """Request large pages for memory that has not been written yet, if it is large and the system has them."""
    if weights.device.type == "cpu" and weights.nbytes >= _MIN_LARGE and (found := library()) is not None:
        found.mapreuse_advise(c_void_p(weights.data_ptr()), c_int64(weights.nbytes))


def softmax_of_sum(scores: Tensor, addend: Tensor | None, out: Tensor) -> None:
    """`_softmax.softmax_of_sum` in C, for tensors that the kernels can process."""
    found = library()
    assert found is not None
    strides = c_int64 * 2
    memory: list[c_void_p | ctypes.Array[c_int64] | None] = []
    for tensor in (scores, addend, out):
        memory += [None, None] if tensor is None else [c_void_p(tensor.data_ptr()), strides(*tensor.stride()[:2])]
    found.mapreuse_softmax_of_sum(*memory, *map(c_int64, (*scores.shape, torch.get_num_threads(), _MAX_ISA)))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if the package was installed without a C compiler.

    Raises:
        ImportError: if they were compiled from another version of `_kernel.c`.
    """
    found = importlib.util.find_spec("mapreuse.maps._kernel")
    if found is None or found.origin is None:
        return None
    try:
        kernels = ctypes.CDLL(found.origin)
    except OSError:  # compiled for another machine
        return None
    size = getattr(kernels, "mapreuse_arguments_size", None)
    if size is None or size() != 10_000 * ctypes.sizeof(_ComputeArguments) + ctypes.sizeof(_ApplyArguments):
        raise ImportError(
            f"{found.origin} was compiled from another version of mapreuse; install mapreuse again, or delete this "
            "file to run without it"
        )
    return kernels


def _is_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


class _Memory(threading.local):
    """Working memory of a thread. Small ones are kept for the next call, because fresh memory costs page faults."""

    kept: Tensor | None = None

    def of(self, floats: int) -> Tensor:
        if self.kept is not None and len(self.kept) >= floats:
            return self.kept
        memory = torch.empty(floats, dtype=torch.float32, device="cpu")
        if memory.nbytes <= _MAX_KEPT:
            self.kept = memory
        return memory


_memory = _Memory()


def _call(name: str, arguments: ctypes.Structure) -> None:
    kernel = getattr(library(), name)
    kernel.restype = c_int64
    memory = _memory.of(kernel(ctypes.byref(arguments), None))
    kernel(ctypes.byref(arguments), c_void_p(memory.data_ptr()))


def _rows_at_a_time(rows: int, heads: int) -> int:
    """As many rows as possible while every thread has work."""
    shared = -(-rows * heads // (4 * torch.get_num_threads()))
    return min(rows, max(_MIN_ROWS, min(_MAX_ROWS, shared) // 6 * 6))


def _adjacent(tensor: Tensor | None) -> Any:
    return tensor if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor, axis: int) -> int:
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0
