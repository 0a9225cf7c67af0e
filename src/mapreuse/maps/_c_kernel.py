"""The cores in C (`_core.c`), where they were built: on a CPU, in float32, where gradients are off."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from ctypes import c_double, c_float, c_int64, c_void_p
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mapreuse.maps._scores import Scores

_TYPES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}
"""Of weights that are stored, by their number in C."""
_NEWEST = 2
"""Vector instructions: those that any processor has, AVX2, AVX512. The newest that the machine has are used."""
_FEWEST_ROWS, _MOST_ROWS = 12, 48
"""Rows of one head that a thread computes at a time, whole tiles of six: fewer, and keys are read too often."""
_KEPT = 1 << 24
"""Bytes of working memory up to which a thread keeps it."""
_LARGE = 1 << 23
"""Bytes of a map from which its memory is asked for in large pages."""

HAS_C_KERNEL = "mapreuse core in C"
"""Name of the profiler's range around the core of a computing layer, where `recorded_phases` are asked for."""
_PHASES = ("positional_scores", "scores", "softmax", "context")
_recorded: ContextVar[list[dict[str, float]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recorded_phases() -> Iterator[list[dict[str, float]]]:
    """While it lasts, and for this thread: seconds of all threads in every phase of each computing layer's core."""
    found: list[dict[str, float]] = []
    before = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(before)


class _Matrices(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("head", c_int64), ("row", c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Matrices:
        """Of (heads, rows, columns), columns adjacent; sizes of one stand for all."""
        if tensor is None:
            return cls(None, 0, 0)
        return cls(tensor.data_ptr(), _stride(tensor, 0), _stride(tensor, 1))


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("head", c_int64),
        ("row", c_int64),
        ("type", c_int64),
        ("scales", c_void_p),
        ("scales_head", c_int64),
        ("scales_row", c_int64),
    )

    @classmethod
    def of(cls, weights: Tensor | None, scales: Tensor | None) -> _Map:
        if weights is None:
            return cls(None, 0, 0, 0, None, 0, 0)
        of_scales = (None, 0, 0) if scales is None else (scales.data_ptr(), scales.stride(0), scales.stride(1))
        return cls(weights.data_ptr(), weights.stride(0), weights.stride(1), _TYPES[weights.dtype], *of_scales)


class _Computing(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("rows", c_int64),
        ("keys", c_int64),
        ("dim", c_int64),
        ("value_dim", c_int64),
        ("scaling", c_float),
        ("is_causal", c_int64),
        ("query", _Matrices),
        ("key", _Matrices),
        ("values", _Matrices),
        ("relative_query", _Matrices),
        ("relative_key", _Matrices),
        ("num_keys", c_int64),
        ("bias", _Matrices),
        ("allowed", _Matrices),
        ("context", _Matrices),
        ("weights", _Map),
        ("width", c_int64),
        ("rows_at_a_time", c_int64),
        ("threads", c_int64),
        ("newest", c_int64),
        ("seconds", c_void_p),
    )


class _Applying(ctypes.Structure):
    _fields_ = (
        ("map_heads", c_int64),
        ("rows", c_int64),
        ("keys", c_int64),
        ("value_dim", c_int64),
        ("weights", _Map),
        ("values", _Matrices),
        ("contexts", c_int64),
        ("map_of", c_void_p),
        ("values_of", c_void_p),
        ("context", _Matrices),
        ("threads", c_int64),
        ("newest", c_int64),
    )


def serves(*tensors: Tensor) -> bool:
    """Whether the cores in C compute with these: they were built, and the tensors are unobserved."""
    return are_unobserved(*tensors) and library() is not None


def are_unobserved(*tensors: Tensor) -> bool:
    """Whether these are float32 on a CPU, without a tape, and nothing follows what is done with them.

    What reads memory leaves no trace for compilers and tracers, dispatch modes (a counter of FLOPs, tensors without
    memory), transforms such as vmap, forward gradients, tensors of other classes.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not _follows_tangents()
        and all(_is_plain(tensor) for tensor in tensors)
    )


def computes(scores: Scores, values: Tensor) -> bool:
    """Whether `compute` may be called; what does not fit together is left to PyTorch, which says so."""
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


def compute(
    scores: Scores,
    values: Float[Tensor, "batch heads key value_dim"],
    weights: Tensor | None = None,
    scales: Float[Tensor, "batch heads query 1"] | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Context of a computing layer; its map goes to `weights`, where given.

    Some rows at a time, their scores by content and, slanted, by position are summed where they are softmaxed and
    multiplied with the values, in a thread's own cache. Nothing is computed beyond the last query and key of an item
    that attend anything, nor, where the scores are causal, for keys after the last row of a few.

    Args:
        scores, values: as for `attend`.
        weights: contiguous memory for the map, (batch, heads, query, key): as float32, or, over the greatest of their
            row, as float16 or (in 255ths) as uint8.
        scales: memory for what float16 and uint8 are to be multiplied by, so that rows sum to one.
    """
    batch, heads, num_queries, num_keys = scores.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    relative, phases = scores.relative, _recorded.get()
    for item, (rows, keys) in enumerate(scores.extents):
        context[item, :, rows:] = 0
        if weights is not None:
            weights[item, :, rows:] = 0
        if scales is not None:
            scales[item, :, rows:] = 0
        if rows == 0:
            continue
        allowed = _part(scores.mask, item, rows, keys)
        if allowed is not None and bool(allowed.all()):
            allowed = None
        bias = _part(scores.bias, item, rows, keys)
        # Named, so that none is freed while the core reads it.
        query, key, own = (_adjacent(tensor[item]) for tensor in (scores.query, scores.key, values))
        relative_query = None if relative is None else _adjacent(relative.query[item])
        relative_key = None if relative is None else _adjacent(_item(relative.key, item))
        seconds = (c_double * len(_PHASES))()
        arguments = _Computing(
            heads=heads,
            rows=rows,
            keys=keys,
            dim=query.shape[-1],
            value_dim=own.shape[-1],
            scaling=scores.scaling,
            is_causal=scores.is_causal,
            query=_Matrices.of(query),
            key=_Matrices.of(key),
            values=_Matrices.of(own),
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
            newest=_NEWEST,
            seconds=ctypes.addressof(seconds),
        )
        with nullcontext() if phases is None else _RecordFunctionFast(HAS_C_KERNEL):
            _call("mapreuse_compute", arguments)
        if phases is not None:
            phases.append(dict(zip(_PHASES, seconds, strict=True)))
    return context


def apply(
    weights: Float[Tensor, "batch map_heads query key"] | UInt8[Tensor, "batch map_heads query key"],
    scales: Float[Tensor, "batch map_heads query 1"] | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    heads: Sequence[tuple[int, int]],
    extents: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch heads query value_dim"]:
    """Context of stored weights (as `compute` stores them) and another layer's values.

        context[h] = (scales · weights)[m_h] @ values[v_h],    (m_h, v_h) = heads[h]

    Rows of one head of the map are read once for all heads that apply it, and decompressed in a thread's own cache.

    Raises `ValueError` where values and heads are not those of the map.
    """
    batch, map_heads, num_queries, num_keys = weights.shape
    if values.shape[0] != batch or values.shape[2] != num_keys:
        raise ValueError(f"values of {tuple(values.shape)} do not fit a map of {tuple(weights.shape)}")
    if any(not (0 <= m < map_heads and 0 <= v < values.shape[1]) for m, v in heads):
        raise ValueError(
            f"heads {heads} are not all among {map_heads} of the map and {values.shape[1]} of the values"
        )
    context = values.new_empty(batch, num_queries, len(heads), values.shape[-1]).transpose(1, 2)
    map_of, values_of = ((c_int64 * len(heads))(*(pair[which] for pair in heads)) for which in (0, 1))
    for item, (rows, keys) in enumerate(extents):
        context[item, :, rows:] = 0
        if rows == 0:
            continue
        stored, own = _adjacent(weights[item]), _adjacent(values[item])
        arguments = _Applying(
            map_heads=map_heads,
            rows=rows,
            keys=keys,
            value_dim=own.shape[-1],
            weights=_Map.of(stored, None if scales is None else scales[item]),
            values=_Matrices.of(own),
            contexts=len(heads),
            map_of=ctypes.addressof(map_of),
            values_of=ctypes.addressof(values_of),
            context=_Matrices.of(context[item]),
            threads=torch.get_num_threads(),
            newest=_NEWEST,
        )
        _call("mapreuse_apply", arguments)
    return context


def applies(weights: Tensor, values: Tensor) -> bool:
    """Whether `apply` may be called."""
    return weights.dtype in _TYPES and _is_memory(weights) and serves(values)


def map_memory(
    scores: Scores, dtype: torch.dtype
) -> Float[Tensor, "batch heads query key"] | UInt8[Tensor, "batch heads query key"]:
    """Memory for a map of these scores; that of a long input comes in large pages, where the system has them."""
    weights = torch.empty(scores.shape, dtype=dtype, device=scores.query.device)
    if weights.device.type == "cpu" and weights.nbytes >= _LARGE and (found := library()) is not None:
        found.mapreuse_advise(c_void_p(weights.data_ptr()), c_int64(weights.nbytes))
    return weights


def softmax_of_sum(scores: Tensor, addend: Tensor | None, out: Tensor) -> None:
    """out = softmax(scores + addend) over adjacent keys; (heads, rows, keys), scores are overwritten."""
    found = library()
    assert found is not None
    strides = c_int64 * 2
    memory: list[c_void_p | ctypes.Array[c_int64] | None] = []
    for tensor in (scores, addend, out):
        memory += [None, None] if tensor is None else [c_void_p(tensor.data_ptr()), strides(*tensor.stride()[:2])]
    found.mapreuse_softmax_of_sum(*memory, *map(c_int64, (*scores.shape, torch.get_num_threads(), _NEWEST)))


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where the package was installed without a C compiler."""
    found = importlib.util.find_spec("mapreuse.maps._kernel")
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # built for another machine
        return None


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and _is_memory(tensor)


def _is_memory(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are what stands in its memory, on the CPU."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and type(tensor) in (Tensor, Parameter)
        and not tensor.is_neg()
    )


def _follows_tangents() -> bool:
    return forward_ad._current_level >= 0


class _Memory(threading.local):
    """A thread's working memory, kept for its next core where it is small: fresh memory costs a fault a page."""

    kept: Tensor | None = None

    def of(self, floats: int) -> Tensor:
        if self.kept is not None and len(self.kept) >= floats:
            return self.kept
        memory = torch.empty(floats, dtype=torch.float32)
        if memory.nbytes <= _KEPT:
            self.kept = memory
        return memory


_memory = _Memory()


def _call(name: str, arguments: ctypes.Structure) -> None:
    core = getattr(library(), name)
    core.restype = c_int64
    memory = _memory.of(core(ctypes.byref(arguments), None))
    core(ctypes.byref(arguments), c_void_p(memory.data_ptr()))


def _rows_at_a_time(rows: int, heads: int) -> int:
    """The most, but few enough to keep every thread busy."""
    shared = -(-rows * heads // (4 * torch.get_num_threads()))
    return min(rows, max(_FEWEST_ROWS, min(_MOST_ROWS, shared) // 6 * 6))


def _item(tensor: Tensor, item: int) -> Tensor:
    return tensor[item if tensor.shape[0] > 1 else 0]


def _part(tensor: Tensor | None, item: int, rows: int, keys: int) -> Tensor | None:
    """One item's, without what nothing attends, of a tensor in which batch, heads and queries may be one for all."""
    if tensor is None:
        return None
    some = _item(tensor, item)[..., :keys]
    return _adjacent(some[:, :rows] if some.shape[1] > 1 else some)


def _adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor, axis: int) -> int:
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0
