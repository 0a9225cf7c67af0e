"""Time, FLOPs and bytes of each part of a forward pass.

Hooks open a range for every module that is a part, such as a feed-forward module. Inside an attention module, between
the projections, operators tell which phase begins:

    … → positional scores → content scores → softmax → map × values → …

A phase lasts from the operator that opens it to the operator that opens the next one. So every moment and every FLOP
belongs to exactly one part, and the parts add up to the whole pass. Times come from PyTorch's profiler, FLOPs from
its FLOP counter, bytes from the operands of the operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from mapreuse.maps import KERNEL_RANGE, products_of, recorded_phases
from mapreuse.measure._flops import flop_counter
from mapreuse.measure._traffic import traffic
from mapreuse.models import Layer, find_stack, plan_of, recorded_states

_PREFIX = "mapreuse part "
_PRODUCTS = {"aten::matmul": 0, "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Matrix products, and the position of their first factor among the operands."""

_PART_OF_PROJECTION = {
    name: part
    for part, names in {
        "query": ("q_proj", "query", "q_lin", "linear_q", "q", "wq"),
        "key": ("k_proj", "key", "k_lin", "linear_k", "k", "wk"),
        "value": ("v_proj", "value", "v_lin", "linear_v", "v", "wv"),
        "positions": ("relative_k_proj", "linear_pos", "pos_proj"),
        "output": ("o_proj", "out_proj", "out_lin", "linear_out", "dense", "c_proj", "wo", "o"),
    }.items()
    for name in names
}

_LINEAR, _CONVOLUTION = (nn.Linear, Conv1D), (nn.Conv1d, nn.Conv2d)

PartCosts: TypeAlias = dict[tuple[int | None, str], float]
"""Seconds, FLOPs or bytes by layer (None outside the layers) and part."""


class Range(NamedTuple):
    """A part of the model.

    Attributes:
        layer: index of the layer; None outside the layers.
        part: the part. For an attention module, the part until an operator opens another one.
        is_attention: whether it is an attention module.
    """

    layer: int | None
    part: str
    is_attention: bool = False


class Event(NamedTuple):
    """A range, or an operator, in a profile.

    Attributes:
        name: name of the operator; empty for a range.
        start: nanoseconds.
        end: nanoseconds.
        shapes: shapes of the operator's operands.
        range: the range; None for an operator.
        device_time: nanoseconds of the GPU kernels that the operator itself launched.
    """

    name: str
    start: int
    end: int
    shapes: Sequence[Sequence[int]] = ()
    range: Range | None = None
    device_time: int = 0


@dataclass
class _OpenRange:
    range: Range
    part: str
    end: int = 0


class Sizes(NamedTuple):
    """Sizes that tell the matrix products of attention apart.

    Attributes:
        length: number of positions T of the hidden states.
        head_dim: dimension of a head; None if unknown.
    """

    length: int
    head_dim: int | None


def attribute(
    events: Iterable[Event],
    sizes: Sizes,
    *,
    on_device: bool = False,
    kernels: Iterable[dict[str, float]] = (),
) -> PartCosts:
    """Seconds of each layer and part.

    Each moment belongs to the innermost open range; inside attention, to the phase that was opened last. A kernel in
    C is one event. Its time is divided in proportion to the times that the kernel measured for its phases.

    Args:
        events: ranges and operators of one thread, properly nested.
        sizes: sizes of the pass.
        on_device: sum the time of GPU kernels instead of the time of the CPU.
        kernels: seconds by phase of each kernel in C, in order.
    """
    phases = iter(kernels)
    costs: dict[tuple[int | None, str], int] = defaultdict(int)
    open_ranges: list[_OpenRange] = []
    now = 0

    def advance(until: int) -> None:
        nonlocal now
        if open_ranges and not on_device:
            costs[open_ranges[-1].range.layer, open_ranges[-1].part] += until - now
        now = until

    def close(until: int) -> None:
        while open_ranges and open_ranges[-1].end <= until:
            advance(open_ranges[-1].end)
            open_ranges.pop()

    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    for event in ordered:
        close(event.start)
        if event.range is not None:
            advance(event.start)
            open_ranges.append(_OpenRange(event.range, event.range.part, event.end))
        elif event.name == KERNEL_RANGE and open_ranges:
            advance(event.start)
            innermost, shares = open_ranges[-1], next(phases)
            for part, seconds in shares.items():
                share = seconds / sum(shares.values())
                costs[innermost.range.layer, part] += round(share * (event.end - event.start))
            now, innermost.part = event.end, "context"
        elif open_ranges:
            advance(event.start)
            open_ranges[-1].part = phase_of(event.name, event.shapes, open_ranges[-1], sizes)
        if on_device and open_ranges:
            costs[open_ranges[-1].range.layer, open_ranges[-1].part] += event.device_time
    close(max((event.end for event in ordered), default=0))
    return {key: time / 1e9 for key, time in costs.items()}


