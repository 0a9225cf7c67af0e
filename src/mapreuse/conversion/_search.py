"""Which layers, and which heads, should share maps? Candidates by what they should cost, judged by what they do."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from mapreuse.conversion._align import Head
from mapreuse.conversion._evaluation import Judged
from mapreuse.conversion._search_heuristic import Ranking
from mapreuse.conversion._states import hidden_state_error, in_evaluation_mode
from mapreuse.conversion._validation import calibration_batches, check_precision, digest
from mapreuse.measure import time_interleaved
from mapreuse.models import apply, copy_with_same_weights, plan_of
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

FEWEST = 8
"""Batches: three of four calibrate, one judges."""

_ROUNDS = 7
"""Timed rounds, of the cost model and of the plans that are returned; more where times vary."""

_PRECISION, _PRECISION_OF_COSTS = 0.02, 0.05
"""Relative standard errors of times that are precise enough to be told or be a budget, and to choose plans by."""

_TOO_FAST = "no plan takes {} of the original's time: with all maps shared it is {:.2f}"

_TOLERANCE = 0.1
"""How far the cost model may be from a real run, relative to it, before that is said."""


@dataclass(frozen=True)
class Candidate:
    """A plan, with what it costs and saves.

    Attributes:
        plan: the plan, head by head.
        error: error on the batches that judge, after `apply` and `refit`.
        latency: time of a forward pass, measured, divided by the original's in the same run.
        predicted: the same by the cost model.
        parameters: parameters of the converted model.
    """

    plan: ReusePlan
    error: float
    latency: float
    predicted: float
    parameters: int


class Candidates(list[Candidate]):
    """What a search came to, from the most exact plan to the fastest.

    For `converted` it refers to the original, which must be as it was, to the batches, and to what it knows of them,
    up to 400 MB; `list(candidates)` refers to none of that, and can be pickled.

    Attributes:
        exact_latency: time of a plan that reuses nothing, divided by the original's, measured in the same run.
    """

    def __init__(self, candidates: Iterable[Candidate], exact_latency: float, judged: Judged) -> None:
        super().__init__(candidates)
        self.exact_latency, self._judged = exact_latency, judged

    def converted(self, candidate: Candidate) -> nn.Module:
        """A copy of the original under a candidate's plan, refitted as when it was judged."""
        return self._judged.refitted(candidate.plan)


