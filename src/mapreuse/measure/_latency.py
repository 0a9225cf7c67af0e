"""Latency, measured by turns: every contestant meets the same disturbances of the machine."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mapreuse.console import check_number, progress_bar

_MAX_FACTOR = 4
"""For the sake of precision, up to this multiple of `repeats` is measured."""


@dataclass(frozen=True)
class Latency:
    """Times of one contestant, over interleaved repeats.

    Attributes:
        seconds: time of each repeat.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, relative to it, for normally distributed repeats.

        √(π/2) σ / √n, where σ = spread / 0.674 (the quartile of the normal distribution).
        """
        deviation = self.spread / statistics.NormalDist().inv_cdf(0.75)
        return math.sqrt(math.pi / 2 / len(self.seconds)) * deviation

    def speed_up_over(self, slower: Latency) -> dict[str, float]:
        """Median and spread of the quotients of two contestants' times in the same turn.

        If one of them ran less often, the quotient of the medians.
        """
        if len(slower.seconds) != len(self.seconds):
            return {"median": slower.median / self.median, "spread": 0.0}
        quotients = Latency(tuple(a / b for a, b in zip(slower.seconds, self.seconds, strict=True)))
        return {"median": quotients.median, "spread": quotients.spread}

    def data(self) -> dict[str, Any]:
        """Median, spread and seconds, for JSON."""
        return {"median": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    precision: float | None = None,
    single_from: float = math.inf,
    device: str = "cpu",
    title: str = "Timing",
) -> dict[str, Latency]:
    """Time contestants by turns: `warmup` + `repeats` times, each of them is called in order.

    After the warm-up, a turn is two calls, of which the second is timed. The first one also pays for memory that
    another contestant returned to the system, which does not happen to a model that runs alone.

    Args:
        contestants: calls to time, by name.
        repeats: number of timed turns.
        warmup: number of turns before them.
        precision: repeat until the `uncertainty` of each contestant is at most this, up to four times `repeats`.
        single_from: calls that take at least this many seconds are made once in a turn; to them, the memory makes no
            difference.
        device: "cpu", timed by the clock, or "cuda", timed by synchronised events.
        title: text before the progress bar.

    Returns:
        The latency of each contestant.

    Raises:
        ValueError: if `repeats`, `warmup` or `precision` is not a number in its range.
    """
    check_number("repeats", repeats, 1, whole=True)
    check_number("warmup", warmup, 0, whole=True)
    if precision is not None:
        check_number("precision", precision, 0)
    timer = _cuda_seconds if device == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    last: dict[str, float] = {}
    done, total = 0, (warmup + repeats) * len(contestants)
    with torch.inference_mode(), progress_bar(title) as progress:
        for turn in itertools.count():
            if turn >= warmup + repeats and _are_enough(seconds, repeats, precision):
                break
            for name, call in contestants.items():
                counts = turn >= warmup
                if counts and last.get(name, 0.0) < single_from:
                    call()
                taken = last[name] = timer(call)
                if counts:
                    seconds[name].append(taken)
                done += 1
                progress(title, done, max(done, total))
    return {name: Latency(tuple(taken)) for name, taken in seconds.items()}


def _are_enough(seconds: Mapping[str, list[float]], repeats: int, precision: float | None) -> bool:
    measured = [Latency(tuple(taken)) for taken in seconds.values()]
    return (
        precision is None
        or all(one.uncertainty <= precision for one in measured)
        or all(len(one.seconds) >= _MAX_FACTOR * repeats for one in measured)
    )


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def fastest_threads(call: Callable[[], object]) -> tuple[int, dict[str, float]]:
    """The faster of one CPU thread and all of them, and the seconds that the call takes with each.

    On virtual machines, two threads can be slower than one.
    """
    numbers = dict.fromkeys((1, len(os.sched_getaffinity(0))))

    def run(number: int) -> None:
        with cpu_threads(number):
            call()

    contestants = {str(number): partial(run, number) for number in numbers}
    measured = time_interleaved(contestants, repeats=3, title="Threads") if len(numbers) > 1 else {}
    seconds = {name: latency.median for name, latency in measured.items()}
    return min(numbers, key=lambda number: seconds.get(str(number), 0.0)), seconds


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Run with this number of CPU threads; None changes nothing."""
    if number is not None:
        check_number("threads", number, 1, whole=True)
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
