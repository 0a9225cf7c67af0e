"""How far is a training run, and how fast does it learn there? For any budget, in steps or in seconds."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable


@runtime_checkable
class Budget(Protocol):
    """A budget in steps or in seconds, the peak learning rate, and the fraction over which it is reached."""

    @property
    def steps(self) -> int | None: ...

    @property
    def seconds(self) -> float | None: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def warmup(self) -> float: ...


def spent(budget: Budget, step: int, elapsed: float) -> float:
    """The fraction of the budget that is spent after `step` steps and `elapsed` seconds."""
    if budget.steps is not None:
        return step / budget.steps
    assert budget.seconds is not None
    return elapsed / budget.seconds


def learning_rate(budget: Budget, step: int, elapsed: float) -> float:
    """Linear over the first `warmup` of the budget, then to zero along a cosine (Loshchilov and Hutter, 2017)."""
    progress = spent(budget, step, elapsed)
    if budget.steps is not None:
        progress += 0.5 / budget.steps  # the middle of the step, so that none has rate zero
    if progress < budget.warmup:
        return budget.learning_rate * progress / budget.warmup
    return budget.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - budget.warmup) / (1 - budget.warmup)))
