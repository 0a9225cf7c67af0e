"""Search for plans: which layers, and which heads, should share maps?"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mapreuse.console import progress_bar
from mapreuse.conversion._align import Head
from mapreuse.conversion._evaluation import PlanEvaluator, hidden_state_error
from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.conversion._search_heuristic import SearchHeuristic
from mapreuse.conversion._validation import checked_batches, digest
from mapreuse.data import check_precision
from mapreuse.measure import time_interleaved
from mapreuse.models import apply, copy_with_same_weights, plan_of
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

MIN_SEARCH_BATCHES = 8
"""Three of four batches calibrate, one evaluates."""

_REPEATS = 7
"""Timed passes of each model; more if times vary."""

_PRECISION, _COST_PRECISION = 0.02, 0.05
"""Relative standard error of times that are reported or decide about the budget, and of times that guide the search."""

_UNREACHABLE = "no plan has a latency of {} times the original's: with all maps shared it is {:.2f}"

_TOLERANCE = 0.1
"""Relative deviation of the cost model from a measurement above which a warning is logged."""


@dataclass(frozen=True)
class Candidate:
    """A plan that a search found.

    Attributes:
        plan: the plan, head by head.
        error: held-out error after `apply` and `refit`.
        latency: time of a forward pass, divided by the original's in the same run.
        exact_latency: the same of a plan that reuses nothing, in the same run.
        predicted_latency: `latency` according to the cost model.
        parameters: number of parameters of the converted model.
    """

    plan: ReusePlan
    error: float
    latency: float
    exact_latency: float
    predicted_latency: float
    parameters: int
    _refitted: Callable[[ReusePlan], nn.Module] = field(repr=False, compare=False)

    def build(self) -> nn.Module:
        """The converted model: a copy of the original under this plan, refitted as in the search.

        The candidate keeps a reference to the original, which must not have changed since, to the calibration batches,
        and to up to 400 MB of cached activations.
        """
        return self._refitted(self.plan)


def search(
    original: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    latency: float | None = None,
    error: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    timed: Mapping[str, Any] | None = None,
    breadth: int = 4,
    cache: str | Path | None = None,
) -> list[Candidate]:
    """Search for plans with little error for the time they save.

    A plan is a set of heads that reuse. Each applies the map, among the heads of earlier layers that still compute,
    that changes its layer's output least (see `align`). A greedy search extends the set: by all heads of a layer, or
    by half or all of the number of heads in a layer, chosen among all layers by predicted error. In each step the
    `breadth` extensions with the least predicted error for the time they save are converted, refitted and evaluated;
    the best of them is extended further, until the budget is met. See `SearchHeuristic` for the prediction.

    Latency counts what sharing saves and nothing else. It is relative to `original` as it is given: apply
    `mapreuse.optimize` to it before the search to compare optimised models, or to neither. A cost model of three timed
    plans guides the search. The plans that are returned are timed in turns with the original, and a budget of latency
    is met by that measurement. A deviation of more than 10 % from the cost model is logged.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least eight; of every four, three are for `refit` and one for evaluation.
        latency: stop at a plan with at most this latency, relative to the original's. Give this or `error`.
        error: stop when every extension has a greater error; only plans within it are returned.
        metric: the error of a converted model, 0 for the original. None: `hidden_state_error` on the held-out batches.
        timed: the batch to time, for example one of the size used in production. None: the calibration batch of
            median size.
        breadth: number of extensions evaluated in each step.
        cache: a file of evaluated plans, one JSON object per line. The same search continues from it; only its first
            plan is evaluated again.

    Returns:
        The plans that no other plan beats in both error and latency, from the least error to the least latency.

    Raises:
        ValueError: if not exactly one budget is given, no plan meets it, there are too few batches, the model has a
            plan already, is in half precision on a CPU or unsupported, or the cache cannot be read.
    """
    if (latency is None) == (error is None):
        raise ValueError(
            "give exactly one budget: latency=0.7 (relative to the original's) or error=0.02, one of the two"
        )
    if latency is not None and not 0 < latency < 1:
        raise ValueError(f"latency is relative to the original's and must be between 0 and 1, got {latency}")
    if error is not None and not error >= 0:
        raise ValueError(f"error must be at least 0, got {error}")
    if breadth < 1:
        raise ValueError(f"breadth must be at least 1, got {breadth}")
    check_precision(original)
    if plan_of(original) is not None:
        raise ValueError("the model shares attention maps already; search plans for the original model instead")
    given = checked_batches(batches, MIN_SEARCH_BATCHES, "search")
    calibration, evaluation = split_batches(given)
    metric = metric or hidden_state_error(original, evaluation)
    batch = timed or _of_median_size(given)
    identity = digest([original.state_dict(), *given])
    evaluate = PlanEvaluator(original, calibration, metric, None if cache is None else Path(cache), identity)
    heuristic = SearchHeuristic(original, calibration, evaluate)
    precision = _COST_PRECISION if latency is None else _PRECISION
    costs = _CostModel(original, batch, heuristic, precision=precision)
    if latency is not None and (least := costs.of(heuristic.all)) > latency * (1 + _TOLERANCE):
        raise ValueError(_UNREACHABLE.format(latency, least))
    reusing: frozenset[Head] = frozenset()
    visited = {reusing: heuristic.plan(reusing)}
    found: list[Candidate] = []
    with progress_bar("searching") as progress:
        while True:
            if latency is not None and (costs.of(reusing) <= latency or reusing == heuristic.all):
                found = _measured(original, visited, evaluate, costs, batch)
                if any(candidate.latency <= latency for candidate in found):
                    return found
            extensions = {e: heuristic.plan(e) for e in _extensions(heuristic, reusing, costs)[:breadth]}
            for plan in extensions.values():
                evaluate(plan)
            within = {e: plan for e, plan in extensions.items() if error is None or evaluate(plan) <= error}
            visited |= within
            if not within:
                break
            before, time = evaluate(visited[reusing]), costs.of(reusing)
            reusing = min(within, key=lambda e: (evaluate(within[e]) - before) / _saved(time, costs.of(e)))
            description = (
                f"searching: error {evaluate(visited[reusing]):.4f} at {costs.of(reusing):.2f} of the latency"
            )
            progress(description, len(reusing), len(heuristic.all))
    if latency is not None:
        least = min((candidate.latency for candidate in found), default=costs.of(reusing))
        raise ValueError(_UNREACHABLE.format(latency, least))
    return _measured(original, visited, evaluate, costs, batch)


def split_batches(
    batches: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Three of every four batches for calibration, and the others for evaluation."""
    return [batch for index, batch in enumerate(batches) if index % 4 != 1], list(batches[1::4])