def phase_of(name: str, shapes: Sequence[Sequence[int]], innermost: _OpenRange, sizes: Sizes) -> str:
    """The part that an operator belongs to. In an attention module, it may open a phase.

    A product with inner dimension T applies a map. Other products make scores: content scores if they are at most T
    wide, positional scores if they are wider (2·T − 1 distances, or T + rows − 1 for a block of rows). If T equals
    the head dimension, the products before a softmax make scores, and those after it apply a map.
    """
    if not innermost.range.is_attention:
        return innermost.part
    if name in ("aten::softmax", "aten::_softmax"):
        return "softmax"
    if name.startswith("mapreuse::"):
        return "context" if name == "mapreuse::apply_map" else "scores"
    if "scaled_dot_product" in name or ("::" in name and not name.startswith("aten::")):
        return "fused"
    first = _PRODUCTS.get(name)
    if first is None:
        return innermost.part
    *_, inner, width = shapes[first + 1]
    is_ambiguous = inner == sizes.head_dim and width < 2 * sizes.length
    if inner == sizes.length and (
        not is_ambiguous or (innermost.part in ("softmax", "context") and width <= sizes.length)
    ):
        return "context"
    return "scores" if width <= sizes.length else "positional_scores"


def profiled_pass(model: nn.Module, batch: Mapping[str, Any], sizes: Sizes) -> PartCosts:
    """Seconds of each layer and part of one forward pass.

    On a GPU, it is the time of the GPU kernels that each part launched. The time between kernels belongs to "rest"
    outside the layers.
    """
    on_device = next(model.parameters()).device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    recorders: list[Any] = []

    def enter(index: int) -> None:
        recorders[index].__enter__()

    def leave(index: int) -> None:
        recorders[index].__exit__(None, None, None)

    with _hooks(model, enter, leave) as ranges:
        # This variant has a tenth of the overhead of `torch.profiler.record_function`.
        recorders += [_RecordFunctionFast(f"{_PREFIX}{index}") for index in range(len(ranges))]
        profiling = profile(activities=activities, record_shapes=True)
        with profiling as profiler, recorded_phases() as kernels, recorders[0]:
            model(**batch)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    seen = results.events()
    costs = attribute(_events(seen, ranges), sizes, on_device=on_device, kernels=kernels)
    if on_device:
        launched = [event for event in seen if _is_kernel(event)]
        duration = max(kernel.end_ns() for kernel in launched) - min(kernel.start_ns() for kernel in launched)
        idle = max(0.0, duration / 1e9 - sum(costs.values()))
        costs[None, "rest"] = costs.get((None, "rest"), 0.0) + idle
    return costs


def counted_pass(model: nn.Module, batch: Mapping[str, Any], sizes: Sizes) -> tuple[PartCosts, PartCosts]:
    """FLOPs and bytes of each layer and part of one forward pass."""
    with flop_counter(model) as counter:
        counting = _CountParts(counter, sizes)
        with _hooks(model, counting.enter, counting.leave) as counting.ranges, torch.no_grad(), counting:
            counting.enter(0)
            model(**batch)
    return dict(counting.flops), dict(counting.bytes)


def sizes_of(model: nn.Module, batch: Mapping[str, Any]) -> Sizes:
    """Number of positions of the hidden states, and the dimension of a head."""
    with torch.inference_mode(), recorded_states(model) as (states, _):
        model(**batch)
    attention: Any = find_stack(model).layers[0].attention
    return Sizes(states[0].shape[1], getattr(attention, "head_dim", getattr(attention, "attention_head_size", None)))


