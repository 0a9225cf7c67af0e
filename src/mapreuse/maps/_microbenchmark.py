"""Short timings that choose between ways to compute the same result on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_REPEATS = 7
"""Number of interleaved timings of each function."""

_MAX_RATIO = 0.9
"""Maximum ratio of times that counts as faster; smaller differences may be noise."""


def is_clearly_faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `one` runs at least 10 % faster than `other` on the CPU, by the minimum of several timings each."""
    times = [(_seconds(one), _seconds(other)) for _ in range(_REPEATS)]
    ones, others = map(min, zip(*times, strict=True))
    return ones < _MAX_RATIO * others


def now(device: str) -> float:
    """Seconds on the clock after all work on `device` has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(call: Callable[[], object]) -> float:
    started = now("cpu")
    call()
    return now("cpu") - started
