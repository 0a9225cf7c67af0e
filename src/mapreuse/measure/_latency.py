"""What does a forward pass cost? Contestants take turns, so that no one of them has the quieter machine."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_MOST = 4
"""Times `repeats` rounds, at most, are timed for the sake of precision."""


@dataclass(frozen=True)
class Latency:
    """Seconds that one call took, over interleaved repeats.

    Attributes:
        seconds: each repeat.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, relative to it, as if the repeats were normally distributed.

        √(π/2) σ / √n, with σ = spread / 0.674 (the quartile of the normal distribution).
        """
        deviation = self.spread / statistics.NormalDist().inv_cdf(0.75)
        return math.sqrt(math.pi / 2 / len(self.seconds)) * deviation


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    precision: float | None = None,
    device: str = "cpu",
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Latency]:
    """Time the contestants in turn: each has one turn per round, for `warmup` + `repeats` rounds.

    A turn that counts is two calls, of which the second is timed. The first, after another contestant's, also pays
    for memory that the other gave back to the system; a model that is served call after call does not.

    Args:
        contestants: calls to time, by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        precision: the rounds go on, to four times `repeats` at most, while a contestant's `uncertainty` exceeds this.
        device: "cpu", timed by the clock, or "cuda", timed by events, synchronised.
        advance: called after every timed call, to show progress.
    """
    timer = _cuda_seconds if device == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for round_number in itertools.count():
            if round_number >= warmup + repeats and _are_enough(seconds, repeats, precision):
                break
            for name, call in contestants.items():
                counts = round_number >= warmup
                if counts:
                    call()
                taken = timer(call)
                if counts:
                    seconds[name].append(taken)
                advance()
    return {name: Latency(tuple(taken)) for name, taken in seconds.items()}


def _are_enough(seconds: Mapping[str, list[float]], repeats: int, precision: float | None) -> bool:
    measured = [Latency(tuple(taken)) for taken in seconds.values()]
    return (
        precision is None
        or all(one.uncertainty <= precision for one in measured)
        or all(len(one.seconds) >= _MOST * repeats for one in measured)
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
