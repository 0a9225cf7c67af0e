"""Which storage carries the maps of a pass: the fastest, by measurement, of those that fit the memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mapreuse.maps._scores import RelativePositions, Scores
from mapreuse.maps._storage import STORAGES, compute, nbytes

_SHORTEST, _LONGEST = 64, 1024
"""Lengths between which storages are timed; longer maps cost as the square of theirs."""
_REPEATS = 3


@dataclass(frozen=True)
class Demand:
    """What a plan asks of its maps in one pass.

    Attributes:
        computed: how many are computed for other layers.
        applied: how often they are applied.
        heads_handed_on: heads of those that are handed on.
        heads_alive: the most heads alive at once, where a map is dropped after its last reader.
    """

    computed: int
    applied: int
    heads_handed_on: int
    heads_alive: int

    def nbytes(self, storage: str, scores: Scores, *, retain: bool) -> int:
        """Bytes of the maps alive at once, of heads such as those of `scores`; of all maps where none is dropped."""
        heads = self.heads_handed_on if retain else self.heads_alive
        return -(-heads * nbytes(storage, scores) // scores.shape[1])


@dataclass(frozen=True)
class Candidate:
    """What a storage would cost in one pass: seconds to compute and apply all maps, bytes of those alive at once."""

    storage: str
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Choice:
    """The fastest of the candidates that fit `budget` bytes, "dense8" only where more bits do not; as text, why."""

    candidates: tuple[Candidate, ...]
    budget: int

    @property
    def storage(self) -> str:
        fitting = [candidate for candidate in self.candidates if candidate.nbytes <= self.budget]
        if not fitting:
            least = min(self.candidates, key=lambda candidate: candidate.nbytes)
            raise ValueError(
                f"no storage carries the shared maps within memory_budget={self.budget}: {least.storage} needs the "
                f"least, memory_budget={least.nbytes}"
            )
        # Eight bits move outputs by thousandths: memory may ask for that, speed alone may not.
        if {"dense", "dense16"} & {candidate.storage for candidate in fitting}:
            fitting = [candidate for candidate in fitting if candidate.storage != "dense8"]
        return min(fitting, key=lambda candidate: candidate.seconds).storage

    def __str__(self) -> str:
        ranked = sorted(self.candidates, key=lambda candidate: candidate.seconds)
        listed = []
        for candidate in ranked:
            cost = f"{candidate.seconds * 1e3:.1f} ms, {candidate.nbytes / 1e6:.1f} MB"
            listed.append(f"{candidate.storage} {cost}{'' if candidate.nbytes <= self.budget else ' (too much)'}")
        budget = f"{self.budget / 1e6:.1f} MB"
        return f"{self.storage} is the fastest that keeps shared maps within {budget}: {'; '.join(listed)}"


def choose(
    scores: Scores,
    values: Tensor,
    demand: Demand,
    *,
    storages: Sequence[str] = STORAGES,
    budget: int | None = None,
    retain: bool = False,
) -> Choice:
    """The choice among `storages` for maps such as those of `scores`.

    Costs are measured once per process for each device, type, number of threads, head count, head size and power of
    two below the length, on random numbers; longer maps, and batches, are taken to cost in proportion to their
    numbers. `budget` is a quarter of the device's memory where None; `retain` says that maps live till the end of the
    pass.
    """
    batch, heads, num_queries, num_keys = scores.shape
    length = min(max(_SHORTEST, 1 << (max(num_queries, num_keys).bit_length() - 1)), _LONGEST)
    measured = _measured_seconds(
        str(values.device),
        values.dtype,
        torch.get_num_threads(),
        heads,
        scores.query.shape[-1],
        values.shape[-1],
        length,
        scores.relative is not None,
    )
    times = batch * num_queries * num_keys / length**2
    candidates = []
    for storage in storages:
        computing, applying = measured[storage]
        seconds = times * (demand.computed * computing + demand.applied * applying)
        candidates.append(Candidate(storage, seconds, demand.nbytes(storage, scores, retain=retain)))
    return Choice(tuple(candidates), _quarter_of_memory(values.device) if budget is None else budget)


@lru_cache(maxsize=256)
def _measured_seconds(
    device: str,
    dtype: torch.dtype,
    threads: int,
    heads: int,
    dim: int,
    value_dim: int,
    length: int,
    has_relative: bool,
) -> dict[str, tuple[float, float]]:
    """For every storage, the median seconds of computing and of applying a map of `length` positions."""
    generator = torch.Generator().manual_seed(0)

    def random(positions: int, size: int) -> Tensor:
        return torch.randn(1, heads, positions, size, generator=generator).to(device, dtype)

    relative = RelativePositions(random(length, dim), random(2 * length - 1, dim)) if has_relative else None
    scores = Scores(random(length, dim), random(length, dim), dim**-0.5, relative=relative)
    values = random(length, value_dim)
    found = {}
    with torch.inference_mode():
        for storage in STORAGES:
            computing, applying = [], []
            for _ in range(1 + _REPEATS):
                started = _now(device)
                carried = compute(scores, values, storage)[1]
                computed = _now(device)
                carried.apply(values)
                computing.append(computed - started)
                applying.append(_now(device) - computed)
            found[storage] = statistics.median(computing[1:]), statistics.median(applying[1:])
    return found


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _quarter_of_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
