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

from mapreuse.console import check_number, progress_bar
from mapreuse.conversion._align import Head
from mapreuse.conversion._evaluation import PlanEvaluator, hidden_state_error
from mapreuse.conversion._kept_work import folder_in, identity_of, kept_json
from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.conversion._search_heuristic import SearchHeuristic
from mapreuse.conversion._validation import checked_batches, digest
from mapreuse.data import check_precision
from mapreuse.measure import machine, time_interleaved
from mapreuse.models import apply, check_batch, copy_with_same_weights, plan_of
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

MIN_SEARCH_BATCHES = 8
"""Three of four batches calibrate, one evaluates."""

_REPEATS = 7
"""Timed passes of each model; more if times vary."""

_PRECISION, _COST_PRECISION = 0.02, 0.05
"""Relative standard error of reported times, and of times that only guide the search."""

_UNREACHABLE = "no plan has a latency of {} times the original's: with all maps shared it is {:.2f}"

_TOLERANCE = 0.1
"""Relative deviation of the cost model from a measurement above which a warning is logged."""


@dataclass(frozen=True)
class Candidate:
    """A plan that a search found.

    Attributes:
        plan: the plan, head by head.
        error: held-out error after `apply` and `refit`.
        latency: time of a forward pass, divided by the original's.
        exact_latency: the same for a plan that reuses nothing.
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
        """A copy of the original under this plan, refitted as in the search.

        The candidate refers to the original, which must not change, to the calibration batches and to up to 400 MB of
        cached activations.
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

    A plan is a set of heads that reuse. Each of them applies the map that changes its layer's output least (see
    `align`), among the heads of earlier layers that compute. A greedy search extends the set until the budget is met.
    An extension adds all heads of a layer, or the half or full number of a layer's heads chosen from all layers. In
    each step, the `breadth` extensions with the best predicted ratio of error to saved time are converted, refitted
    and evaluated (see `SearchHeuristic`). The best one is extended further.

    A cost model of three timed plans guides the search. Finally the returned plans are timed in turns with the
    original. Only these measurements decide about a budget of latency. Deviations of more than 10 % from the cost
    model are logged. To compare optimised models, apply `mapreuse.optimize` to the original before the search.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least eight. Every fourth batch is for evaluation, the others for `refit`.
        latency: stop at a plan with at most this latency, relative to the original's. Give this or `error`.
        error: stop when every extension has a greater error.
        metric: the error of a converted model, 0 for the original. None: `hidden_state_error` on the held-out
            batches.
        timed: the batch to time, such as one of the size used in production. None: the calibration batch of median
            size.
        breadth: number of extensions evaluated in each step.
        cache: a directory for what the search learns: compared maps, evaluated plans, refitted layers and times. The
            same search continues from it after an interrupt. It evaluates its first plan again, and times the plans
            that it returns.

    Returns:
        The plans that no other plan beats in both error and latency, from the least error to the least latency.

    Raises:
        ValueError: unless exactly one budget is given, if no plan meets it, there are too few batches, the model has
            a plan already, is in half precision on a CPU or unsupported, or the cache cannot be used.
    """
    if (latency is None) == (error is None):
        raise ValueError("give exactly one budget: latency=0.7 (relative to the original's) or error=0.02")
    if latency is not None:
        check_number("latency, relative to the original's,", latency, 0, 1, exclusive=True)
    if error is not None:
        check_number("error", error, 0)
    check_number("breadth", breadth, 1, whole=True)
    check_precision(original)
    if plan_of(original) is not None:
        raise ValueError("the model shares attention maps already; search plans for the original model instead")
    given = checked_batches(batches, MIN_SEARCH_BATCHES, "search")
    if timed is not None:
        check_batch(timed)
    if metric is not None and not callable(metric):
        raise ValueError(f"metric must be a function of a model, got {metric!r}")
    calibration, evaluation = split_batches(given)
    metric = metric or hidden_state_error(original, evaluation)
    batch = timed or _of_median_size(given)
    folder = None if cache is None else folder_in(cache, identity_of(original, given))
    evaluate = PlanEvaluator(original, calibration, metric, folder)
    heuristic = SearchHeuristic(original, calibration, evaluate, folder)
    precision = _COST_PRECISION if latency is None else _PRECISION
    costs = _CostModel(original, batch, heuristic, precision=precision, cache=folder)
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
            prices = {e: _price(costs, reusing, e, evaluate(visited[reusing]), evaluate(within[e])) for e in within}
            reusing = min(prices, key=prices.__getitem__)
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
    """Times of the models' forward passes on the batch of median size, divided by the original's."""
    times = _times({"": original} | dict(models), _of_median_size(batches))
    return {name: times[name] / times[""] for name in models}


def _of_median_size(batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    def size(batch: Mapping[str, Any]) -> int:
        return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)

    return sorted(batches, key=size)[len(batches) // 2]


def _price(
    costs: _CostModel, old: frozenset[Head], new: frozenset[Head], old_error: float, new_error: float
) -> float:
    """The growth of the error per saved time."""
    return (new_error - old_error) / max(costs.of(old) - costs.of(new), 1e-6)


def _extensions(heuristic: SearchHeuristic, reusing: frozenset[Head], costs: _CostModel) -> list[frozenset[Head]]:
    """Larger sets of reusing heads, ordered by predicted growth of the error per saved time."""
    found = [reusing | heuristic.heads(layer) for layer in heuristic.sources]
    if heuristic.partial:
        half = heuristic.grown(reusing, heuristic.num_heads // 2)
        found += [half, heuristic.grown(half, heuristic.num_heads - heuristic.num_heads // 2)]
    error = heuristic.predicted(reusing)
    prices = {e: _price(costs, reusing, e, error, heuristic.predicted(e)) for e in found if e != reusing}
    return sorted(prices, key=prices.__getitem__)


class _CostModel:
    """Predicts the latency of a plan from the number of reusing heads in each layer.

    Three plans are timed together with the original: no head, all heads, or half of the heads of each layer reuse.
    """

    def __init__(
        self,
        original: nn.Module,
        batch: Mapping[str, Any],
        heuristic: SearchHeuristic,
        *,
        precision: float,
        cache: Path | None = None,
    ) -> None:
        heads = range(heuristic.num_heads)
        plans = {"none": frozenset[Head](), "all": heuristic.all}
        if heuristic.partial:
            plans["half"] = frozenset((layer, head) for layer in heuristic.sources for head in heads[1::2])
        self._original = original
        self._plans = {name: heuristic.plan(heads) for name, heads in plans.items()}
        self._num_heads, self._num_reusing_layers = heuristic.num_heads, len(heuristic.sources)
        self.calibrate(
            kept_json(
                None if cache is None else cache / "times.json",
                [digest([batch]), precision, machine()],
                lambda: _times({"original": original} | self.models(), batch, precision=precision),
            )
        )

    def models(self) -> dict[str, nn.Module]:
        """New models under the three plans. They take memory only while they are timed."""
        return {name: apply(copy_with_same_weights(self._original), plan) for name, plan in self._plans.items()}

    def calibrate(self, times: Mapping[str, float]) -> None:
        """Set the parameters from times of the original and of the three plans."""
        self.exact = times["none"] / times["original"]
        self._saved = {
            name: (times["none"] - times[name]) / times["original"] / self._num_reusing_layers
            for name in ("all", "half")
            if name in times
        }

    def of(self, reusing: frozenset[Head]) -> float:
        """Predicted relative latency of the plan with these reusing heads."""
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
    """Time the plans that no other plan beats, and calibrate the cost model in the same run."""
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
    """The points that no other point beats: equal or better in both numbers, and better in one."""
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
