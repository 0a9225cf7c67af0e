"""What becomes of a model under a plan in the hands of each watcher.

`docs/works_with.py` tries every watcher on everything; `sample` is what the tests try. The checks of shapes in a test
run cannot be traced, so `result` must run in a process without them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

from measured import Case, Found, Run, Tensors
from tools import NotQuantised, end_processes
from torch import Tensor
from watched import FAMILIES, LENGTHS, LONGEST, PLANS, Defined, Watched, converted, inputs, original
from watchers import PARALLEL, REFUSED, WATCHERS

STORAGES = ("dense", "dense16", "dense8", "recompute")
ORIGINALS = ("original, eager", "original, sdpa")
"""In place of a storage: the original model with this attention."""
TOLERANCES = {"dense": 1e-4, "dense16": 1e-3, "dense8": 1e-2}


BATCH = 2
"""Number of items of the inputs that a tool runs with; it records three."""
REACHES = ("another shape", "another batch size", "the same shape")
"""What differs between the inputs that a tool records and those that it is run with."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        status: "right"; "refused", although the original model works; "as the original", if the original fails or
            gives wrong numbers too; or "wrong".
        reach: what differed from the recorded inputs.
        reason: the error, or the message.
    """

    status: str
    reach: str
    reason: str = ""


def result(case: Case) -> Result:
    """Try one case: record one shape and run another; if the original model does not allow that, see `REACHES`."""
    warnings.simplefilter("ignore")  # from tools, about what they will not support much longer
    for reach in REACHES:
        example = _example(case, reach)
        status, reason = _outcome(case, example)
        if status == "right":
            return Result("right", reach)
        original = _original_tried(case.watcher, case.family, case.length, example)
        if original == "right" or (status == "wrong" and original == "refused"):
            return Result(status, reach, reason)
    return Result("as the original", reach, reason)


def results(watcher: str, family: str) -> list[tuple[Case, Result]]:
    """Try one tool on one family, in every way."""
    found = [(case, result(case)) for case in cases(watcher, family)]
    if watcher in PARALLEL:
        end_processes()
    return found


def cases(watcher: str, family: str) -> Iterator[Case]:
    """Every plan and length, with each storage in turn; for slow tools, one storage for each plan."""
    if not WATCHERS[watcher].applies(family):
        return
    first = list(WATCHERS).index(watcher) + list(FAMILIES).index(family)
    for (number, plan), (step, length) in itertools.product(enumerate(PLANS), enumerate(LENGTHS)):
        turn = first + number + (0 if WATCHERS[watcher].is_slow else step)
        yield Case(watcher, family, plan, "dense" if plan == "full" else STORAGES[turn % len(STORAGES)], length)


@functools.lru_cache(64)
def _original_tried(watcher: str, family: str, length: int, example: tuple[int, int]) -> str:
    """The better status of the original model with eager attention and with `sdpa`."""
    found = {_outcome(Case(watcher, family, "full", one, length), example)[0] for one in ORIGINALS}
    return next(status for status in ("right", "wrong", "refused") if status in found)


def is_accepted(case: Case, found: Result) -> bool:
    """Whether a result is not a defect: refusals need one line that is listed, with a way out."""
    if found.status == "refused":
        listed = REFUSED.get(case.watcher)
        return listed is not None and listed[0] in found.reason and "\n" not in found.reason
    return found.status in ("right", "as the original")


def sample() -> list[Case]:
    """Cases in which every fast tool, every family, every plan with each of its storages, and every length meet.

    Fast tools meet all lengths, plans and storages but not all families. Of slow tools, there is one recording each.
    """
    ways = [(plan, storage) for plan in PLANS for storage in STORAGES if plan != "full" or storage == "dense"]
    fast = [name for name, watcher in WATCHERS.items() if not watcher.is_slow and name not in PARALLEL]
    chosen = []
    for i, watcher in enumerate(fast):
        families = [family for family in FAMILIES if WATCHERS[watcher].applies(family)]
        for j, length in enumerate(LENGTHS):
            family = families[(i + 2 * j) % len(families)]
            chosen.append(Case(watcher, family, *ways[(2 * i + 2 * j) % len(ways)], length))
    for i, watcher in enumerate(name for name in WATCHERS if WATCHERS[name].is_slow):
        family = "BERT" if i == 0 else "timm's attention"  # which records fastest
        plan = list(PLANS)[i % len(PLANS)]
        chosen += [case for case in cases(watcher, family) if case.plan == plan and case.length in (91, 300)]
    return chosen


def _outcome(case: Case, example: tuple[int, int]) -> tuple[str, str]:
    """Status and reason, for a recording of this batch size and length."""
    recorded = _recorded(case, *example)
    try:
        if isinstance(recorded, Exception):
            raise recorded
        found = recorded(inputs(case.family, BATCH, case.length, 2))
    except NotQuantised as error:
        return "wrong", str(error)
    except Exception as error:  # tools fail in many ways; the message is the result
        return "refused", f"{type(error).__name__}: {error}"
    # Compressed storages keep exact weights with gradients and where a pass is recorded.
    storages = {"dense", case.storage} & TOLERANCES.keys()
    excess, name = min(_excess(case, storage, found) for storage in storages)
    return ("right", "") if excess <= 0 else ("wrong", f"{name} off by {excess:.1e}")


def _excess(case: Case, storage: str, found: Found) -> tuple[float, str]:
    """By how much the greatest distance from the definition exceeds the tolerance, and of which tensor."""
    watcher = WATCHERS[case.watcher]
    expected = _defined(watcher.expected, case.family, case.plan, storage, case.length)
    if watcher.is_lossy:
        allowed = TOLERANCES[storage] + 2 * _loss_of_precision(case.watcher, case.family, case.plan, case.length)
        return mean_distance(found, expected) - allowed, "the mean"
    return max((distance(found.get(name), expected, name) - TOLERANCES[storage], name) for name in expected)


def _example(case: Case, reach: str) -> tuple[int, int]:
    """Batch size and length of the inputs that are recorded: in turn, shorter or longer than most of the others."""
    turn = list(FAMILIES).index(case.family) + list(PLANS).index(case.plan)
    other = (LENGTHS[0], LENGTHS[-2])[turn % 2] if FAMILIES[case.family].stretch else case.length
    return {REACHES[0]: (3, other), REACHES[1]: (3, case.length), REACHES[2]: (BATCH, case.length)}[reach]


def _recorded(case: Case, batch: int, length: int) -> Run | Exception:
    fixed = case.length if FAMILIES[case.family].stretch == 0 else LONGEST
    return _recording(dataclasses.replace(case, length=fixed), batch, length)


@functools.lru_cache(4)
def _recording(case: Case, batch: int, length: int) -> Run | Exception:
    """What a tool made of a model for inputs of `case.length` positions or less, or its error."""
    if case.storage in ORIGINALS:
        model = original(case.family, case.length, case.storage.split()[-1])
    else:
        model = converted(case.family, case.length, case.plan, case.storage, WATCHERS[case.watcher].implementation)
    try:
        return WATCHERS[case.watcher].record(model, case, inputs(case.family, batch, length, 1))
    except Exception as error:  # tools fail in many ways; the message is the result
        return error


@functools.lru_cache(256)
def _defined(
    compute: Callable[[Watched, Tensors], Found], family: str, plan: str, storage: str, length: int
) -> Found:
    """What a run must give."""
    return compute(Defined(family, length, plan, storage), inputs(family, BATCH, length, 2))


@functools.lru_cache(64)
def _loss_of_precision(watcher: str, family: str, plan: str, length: int) -> float:
    """Distance of the definition under a tool from the definition."""
    tensors, tool = inputs(family, BATCH, length, 2), WATCHERS[watcher]
    expected = _defined(tool.expected, family, plan, "dense", length)
    found = tool.record(Defined(family, length, plan), Case(watcher, family, plan, "", length), tensors)(tensors)
    return mean_distance(found, expected)


def mean_distance(found: Found, expected: Found) -> float:
    """Sum of |found − expected| / sum of |expected|, over all tensors."""
    if found.keys() < expected.keys():
        return float("inf")
    differences = sum((found[name].float() - one).abs().sum().item() for name, one in expected.items())
    return differences / sum(one.abs().sum().item() for one in expected.values())


def distance(found: Tensor | None, expected: Found, name: str) -> float:
    """max |found − expected| / max |expected|; the denominator is at least a thousandth of the greatest one."""
    if found is None or found.shape != expected[name].shape or not found.isfinite().all():
        return float("inf")
    scale = max(expected[name].abs().max().item(), 1e-3 * max(one.abs().max().item() for one in expected.values()))
    return (found.float() - expected[name]).abs().max().item() / scale
