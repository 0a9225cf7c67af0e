"""Which part of an encoder took the time of a forward pass?

The pass is run once under PyTorch's profiler, with a named range around every module that is a part. Inside the core
of an attention module, between the projections, the operators say which phase has begun:

    … → positional scores → content scores → softmax → map × values → …

A phase lasts from the operator that opens it to the one that opens the next, or to the end of the core, so that all
the time of a pass belongs to exactly one part: their sum is the time of the pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle
from transformers import ParakeetEncoder

from mapreuse.maps import KERNEL_RANGE, recorded_phases
from mapreuse.models import find_stack, plan_of

_PREFIX = "mapreuse part "
_PRODUCTS = {"aten::matmul": 0, "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Matrix products, and which of their operands is the first factor."""

_MODULES = {
    "feed_forward1": "feed_forward",
    "feed_forward2": "feed_forward",
    "conv": "convolution",
    "norm_feed_forward1": "norms",
    "norm_self_att": "norms",
    "norm_conv": "norms",
    "norm_feed_forward2": "norms",
    "norm_out": "norms",
}
_PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "relative_k_proj": "positions",
    "o_proj": "output",
}

Spent = dict[tuple[int | None, str], float]
"""Seconds by layer (None outside the layers) and part."""


@dataclass(frozen=True)
class Range:
    """A stretch of time that belongs to a part.

    Attributes:
        layer: index of the layer, None outside the layers.
        part: the part; of an attention core, the one that its time belongs to until an operator opens another.
        is_core: True for an attention module.
    """

    layer: int | None
    part: str
    is_core: bool = False


@dataclass(frozen=True)
class Event:
    """Something that the profiler saw: a range, by its index, or an operator.

    Attributes:
        name: name of the operator; empty for a range.
        start: nanoseconds.
        end: nanoseconds.
        shapes: shapes of the operator's operands.
        range: index of the range, None for an operator.
        device_time: nanoseconds that kernels took on a GPU, launched by it and by no operator inside it.
    """

    name: str
    start: int
    end: int
    shapes: Sequence[Sequence[int]] = ()
    range: int | None = None
    device_time: int = 0


class _Open:
    """A range that has begun and not ended."""

    def __init__(self, range: Range, end: int) -> None:
        self.range, self.end, self.part = range, end, range.part


def attribute(
    events: Iterable[Event],
    ranges: Sequence[Range],
    *,
    frames: int,
    head_dim: int,
    on_device: bool = False,
    cores: Iterable[dict[str, float]] = (),
) -> Spent:
    """Seconds of each layer and part.

    Every moment belongs to the innermost range that is open; inside a core, to the phase that was opened last. A core
    in C is one event: it is divided among its phases as it measured them itself.

    Args:
        events: ranges and operators of one thread, properly nested.
        ranges: what the indices of the range events mean.
        frames: encoder frames T.
        head_dim: dimension d of a head.
        on_device: add up the time of kernels on the GPU, instead of the time that passes here.
        cores: seconds by phase of every core in C, in their order.
    """
    measured = iter(cores)
    spent: dict[tuple[int | None, str], int] = defaultdict(int)
    open_ranges: list[_Open] = []
    now = 0

    def pass_time(until: int) -> None:
        nonlocal now
        if open_ranges and not on_device:
            spent[open_ranges[-1].range.layer, open_ranges[-1].part] += until - now
        now = until

    def close(until: int) -> None:
        while open_ranges and open_ranges[-1].end <= until:
            pass_time(open_ranges[-1].end)
            open_ranges.pop()

    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    for event in ordered:
        close(event.start)
        if event.range is not None:
            pass_time(event.start)
            open_ranges.append(_Open(ranges[event.range], event.end))
        elif event.name == KERNEL_RANGE and open_ranges:
            pass_time(event.start)
            innermost, shares = open_ranges[-1], next(measured)
            for part, seconds in shares.items():
                share = seconds / sum(shares.values())
                spent[innermost.range.layer, part] += round(share * (event.end - event.start))
            now, innermost.part = event.end, "context"
        elif open_ranges:
            innermost = open_ranges[-1]
            phase = _phase(event, innermost.part, frames, head_dim) if innermost.range.is_core else None
            if phase is not None:
                pass_time(event.start)
                innermost.part = phase
        if on_device and open_ranges:
            spent[open_ranges[-1].range.layer, open_ranges[-1].part] += event.device_time
    close(max((event.end for event in ordered), default=0))
    return {key: time / 1e9 for key, time in spent.items()}


