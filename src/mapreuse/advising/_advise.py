"""`advise`: measure the options that need no training, and recommend one."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.advising._advice import METRICS, Advice, MeasuredOption, Option
from mapreuse.console import check_number, one_line, progress_bar
from mapreuse.conversion import Candidate, search
from mapreuse.data import batches_by_quantile, check_precision
from mapreuse.exporting import RUNTIMES, export, open_exported
from mapreuse.measure import cpu_threads, fastest_threads, time_interleaved
from mapreuse.models import (
    apply,
    copy_with_same_weights,
    drop_layers,
    find_stack,
    not_padding,
    optimize,
    plan_of,
    recorded_states,
)
from mapreuse.plan import ReusePlan

MIN_ADVICE_BATCHES = 8
"""Minimum number of batches: every fourth is held out."""

Batch = dict[str, Any]
Call = Callable[[Batch], Tensor]

_INT8_BATCHES = 16
_CHOICE_BATCHES = 4
"""Number of calibration batches that decide which layer to drop."""
_MAX_PLANS = 2
"""Number of plans of a search that are tried in runtimes."""
_SHOWN = 2.0
"""Layers are dropped until the error is this multiple of the maximum, to show what dropping gives."""


def advise(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    metric: str = "cosine",
    max_error: float = 0.03,
    timed: Mapping[str, Any] | None = None,
    threads: int | None = None,
    repeats: int = 7,
) -> Advice:
    """Measure the options that need no training on this machine, and recommend one.

    The options are: the model as it is; `optimize`; OpenVINO and ONNX Runtime, in float32 and int8 (`export`); the
    kernels of mapreuse without sharing; layers dropped (`drop_layers`), chosen one by one; and plans found by
    `search` within the maximum error, refitted. Layers are dropped until the error is twice the maximum, to show what
    that gives. Smaller models and plans are tried in the fastest way to run in float32 and, if its error is small
    enough, in the fastest with int8. Runtimes whose packages are missing are left out, with a note.

    Every fourth batch is held out for the error. Finally, all options are timed in turns. An interrupt
    (`KeyboardInterrupt`) ends the measurements, and the advice is about what was measured until then.

    Args:
        model: an encoder in float32 on the CPU that `apply` accepts, without a plan. It is not changed.
        batches: calibration batches, at least eight.
        metric: "cosine": error = 1 − mean of cos(y, y°), or "relative": ‖y − y°‖ / ‖y°‖, for the first output y of
            an option and y° of the model, without padding.
        max_error: maximum error of the recommended option.
        timed: the batch to time, such as one of the size used in production. None: the batch of median size.
        threads: CPU threads. None: the faster of one and all, measured first.
        repeats: number of timed calls.

    Returns:
        The advice. `advice.table()` shows all options, `advice.recommended` is one of them, and
        `advice.lines()` has the commands.

    Raises:
        ValueError: if an argument is invalid, there are too few batches, or the model has a plan or is unsupported.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    check_number("max_error", max_error, 0, exclusive=True)
    check_number("repeats", repeats, 1, whole=True)
    check_precision(model)
    if plan_of(model) is not None:
        raise ValueError("the model shares attention maps already; ask for advice about the original model")
    given = [dict(batch) for batch in batches]
    if len(given) < MIN_ADVICE_BATCHES:
        raise ValueError(f"advise needs at least {MIN_ADVICE_BATCHES} calibration batches, got {len(given)}")
    original = copy_with_same_weights(model).eval()
    find_stack(original)
    by_size = sorted(given, key=lambda batch: max(value.numel() for value in batch.values()))
    batch = dict(timed or by_size[len(by_size) // 2])
    if threads is None:
        threads, _ = fastest_threads(partial(_in_pytorch(original), batch))
    with tempfile.TemporaryDirectory() as directory, cpu_threads(threads), progress_bar("Advising") as progress:
        run = _Advisor(original, given, metric, max_error, batch, threads, Path(directory), progress)
        return run.advice(repeats)


@dataclass
class _Advisor:
    original: nn.Module
    batches: Sequence[Batch]
    metric: str
    max_error: float
    timed: Batch
    threads: int
    directory: Path
    progress: Callable[[str, float, float], object]
    found: list[MeasuredOption] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def advice(self, repeats: int) -> Advice:
        """All measurements."""
        held_out, self.calibration = list(self.batches[1::4]), [b for i, b in enumerate(self.batches) if i % 4 != 1]
        interrupted = False
        self.error = _error(self.metric, self.original, held_out)
        try:
            self._measure_all()
            self._time_in_turns(repeats)
        except KeyboardInterrupt:
            interrupted = True
            if not self.found:
                raise
        options = sorted(self.found, key=lambda one: _complexity(one.option))
        return Advice(tuple(options), self.metric, self.max_error, self.threads, tuple(self.notes), interrupted)

    def _measure_all(self) -> None:
        self._measure(self.original, Option())
        full = ReusePlan.full(len(find_stack(self.original).layers))
        for runtime, int8 in product(RUNTIMES, (False, True)):
            self._measure(self.original, Option(runtime=runtime, int8=int8))
        self._measure(self.original, Option(optimized=True))
        self._measure(apply(copy_with_same_weights(self.original), full), Option(plan=full, optimized=True))
        ways = self._fastest_ways()
        self._drop(ways)
        self._share(ways)

    def _fastest_ways(self) -> list[Option]:
        """The fastest way to run in float32, and the fastest with int8 that is accurate enough."""
        ways = []
        for int8 in (False, True):
            allowed = [one for one in self.found if one.option.int8 == int8 and one.error <= self.max_error]
            if allowed:
                ways.append(replace(min(allowed, key=lambda one: one.latency).option, plan=None))
        return ways

    def _drop(self, ways: Sequence[Option]) -> None:
        """Drop the layer that changes outputs least, then the next one, until the error is far above the limit."""
        number = len(find_stack(self.original).layers)
        error = _error(
            self.metric, self.original, self.calibration[:: max(1, len(self.calibration) // _CHOICE_BATCHES)]
        )
        dropped: tuple[int, ...] = ()
        while len(dropped) < number - 1:
            errors = {}
            candidates = [layer for layer in range(number) if layer not in dropped]
            for done, layer in enumerate(candidates):
                self.progress(f"Which layer to drop, after {len(dropped)}", done, len(candidates))
                try:
                    model = self._without((*dropped, layer))
                except ValueError as refused:
                    self.notes.append(f"layer {layer} cannot be dropped: {one_line(refused)}")
                    continue
                errors[layer] = error(_in_pytorch(model))
            if not errors:
                return
            dropped = tuple(sorted((*dropped, min(errors, key=errors.__getitem__))))
            model = self._without(dropped)
            self._measure_ways(model, Option(dropped=dropped), ways)
            if self.error(_in_pytorch(model)) > _SHOWN * self.max_error:
                return

    def _without(self, layers: Sequence[int]) -> nn.Module:
        copied = copy_with_same_weights(self.original)
        return drop_layers(copied, layers)

    def _share(self, ways: Sequence[Option]) -> None:
        """Plans of a search within the maximum error."""
        self.progress("Searching for plans", 0, 1)
        try:
            plans = search(
                self.original,
                self.batches,
                error=self.max_error,
                metric=lambda model: self.error(_in_pytorch(model)),
                timed=self.timed,
            )
        except ValueError as refused:
            self.notes.append(f"plans were not searched: {one_line(refused)}")
            return
        for candidate in _some([one for one in plans if not one.plan.is_full]):
            self._measure_ways(candidate.build(), Option(plan=candidate.plan), ways)

    def _measure_ways(self, model: nn.Module, option: Option, ways: Sequence[Option]) -> None:
        """Measure an option in each way to run."""
        for way in ways:
            self._measure(model, replace(way, dropped=option.dropped, plan=option.plan))

    def _measure(self, model: nn.Module, option: Option) -> None:
        """Error, and a first estimate of the latency."""
        self.progress(f"Measuring {option.name}", len(self.found), len(self.found) + 1)
        try:
            call = self._call(model, option)
        except ModuleNotFoundError as missing:
            if str(missing) not in self.notes:
                self.notes.append(str(missing))
            return
        except ValueError as refused:
            self.notes.append(f"{option.name}: {one_line(refused)}")
            return
        error = self.error(call)
        calls = dict(enumerate([*self.calls[:1], call]))
        times = time_interleaved(
            {str(number): partial(one, self.timed) for number, one in calls.items()}, repeats=3, title=option.name
        )
        seconds = [times[str(number)].median for number in calls]
        self.calls.append(call)
        latency = seconds[-1] / seconds[0]
        base = self.found[0].seconds if self.found else seconds[0]
        self.found.append(MeasuredOption(option, error, latency, latency * base, model))

    def _call(self, model: nn.Module, option: Option) -> Call:
        if not option.runtime:
            return _in_pytorch(optimize(copy_with_same_weights(model)) if option.optimized else model)
        int8 = batches_by_quantile(self.calibration, _INT8_BATCHES) if option.int8 else None
        path = self.directory / str(len(list(self.directory.iterdir())))
        smallest = min(self.batches, key=lambda batch: max(value.numel() for value in batch.values()))
        with redirect_stdout(io.StringIO()):  # NNCF shows progress bars
            export(model, path, smallest, runtime=option.runtime, int8=int8)
        run = open_exported(path, threads=self.threads)
        return lambda batch: next(iter(run(batch).values()))

    def _time_in_turns(self, repeats: int) -> None:
        names = [str(number) for number in range(len(self.calls))]
        calls = {name: partial(call, self.timed) for name, call in zip(names, self.calls, strict=True)}
        times = time_interleaved(calls, repeats=repeats, single_from=1.0, title="Timing all options")
        base = times[names[0]]
        for number, name in enumerate(names):
            latency = 1 / times[name].speed_up_over(base)["median"]
            self.found[number] = replace(self.found[number], latency=latency, seconds=times[name].median)


def _complexity(option: Option) -> tuple[int, ...]:
    return (
        option.shares,
        len(option.dropped),
        option.int8,
        option.runtime != "",
        option.plan is not None,
        option.optimized,
    )


def _some(plans: Sequence[Candidate]) -> list[Candidate]:
    """The fastest plan, and one in the middle between it and the original."""
    return [plans[-1 - len(plans) * part // _MAX_PLANS] for part in range(min(_MAX_PLANS, len(plans)))]


def _in_pytorch(model: nn.Module) -> Call:
    """The first output of a model."""

    def call(batch: Batch) -> Tensor:
        with torch.inference_mode():
            output = model(**batch)
        return output if isinstance(output, Tensor) else output[0]

    return call


def _error(metric: str, original: nn.Module, batches: Sequence[Batch]) -> Callable[[Call], float]:
    """The error of an option's first outputs, without padding."""
    targets, valid = [], []
    for batch in batches:
        with torch.no_grad(), recorded_states(original) as (states, masks):
            output = original(**batch)
        targets.append(output if isinstance(output, Tensor) else output[0])
        valid.append(not_padding(masks[0], states[-1]))

    def rows(output: Tensor, mask: Tensor) -> Tensor:
        return output[mask] if output.shape[:2] == mask.shape else output

    def error(call: Call) -> float:
        pairs = [
            (rows(call(batch), mask), rows(target, mask))
            for batch, target, mask in zip(batches, targets, valid, strict=True)
        ]
        if metric == "cosine":
            cosines = torch.cat([functional.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs])
            return max(0.0, 1 - float(cosines.double().mean()))
        difference = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(difference / sum(float(b.square().sum()) for _, b in pairs))

    return error
