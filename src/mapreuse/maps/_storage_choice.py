"""Choice of the storage: the fastest one, by a short benchmark, that fits the memory budget."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mapreuse.maps._scores import RelativePositions, Scores
from mapreuse.maps._storage import STORAGES, compute, nbytes

_MIN_LENGTH, _MAX_LENGTH = 64, 1024
"""Range of lengths that are timed. The cost of other lengths is scaled by the square of the length."""
_REPEATS = 3


@dataclass(frozen=True)
class MapCounts:
    """Numbers of shared maps in one forward pass.

    Attributes:
        computed: number of maps that are computed for other layers.
        applied: number of times that other layers apply them.
        heads_published: number of heads of all these maps.
        heads_alive: maximum number of heads alive at once if each map is dropped after its last reader.
    """

    computed: int
    applied: int
    heads_published: int
    heads_alive: int

    def nbytes(self, storage: str, scores: Scores, *, retain: bool) -> int:
        """Maximum size in bytes of the maps alive at once; of all maps if `retain`."""
        heads = self.heads_published if retain else self.heads_alive
        return -(-heads * nbytes(storage, scores) // scores.shape[1])


@dataclass(frozen=True)
class StorageCost:
    """Cost of a storage in one forward pass: time to compute and apply maps, and size of the maps alive."""

    storage: str
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class StorageChoice:
    """The fastest storage within a memory budget in bytes. As text, it explains the choice.

    "dense8" changes outputs by about 0.1 %, so it is chosen only if neither "dense" nor "dense16" fits.
    """

    costs: tuple[StorageCost, ...]
    budget: int

    @property
    def storage(self) -> str:
        """Name of the chosen storage. Raises `ValueError` if none fits the budget."""
        fitting = [cost for cost in self.costs if cost.nbytes <= self.budget]
        if not fitting:
            smallest = min(self.costs, key=lambda cost: cost.nbytes)
            raise ValueError(
                f"no storage of the shared maps fits memory_budget={self.budget}: the smallest is "
                f"{smallest.storage}, which needs memory_budget={smallest.nbytes}"
            )
        if {"dense", "dense16"} & {cost.storage for cost in fitting}:
            fitting = [cost for cost in fitting if cost.storage != "dense8"]
        return min(fitting, key=lambda cost: cost.seconds).storage

    def __str__(self) -> str:
        listed = "; ".join(
            f"{cost.storage} {cost.seconds * 1e3:.1f} ms, {cost.nbytes / 1e6:.1f} MB"
            f"{'' if cost.nbytes <= self.budget else ' (too large)'}"
            for cost in sorted(self.costs, key=lambda cost: cost.seconds)
        )
        return f"{self.storage} is the fastest storage of shared maps within {self.budget / 1e6:.1f} MB: {listed}"


def choose_storage(
    scores: Scores,
    values: Tensor,
    counts: MapCounts,
    storages: Sequence[str] = STORAGES,
    *,
    budget: int | None = None,
    retain: bool = False,
) -> StorageChoice:
    """Choose a storage for maps of the size of these scores.

    Computing and applying a map is timed on random numbers, once per process for each device, type, number of
    threads, number and size of heads, and power of two below the length. The times are scaled to the size of the map.

    Args:
        scores, values: from the layer that computes the first map of the pass.
        counts: numbers of maps in the pass.
        storages: the storages to choose from.
        budget: maximum size in bytes of the maps alive at once. None: a quarter of the device's memory.
        retain: maps stay alive until the end of the pass.
    """
    batch, heads, num_queries, num_keys = scores.shape
    length = min(max(_MIN_LENGTH, 1 << (max(num_queries, num_keys).bit_length() - 1)), _MAX_LENGTH)
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
    scale = batch * num_queries * num_keys / length**2
    costs = []
    for storage in storages:
        computing, applying = measured[storage]
        seconds = scale * (counts.computed * computing + counts.applied * applying)
        costs.append(StorageCost(storage, seconds, counts.nbytes(storage, scores, retain=retain)))
    if budget is None and values.device.type == "cuda":
        budget = torch.cuda.get_device_properties(values.device).total_memory // 4
    elif budget is None:
        budget = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    return StorageChoice(tuple(costs), budget)


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
    """For each storage, the median times of computing and of applying a map of `length` positions."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(positions: int, size: int) -> Tensor:
        return torch.randn(1, heads, positions, size, generator=generator, device="cpu").to(device, dtype)

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)  # all work has finished
        return time.perf_counter()

    relative = RelativePositions(random(length, dim), random(2 * length - 1, dim)) if has_relative else None
    scores = Scores(random(length, dim), random(length, dim), dim**-0.5, relative=relative)
    values = random(length, value_dim)
    found = {}
    with torch.inference_mode(), _disable_current_modes():
        for storage in STORAGES:
            computing, applying = [], []
            for _ in range(1 + _REPEATS):  # the first is a warm-up
                started = now()
                attention_map = compute(scores, values, storage)[1]
                computed = now()
                attention_map.apply(values)
                computing.append(computed - started)
                applying.append(now() - computed)
            found[storage] = statistics.median(computing[1:]), statistics.median(applying[1:])
    return found