def search(
    original: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    latency: float | None = None,
    error: float | None = None,
    judge: Callable[[nn.Module], float] | None = None,
    timed: Mapping[str, Any] | None = None,
    breadth: int = 4,
    cache: str | Path | None = None,
) -> Candidates:
    """Plans of which none is both slower and worse than another, from the most exact to the fastest.

    A plan is the set R of heads that reuse; each of them takes, of the heads of earlier layers that still compute,
    the one whose map changes its layer's output least (`align`). From the full plan on, R grows by all heads of a
    layer that still compute, or by as many heads as a layer has, or half of them, of whatever layers, one after the
    other the one that should cost least. The `breadth` extensions with the least predicted error for the time they
    save are converted, refitted and judged, and the one with the least error for the time it saves is extended
    further, until the budget is met, one of latency by measurement. What is predicted is what a layer's output loses
    when its output projection is refitted, weighed by what that did to the model's error when only heads of this
    layer reused.
    Everything judged on the way competes for the result, whose latencies are then measured in turns.

    The cost model takes the time of a wholly reusing layer, and of one where half of the heads reuse, from three
    plans timed on this device. Those are timed again, in turns with every plan that is returned, and where a plan's
    time differs by more than 10 % from what the model makes of that run, it is logged. Times are the original's, by
    its eager or fused attention, which may take twice as long in one process as in another: a budget of latency is
    met by that measure, while plans differ in any process as they do here.

    Args:
        original: a trained model that `apply` accepts; it is left as it is.
        batches: calibration batches, at least eight; of every four, three are for `refit` and one judges.
        latency: stop at a plan predicted to take at most this share of the original's time. Give this or `error`.
        error: stop where every extension has a greater error than this; only plans within it are returned.
        judge: the error of a converted model, 0 for the original; by default `hidden_state_error` on the batches
            kept apart.
        timed: the batch whose latency counts, such as one of the size that the model will meet; by default the
            calibration batch of median size.
        breadth: extensions judged in each step.
        cache: a file to which every judged plan is written, one JSON object a line; the same search goes on from it,
            but for the first of its plans, and what it measures of maps and times.

    Raises:
        ValueError: where not exactly one budget is given, it cannot be met by any plan, there are too few batches,
            the model has a plan already, is in half precision on a CPU or cannot be served, or the cache cannot be
            read.
    """
    if (latency is None) == (error is None):
        raise ValueError("give the budget as latency=0.7 (of the original's time) or as error=0.02, one of the two")
    if latency is not None and not 0 < latency < 1:
        raise ValueError(f"latency must be a share of the original's time between 0 and 1, got {latency}")
    if error is not None and not error >= 0:
        raise ValueError(f"error must be at least 0, got {error}")
    if breadth < 1:
        raise ValueError(f"breadth must be at least 1, got {breadth}")
    check_precision(original)
    if plan_of(original) is not None:
        raise ValueError("the model reuses attention maps already; search plans for the original model instead")
    given = calibration_batches(batches, FEWEST, "search")
    calibration, judging = calibrating_and_judging(given)
    judge = judge or hidden_state_error(original, judging)
    batch = timed or _of_median_size(given)
    identity = digest([original.state_dict(), *given])
    judged = Judged(original, calibration, judge, None if cache is None else Path(cache), identity)
    ranking = Ranking(original, calibration, judged)
    costs = _Costs(original, batch, ranking, precision=_PRECISION_OF_COSTS if latency is None else _PRECISION)
    if latency is not None and (least := costs.of(ranking.all)) > latency * (1 + _TOLERANCE):
        raise ValueError(_TOO_FAST.format(latency, least))
    reusing: frozenset[Head] = frozenset()
    visited = {reusing: ranking.plan(reusing)}
    found: list[Candidate] = []
    with tqdm(desc="Searching", unit="plan") as bar:
        while True:
            if latency is not None and (costs.of(reusing) <= latency or reusing == ranking.all):
                found = _measured(original, visited, judged, costs, batch)
                if any(candidate.latency <= latency for candidate in found):
                    return Candidates(found, costs.exact, judged)
            extensions = {e: ranking.plan(e) for e in _extensions(ranking, reusing, costs)[:breadth]}
            for plan in extensions.values():
                judged(plan)
                bar.update()
            within = {e: plan for e, plan in extensions.items() if error is None or judged(plan) <= error}
            visited |= within
            if not within:
                break
            before, time = judged(visited[reusing]), costs.of(reusing)
            reusing = min(within, key=lambda e: (judged(within[e]) - before) / _saved(time, costs.of(e)))
            bar.set_postfix_str(f"error {judged(visited[reusing]):.4f} at {costs.of(reusing):.2f}×")
    if latency is not None:
        fastest = min((candidate.latency for candidate in found), default=costs.of(reusing))
        raise ValueError(_TOO_FAST.format(latency, fastest))
    return Candidates(_measured(original, visited, judged, costs, batch), costs.exact, judged)