def _phase(event: Event, phase: str, frames: int, head_dim: int) -> str | None:
    """The phase of an attention core that this operator opens, or None where it belongs to `phase`, which is open.

    A product whose inner dimension is T applies a map. One whose inner dimension is d makes scores: of content if it
    is T wide, of positions if it is wider, by 2·T − 1 distances or a block's window of T + rows − 1 of them. Where T
    and d are equal, one that is T wide applies a map once there has been a softmax, and so does one wider than 2·T.
    """
    if event.name in ("aten::softmax", "aten::_softmax"):
        return "softmax"
    if "scaled_dot_product" in event.name or ("::" in event.name and not event.name.startswith("aten::")):
        return "fused"
    first = _PRODUCTS.get(event.name)
    if first is None:
        return None
    *_, inner, width = event.shapes[first + 1]
    if inner == frames:
        by_phase = width <= frames and phase in ("softmax", "context")
        if inner != head_dim or width >= 2 * frames or by_phase:
            return "context"
    if inner == head_dim:
        return "scores" if width <= frames else "positional_scores"
    return None


def profiled_pass(encoder: ParakeetEncoder, features: Float[Tensor, "batch inputs mels"]) -> Spent:
    """Seconds of each layer and part of one forward pass.

    On a GPU: of the kernels that each part launched, and outside the layers, in "rest", the time that the GPU waited
    between two kernels.
    """
    on_device = features.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with (
        _marked(encoder) as ranges,
        profile(activities=activities, record_shapes=True) as profiler,
        recorded_phases() as cores,
        _RecordFunctionFast(f"{_PREFIX}0"),
    ):
        encoder(input_features=features)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    seen = results.events()
    config = encoder.config
    spent = attribute(
        _events(seen),
        ranges,
        frames=features.shape[1] // config.subsampling_factor,
        head_dim=config.hidden_size // config.num_attention_heads,
        on_device=on_device,
        cores=cores,
    )
    if on_device:
        kernels = [event for event in seen if _is_kernel(event)]
        span = max(kernel.end_ns() for kernel in kernels) - min(kernel.start_ns() for kernel in kernels)
        busy = sum(spent.values())
        spent[None, "rest"] = spent.get((None, "rest"), 0.0) + max(0.0, span / 1e9 - busy)
    return spent


@contextmanager
def _marked(encoder: ParakeetEncoder) -> Iterator[list[Range]]:
    """While it lasts, every part opens a range of the profiler; the ranges, by the number in their names."""
    ranges = [Range(None, "rest")]
    handles: list[RemovableHandle] = []
    try:
        for module, found in _ranges(encoder):
            handles += _mark(module, f"{_PREFIX}{len(ranges)}")
            ranges.append(found)
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def _ranges(encoder: ParakeetEncoder) -> Iterator[tuple[nn.Module, Range]]:
    yield encoder.subsampling, Range(None, "subsampling")
    yield encoder.encode_positions, Range(None, "positions")
    plan = plan_of(encoder)
    for index, layer in enumerate(find_stack(encoder).layers):
        yield layer.layer, Range(index, "rest")
        computes = plan is None or plan.computes(index)
        # Until a product begins, a computing layer adds its biases to the query; a reusing one arranges its values.
        yield layer.attention, Range(index, "query" if computes else "context", is_core=True)
        for owner, parts in ((layer.layer, _MODULES), (layer.attention, _PROJECTIONS)):
            for name, part in parts.items():
                module = owner._modules.get(name)
                if module is not None:
                    yield module, Range(index, part)


def _mark(module: nn.Module, name: str) -> tuple[RemovableHandle, RemovableHandle]:
    # A tenth of the cost of `torch.profiler.record_function`, which would be the largest part of the profiler's own.
    opened = _RecordFunctionFast(name)

    def enter(module: nn.Module, args: tuple) -> None:
        opened.__enter__()

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        opened.__exit__(None, None, None)

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _events(seen: list) -> Iterator[Event]:
    """What the profiler saw on this thread, GPU kernels added to the operators that launched them."""
    device_time: dict[int, int] = defaultdict(int)
    for event in seen:
        if _is_kernel(event):
            device_time[event.linked_correlation_id()] += event.duration_ns()
    here = [event for event in seen if event.device_type() == DeviceType.CPU and not event.linked_correlation_id()]
    threads = {event.start_thread_id() for event in here if event.name() == f"{_PREFIX}0"}
    for event in here:
        if event.start_thread_id() not in threads:
            continue
        name, start, end = event.name(), event.start_ns(), event.end_ns()
        if name.startswith(_PREFIX):
            found = Event("", start, end, range=int(name.removeprefix(_PREFIX)))
        else:
            found = Event(name, start, end, event.shapes())
        yield replace(found, device_time=device_time.get(event.correlation_id(), 0))


def _is_kernel(event: object) -> bool:
    return event.device_type() != DeviceType.CPU and not event.name().startswith(_PREFIX)  # type: ignore[attr-defined]