def relative_latencies(
    original: nn.Module, models: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Times of the models' forward passes, divided by the original's, on the batch of median size."""
    times = _times({"": original} | dict(models), _of_median_size(batches))
    return {name: times[name] / times[""] for name in models}


def _of_median_size(batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return sorted(batches, key=_size)[len(batches) // 2]


def _saved(before: float, after: float) -> float:
    """Time saved, with a minimum so that it can divide."""
    return max(before - after, 1e-6)


def _extensions(heuristic: SearchHeuristic, reusing: frozenset[Head], costs: _CostModel) -> list[frozenset[Head]]:
    """Ways to let more heads reuse, by predicted error for the time they save."""
    found = [reusing | heuristic.heads(layer) for layer in heuristic.sources]
    if heuristic.partial:
        half = heuristic.grown(reusing, heuristic.num_heads // 2)
        found += [half, heuristic.grown(half, heuristic.num_heads - heuristic.num_heads // 2)]
    before, time = heuristic.predicted(reusing), costs.of(reusing)

    def price(extension: frozenset[Head]) -> float:
        return (heuristic.predicted(extension) - before) / _saved(time, costs.of(extension))

    return sorted(dict.fromkeys(one for one in found if one != reusing), key=price)


class _CostModel:
    """Latency of a plan by the number of heads that reuse in each layer, from three plans timed with the original.

    Attributes:
        exact: relative latency of the plan that reuses nothing.
    """

    def __init__(
        self, original: nn.Module, batch: Mapping[str, Any], heuristic: SearchHeuristic, *, precision: float
    ) -> None:
        heads = range(heuristic.num_heads)
        plans = {"none": frozenset[Head](), "all": heuristic.all}
        if heuristic.partial:
            plans["half"] = frozenset((layer, head) for layer in heuristic.sources for head in heads[1::2])
        self._original = original
        self._plans = {name: heuristic.plan(heads) for name, heads in plans.items()}
        self._num_heads, self._num_reusing_layers = heuristic.num_heads, len(heuristic.sources)
        self.calibrate(_times({"original": original} | self.models(), batch, precision=precision))

    def models(self) -> dict[str, nn.Module]:
        """Models under the three plans; made anew for each timing, so that they take memory only then."""
        return {name: apply(copy_with_same_weights(self._original), plan) for name, plan in self._plans.items()}

    def calibrate(self, times: Mapping[str, float]) -> None:
        """Set the parameters from times of the original and of the three plans, measured in turns."""
        self.exact = times["none"] / times["original"]
        self._saved = {
            name: (times["none"] - times[name]) / times["original"] / self._num_reusing_layers
            for name in ("all", "half")
            if name in times
        }

    def of(self, reusing: frozenset[Head]) -> float:
        """Predicted relative latency of the plan in which these heads reuse."""
        saved = 0.0
        for number in Counter(layer for layer, _ in reusing).values():
            if number == self._num_heads:
                saved += self._saved["all"]
            else:
                saved += self._saved["half"] * number / (self._num_heads // 2)
        return self.exact - saved


def _measured(
    original: nn.Module,
    visited: Mapping[frozenset[Head], ReusePlan],
    evaluate: PlanEvaluator,
    costs: _CostModel,
    batch: Mapping[str, Any],
) -> list[Candidate]:
    """Time the plans that no other plan beats; the cost model is calibrated in the same run."""
    heads = {plan: reusing for reusing, plan in visited.items()}
    chosen = _front({plan: (evaluate(plan), costs.of(reusing)) for plan, reusing in heads.items()})
    names = {plan: "none" if plan.is_full else str(number) for number, plan in enumerate(chosen)}
    models = costs.models()
    models |= {name: apply(copy_with_same_weights(original), plan) for plan, name in names.items() if name != "none"}
    times = _times({"original": original} | models, batch)
    costs.calibrate(times)
    found = []
    for plan, name in names.items():
        predicted, measured = costs.of(heads[plan]), times[name] / times["original"]
        if abs(predicted - measured) > _TOLERANCE * measured:
            logger.warning(
                "predicted latency of a plan: %.2f times the original's; measured: %.2f", predicted, measured
            )
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        found.append(Candidate(plan, evaluate(plan), measured, costs.exact, predicted, parameters, evaluate.refitted))
    best = _front({candidate: (candidate.error, candidate.latency) for candidate in found})
    return sorted(best, key=lambda candidate: candidate.error)


def _front(points: Mapping[Any, tuple[float, float]]) -> list[Any]:
    """The points that no other point beats in one number without being worse in the other."""
    return [
        one
        for one, (error, time) in points.items()
        if not any(e <= error and t <= time and (e, t) != (error, time) for e, t in points.values())
    ]


def _times(
    models: Mapping[str, nn.Module], batch: Mapping[str, Any], *, precision: float = _PRECISION
) -> dict[str, float]:
    """Median seconds of a forward pass of each model, measured in turns."""
    device = next(value for value in batch.values() if isinstance(value, Tensor)).device.type
    calls = {name: functools.partial(model, **batch) for name, model in models.items()}
    with in_evaluation_mode(*models.values()):
        timed = time_interleaved(calls, repeats=_REPEATS, warmup=2, precision=precision, device=device)
    return {name: latency.median for name, latency in timed.items()}


def _size(batch: Mapping[str, Any]) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)