def calibrating_and_judging(
    batches: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Three of four batches to calibrate on, and those that judge."""
    return [batch for index, batch in enumerate(batches) if index % 4 != 1], list(batches[1::4])


def relative_latencies(
    original: nn.Module, models: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Times of the models' forward passes, by the original's, in turns, on the batch of median size."""
    times = _times({"": original} | dict(models), _of_median_size(batches))
    return {name: times[name] / times[""] for name in models}


def _of_median_size(batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return sorted(batches, key=_size)[len(batches) // 2]


def _saved(before: float, after: float) -> float:
    """Time saved, at least a little, so that it can divide."""
    return max(before - after, 1e-6)


def _extensions(ranking: Ranking, reusing: frozenset[Head], costs: _Costs) -> list[frozenset[Head]]:
    """Ways to let more heads reuse, the most promising first."""
    found = [reusing | ranking.heads(layer) for layer in ranking.sharing if not ranking.heads(layer) <= reusing]
    if ranking.partial:
        half = ranking.grown(reusing, ranking.num_heads // 2)
        found += [half, ranking.grown(half, ranking.num_heads - ranking.num_heads // 2)]
    before, time = ranking.predicted(reusing), costs.of(reusing)

    def price(extension: frozenset[Head]) -> float:
        return (ranking.predicted(extension) - before) / _saved(time, costs.of(extension))

    return sorted(dict.fromkeys(one for one in found if one != reusing), key=price)


class _Costs:
    """Time of a plan, by the number of heads that reuse in each layer, from three plans timed beside the original.

    Attributes:
        exact: measured share of the original's time of the plan that reuses nothing.
    """

    def __init__(
        self, original: nn.Module, batch: Mapping[str, Any], ranking: Ranking, *, precision: float = _PRECISION
    ) -> None:
        heads = range(ranking.num_heads)
        plans = {"none": frozenset[Head](), "all": ranking.all}
        if ranking.partial:
            plans["half"] = frozenset((layer, head) for layer in ranking.sharing for head in heads[1::2])
        self._original, self._plans = original, {name: ranking.plan(heads) for name, heads in plans.items()}
        self._num_heads, self._num_sharing = ranking.num_heads, len(ranking.sharing)
        self.calibrate(_times({"original": original} | self.models(), batch, precision=precision))

    def models(self) -> dict[str, nn.Module]:
        """The three plans' models, made anew: in memory only while they are timed."""
        return {name: apply(copy_with_same_weights(self._original), plan) for name, plan in self._plans.items()}

    def calibrate(self, times: Mapping[str, float]) -> None:
        """Take what the original and the three plans cost from these times, measured in turns."""
        self.exact = times["none"] / times["original"]
        self._saved = {
            name: (times["none"] - times[name]) / times["original"] / self._num_sharing
            for name in ("all", "half")
            if name in times
        }

    def of(self, reusing: frozenset[Head]) -> float:
        """Predicted share of the original's time of the plan where these heads reuse."""
        numbers = Counter(layer for layer, _ in reusing)
        saved = 0.0
        for number in numbers.values():
            if number == self._num_heads:
                saved += self._saved["all"]
            else:
                saved += self._saved["half"] * number / (self._num_heads // 2)
        return self.exact - saved


def _measured(
    original: nn.Module, visited: Mapping[frozenset[Head], ReusePlan], judged: Judged, costs: _Costs, batch: Mapping
) -> list[Candidate]:
    """Of the plans judged, those that no other beats, timed; the cost model is that of the same run."""
    heads = {plan: reusing for reusing, plan in visited.items()}
    chosen = _front({plan: (judged(plan), costs.of(reusing)) for plan, reusing in heads.items()})
    names = {plan: "none" if plan.is_full else str(number) for number, plan in enumerate(chosen)}
    models = costs.models()
    models |= {name: apply(copy_with_same_weights(original), plan) for plan, name in names.items() if name != "none"}
    times = _times({"original": original} | models, batch)
    costs.calibrate(times)
    found = []
    for plan, name in names.items():
        predicted, measured = costs.of(heads[plan]), times[name] / times["original"]
        if abs(predicted - measured) > _TOLERANCE * measured:
            logger.warning("a plan was predicted to take %.2f×, and takes %.2f×", predicted, measured)
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        found.append(Candidate(plan, judged(plan), measured, predicted, parameters))
    best = _front({candidate: (candidate.error, candidate.latency) for candidate in found})
    return sorted(best, key=lambda candidate: candidate.error)


def _front(points: Mapping[Any, tuple[float, float]]) -> list[Any]:
    """Those that no other point beats in one number without being worse in the other."""
    return [
        one
        for one, (error, time) in points.items()
        if not any(e <= error and t <= time and (e, t) != (error, time) for e, t in points.values())
    ]


def _times(
    models: Mapping[str, nn.Module], batch: Mapping[str, Any], *, precision: float = _PRECISION
) -> dict[str, float]:
    """Seconds of a forward pass of each, in turns."""
    device = next(value for value in batch.values() if isinstance(value, Tensor)).device.type
    calls = {name: functools.partial(model, **batch) for name, model in models.items()}
    with in_evaluation_mode(*models.values()):
        timed = time_interleaved(calls, repeats=_ROUNDS, warmup=2, precision=precision, device=device)
    return {name: latency.median for name, latency in timed.items()}


def _size(batch: Mapping[str, Any]) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)
