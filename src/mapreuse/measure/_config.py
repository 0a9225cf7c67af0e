"""What a benchmark measures, checked before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch

from mapreuse.maps import STORAGES
from mapreuse.measure._contestants import KINDS, PARTS, plan_of_notation, split_plans
from mapreuse.measure._encoders import ENCODERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress: TypeAlias = Callable[[str, float, float], object]
"""Called with what is being done, how much of the work is done, and how much there is, in rough seconds."""


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` measures.

    Attributes:
        encoder: "conformer-m", "plain-conformer-m" (the same size without relative positions) or "bert-base".
        lengths: encoder frames or tokens; empty for the encoder's own.
        plans: notations that `ReusePlan.parse` takes, or "full"; empty for full, groups of 2 and 4, and two groups.
        contestants: some of `KINDS`; empty for all, or in training for eager, sdpa and ours.
        storages: how shared maps are carried, as `apply` takes it.
        batch: sequences of that length.
        threads: of the CPU; None for as many as PyTorch uses.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        repeats: rounds that count.
        part: "layers", or "whole" with the front end.
        memory: also measure every contestant's peak memory, in fresh processes.
        training: time a training step (forward and backward, dropout on) instead of a forward pass.

    Raises:
        ValueError: naming the option, where a value is not one of these.
    """

    encoder: str = "conformer-m"
    lengths: tuple[int, ...] = ()
    plans: tuple[str, ...] = ()
    contestants: tuple[str, ...] = ()
    storages: tuple[str, ...] = ("dense",)
    batch: int = 1
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 7
    part: str = "layers"
    memory: bool = False
    training: bool = False

    def __post_init__(self) -> None:
        one_of("--encoder", self.encoder, ENCODERS)
        spec = ENCODERS[self.encoder]
        depth = spec.num_layers
        groups = [f"{size}x{depth // size}" for size in (2, 4, depth // 2) if size > 1 and depth % size == 0]
        set_default(self, "lengths", (1000,) if self.training else spec.lengths)
        set_default(self, "plans", ("full", *dict.fromkeys(groups)))
        set_default(self, "contestants", ("eager", "sdpa", "ours") if self.training else KINDS)
        for kind in self.contestants:
            one_of("--contestants", kind, KINDS)
        if not self.storages:
            raise ValueError(f"--storage must name some of {', '.join(STORAGES)}, auto")
        for storage in self.storages:
            one_of("--storage", storage, (*STORAGES, "auto"))
        for plan in self.plans:
            plan_of_notation(plan, depth)
        check_settings(self.lengths, self.threads, self.dtype, self.device, self.repeats)
        one_of("--part", self.part, PARTS)
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        return command_of("mapreuse bench", self)


def plans_for(encoder: str, text: str) -> tuple[str, ...]:
    """Plans in one line, such as "full,1x4,4x3,8x2", as a list of notations; see `split_plans`."""
    one_of("--encoder", encoder, ENCODERS)
    return split_plans(text, ENCODERS[encoder].num_layers)


def one_of(option: str, value: str, allowed: Collection[str]) -> None:
    """Raise `ValueError` where an option's value is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def set_default(config: Any, name: str, value: tuple) -> None:
    """Fill in a frozen configuration's field where it was left empty."""
    if not getattr(config, name):
        object.__setattr__(config, name, value)


def check_settings(lengths: tuple[int, ...], threads: int | None, dtype: str, device: str, repeats: int) -> None:
    """Raise `ValueError`, naming the option, where a setting that all benchmarks share is off."""
    numbers = {"--lengths": min(lengths), "--threads": threads, "--repeats": repeats}
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    one_of("--dtype", dtype, DTYPES)
    one_of("--device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA GPU; leave the option out to run on the CPU")


def command_of(command: str, config: Any) -> str:
    """The command line that says all that this configuration does not leave to its defaults."""
    words = [command]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"--{field.name}" if value is True else f"--{field.name} {text}")
    return " ".join(words)


@contextlib.contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Run with this many CPU threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