class _CountParts(TorchDispatchMode):
    """Counts FLOPs and bytes by layer and part, inside a FLOP counter."""

    def __init__(self, counter: FlopCounterMode, sizes: Sizes) -> None:
        super().__init__()
        self.flops: PartCosts = defaultdict(float)
        self.bytes: PartCosts = defaultdict(float)
        self.ranges: list[Range] = []
        self._counter, self._sizes = counter, sizes
        self._open: list[_OpenRange] = []

    def enter(self, index: int) -> None:
        self._open.append(_OpenRange(self.ranges[index], self.ranges[index].part))

    def leave(self, index: int) -> None:
        self._open.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        innermost = self._open[-1]
        layer, products = innermost.range.layer, products_of(func, args)
        if products is None:
            shapes = [tensor.shape for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            innermost.part = phase_of(func._schema.name, shapes, innermost, self._sizes)
            products = {innermost.part: self._counter.get_total_flops() - before}
        for part, flops in products.items():
            self.flops[layer, part] += flops
        for part, size in traffic(func, args, kwargs or {}, result, innermost.part):
            self.bytes[layer, part] += size
        return result


@contextmanager
def _hooks(model: nn.Module, enter: Callable[[int], None], leave: Callable[[int], None]) -> Iterator[list[Range]]:
    """Call functions before and after each part, with its index; yields the parts. Part 0 is the whole model."""
    ranges, handles = [Range(None, "rest")], []
    try:
        for index, (module, found) in enumerate(part_ranges(model), start=1):
            ranges.append(found)
            handles.append(module.register_forward_pre_hook(lambda *_, index=index: enter(index)))
            handles.append(module.register_forward_hook(lambda *_, index=index: leave(index)))
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def part_of_modules(model: nn.Module) -> dict[str, tuple[int | None, str]]:
    """The layer and the part that modules belong to, by their path. Modules inside them belong to the same part.

    The layer is None outside the layers. The part is a key of `PARTS`, or "attention" for an attention module, whose
    own operators belong to several parts.

    Args:
        model: a model that `apply` accepts, with or without a plan.
    """
    paths = {module: path for path, module in model.named_modules()}
    return {
        paths[module]: (found.layer, "attention" if found.is_attention else found.part)
        for module, found in part_ranges(model)
    }


def part_ranges(model: nn.Module) -> Iterator[tuple[nn.Module, Range]]:
    """The modules that are parts of a model, outer ones first."""
    layers = find_stack(model).layers
    indices = {id(layer.layer): index for index, layer in enumerate(layers)}
    plan = plan_of(model)

    def outside(parent: nn.Module) -> Iterator[tuple[nn.Module, Range]]:
        for child in parent.children():
            if id(child) in indices:
                index = indices[id(child)]
                yield from _layer_ranges(layers[index], index, plan is None or plan.computes(index))
            elif any(id(module) in indices for module in child.modules()):
                yield from outside(child)
            else:
                yield child, Range(None, _outside_part(child))

    yield from outside(model)


def _layer_ranges(layer: Layer, index: int, computes: bool) -> Iterator[tuple[nn.Module, Range]]:
    def inside(parent: nn.Module, in_attention: bool) -> Iterator[tuple[nn.Module, Range]]:
        # BERT and its relatives keep the output projection in a module beside the attention module.
        is_beside = in_attention or (parent is not layer.layer and parent is layer.parent)
        for name, child in parent.named_children():
            if child is layer.attention:
                # Until the first product, a computing layer prepares its queries, a reusing layer its values.
                yield child, Range(index, "query" if computes else "context", is_attention=True)
                yield from inside(child, True)
            elif _is_norm(child):
                yield child, Range(index, "norms")
            elif is_beside and isinstance(child, _LINEAR):
                yield child, Range(index, _PART_OF_PROJECTION.get(name, "projections"))
            elif is_beside or any(module is layer.attention for module in child.modules()):
                yield from inside(child, is_beside)
            elif _has(child, _CONVOLUTION):
                yield child, Range(index, "convolution")
            elif _has(child, _LINEAR) and not any(map(_is_norm, child.modules())):
                yield child, Range(index, "feed_forward")
            else:
                yield from inside(child, False)

    yield layer.layer, Range(index, "rest")
    yield from inside(layer.layer, False)


def _outside_part(module: nn.Module) -> str:
    if _has(module, _CONVOLUTION):
        return "subsampling"
    if _has(module, (nn.Embedding,)):
        return "embeddings"
    if "position" in type(module).__name__.lower():
        return "positions"
    return "norms" if _is_norm(module) else "rest"


def _has(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(one, kinds) for one in module.modules())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _events(seen: list, ranges: Sequence[Range]) -> Iterator[Event]:
    """Events of this thread. The times of GPU kernels are added to the operators that launched them."""
    device_time: dict[int, int] = defaultdict(int)
    for event in seen:
        if _is_kernel(event):
            device_time[event.linked_correlation_id()] += event.duration_ns()
    here = [event for event in seen if event.device_type() == DeviceType.CPU and not event.linked_correlation_id()]
    threads = {event.start_thread_id() for event in here if event.name() == f"{_PREFIX}0"}
    for event in here:
        if event.start_thread_id() in threads:
            name, start, end = event.name(), event.start_ns(), event.end_ns()
            launched = device_time.get(event.correlation_id(), 0)
            if name.startswith(_PREFIX):
                yield Event("", start, end, (), ranges[int(name.removeprefix(_PREFIX))], launched)
            else:
                yield Event(name, start, end, event.shapes(), None, launched)


def _is_kernel(event: object) -> bool:
    return event.device_type() != DeviceType.CPU and not event.name().startswith(_PREFIX)  # type: ignore[attr-defined]
