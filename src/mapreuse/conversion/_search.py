"""Search for plans: which layers, and which heads, should share maps?"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from mapreuse.console import check_number, progress_bar
from mapreuse.conversion._evaluation import PlanEvaluator, hidden_state_error
from mapreuse.conversion._kept_work import folder_in, identity_of, kept_json
from mapreuse.conversion._language_errors import copying_error, perplexity_error
from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.conversion._search_heuristic import SearchHeuristic
from mapreuse.conversion._share_mode_heuristic import ShareModeHeuristic, example_of
from mapreuse.conversion._validation import checked_batches, digest
from mapreuse.data import check_precision
from mapreuse.measure import machine, time_interleaved
from mapreuse.models import apply, cache_bytes, check_batch, copy_with_same_weights, keeps_cache, plan_of
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

MIN_SEARCH_BATCHES = 8
"""Three of four batches calibrate, one evaluates."""

METRICS = {"cosine": hidden_state_error, "perplexity": perplexity_error, "copying": copying_error}
"""Metrics by their names: functions of the original and of batches that make a function of a converted model."""

Reusing: TypeAlias = frozenset[Any]
"""What reuses under a plan: heads in a search for maps, else layers with their share modes."""

_REPEATS = 7
"""Timed passes of each model; more if times vary."""

_PRECISION, _COST_PRECISION = 0.02, 0.05
"""Relative standard error of reported times, and of times that only guide the search."""

_UNREACHABLE = "no plan has {} {} times the original's: the minimum is {:.2f}"
_COSTS = {"latency": "a latency of", "cache_bytes": "cache bytes of"}

_TOLERANCE = 0.1
"""Relative deviation of the cost model from a measurement above which a warning is logged."""


@dataclass(frozen=True)
class Candidate:
    """A plan that a search found.

    Attributes:
        plan: the plan.
        error: held-out error after `apply` and `refit`.
        latency: time of a forward pass, divided by the original's.
        exact_latency: the same for a plan that reuses nothing.
        predicted_latency: `latency` according to the cost model.
        parameters: number of parameters of the converted model.
        cache_bytes: bytes that a decoder caches for each token, divided by the original's; None for an encoder.
    """

    plan: ReusePlan
    error: float
    latency: float
    exact_latency: float
    predicted_latency: float
    parameters: int
    cache_bytes: float | None
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
    cache_bytes: float | None = None,
    share: str | Sequence[str] = "map",
    keys: int | None = None,
    window: int | None = None,
    block: int | None = None,
    rank: int | None = None,
    metric: str | Callable[[nn.Module], float] | None = None,
    timed: Mapping[str, Any] | None = None,
    breadth: int = 4,
    cache: str | Path | None = None,
) -> list[Candidate]:
    """Search for plans with little error for the time or the cache that they save.

    A greedy search extends a plan until the budget is met. In each step, the `breadth` extensions with the best
    predicted ratio of error to saving are converted, refitted and evaluated. The best one is extended further.

    With `share="map"`, a plan is a set of heads that reuse. Each of them applies the map that changes its layer's
    output least (see `align`), among the heads of earlier layers that compute. An extension adds all heads of a
    layer, or the half or full number of a layer's heads chosen from all layers (see `SearchHeuristic`).

    With other or several share modes, whole layers reuse, each by one of the modes and from one source. In the order
    of layers, each takes the source that changes its output least, among the earlier layers that compute and have no
    reader of another mode. An extension lets one more layer reuse, or changes the mode of all readers of one source,
    and must save something (see `ShareModeHeuristic`).

    Savings are predicted: bytes of the cache exactly, and latencies by a cost model of a few timed plans. Finally the
    returned plans are timed in turns with the original. Only these measurements decide about a budget of latency.
    Deviations of more than 10 % from the cost model are logged. To compare optimised models, apply
    `mapreuse.optimize` to the original before the search.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least eight, as long as the model's inputs will be. Every fourth batch is for
            evaluation, the others for `refit`.
        latency: stop at a plan with at most this latency, relative to the original's. Give this or another budget.
        error: stop when every extension has a greater error.
        cache_bytes: stop at a plan under which a decoder caches at most this many bytes for each token, relative to
            the original's. In share mode "keys" they stay the same.
        share: the share modes to choose from, "map", "keys" or "corrected": one or several.
        keys, window, block, rank: settings of the share modes, as for `ReusePlan`.
        metric: the error of a converted model, 0 for the original: a function of the model, or "cosine"
            (`hidden_state_error`), "perplexity" (`perplexity_error`) or "copying" (`copying_error`) on the held-out
            batches. None: "cosine".
        timed: the batch to time, such as one of the size used in production. None: the calibration batch of median
            size.
        breadth: number of extensions evaluated in each step.
        cache: a directory for what the search learns: compared maps, evaluated plans, refitted layers and times. The
            same search continues from it after an interrupt. It evaluates its first plan again, and times the plans
            that it returns.

    Returns:
        The plans that no other plan beats in both error and latency, from the least error to the least latency. Under
        a budget of cache bytes, these take the place of latency.

    Raises:
        ValueError: unless exactly one budget is given, if no plan meets it, a share mode, setting or metric is not
            valid, there are too few batches, the model has a plan already, keeps no cache that a budget is for, is in
            half precision on a CPU or unsupported, does not serve a share mode, or the cache cannot be used.
    """
    limits = {"latency": latency, "cache_bytes": cache_bytes}
    budgets = {name: one for name, one in (limits | {"error": error}).items() if one is not None}
    if len(budgets) != 1:
        raise ValueError(
            "give exactly one budget: latency=0.7 or cache_bytes=0.8 (relative to the original's) or error=0.02; "
            f"got {', '.join(budgets) or 'none'}"
        )
    for name, number in limits.items():
        if number is not None:
            check_number(f"{name}, relative to the original's,", number, 0, 1, exclusive=True)
    if error is not None:
        check_number("error", error, 0)
    check_number("breadth", breadth, 1, whole=True)
    modes = (share,) if isinstance(share, str) else tuple(share)
    settings = {"keys": keys, "window": window, "block": block, "rank": rank}
    example_of(modes, **settings)
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} or a function of a model, got {metric!r}")
    if metric is not None and not (isinstance(metric, str) or callable(metric)):
        raise ValueError(f"metric must be a function of a model, got {metric!r}")
    check_precision(original)
    if plan_of(original) is not None:
        raise ValueError("the model shares attention maps already; search plans for the original model instead")
    bytes_of = _relative_cache_bytes(original)
    if cache_bytes is not None and bytes_of(None) is None:
        raise ValueError(f"{type(original).__name__} keeps no cache; give a budget of latency or error")
    given = checked_batches(batches, MIN_SEARCH_BATCHES, "search")
    if timed is not None:
        check_batch(timed)
    calibration, evaluation = split_batches(given)
    if metric is None or isinstance(metric, str):
        metric = METRICS[metric or "cosine"](original, evaluation)
    batch = timed or _of_median_size(given)
    folder = None if cache is None else folder_in(cache, identity_of(original, given))
    evaluate = PlanEvaluator(original, calibration, metric, folder)
    heuristic: SearchHeuristic | ShareModeHeuristic
    if modes == ("map",):
        heuristic = SearchHeuristic(original, calibration, evaluate, folder)
    else:
        heuristic = ShareModeHeuristic(original, calibration, evaluate, folder, share=modes, **settings)
    precision = _COST_PRECISION if latency is None else _PRECISION
    costs = _CostModel(original, batch, heuristic, precision=precision, cache=folder)
    budget, limit = next(iter(budgets.items()))
    kind = "latency" if budget == "error" else budget

    def cost(reusing: Reusing) -> float:
        return costs.of(reusing) if kind == "latency" else bytes_of(heuristic.plan(reusing)) or 0.0

    def measured() -> tuple[list[Candidate], float]:
        """The best plans, and the minimum of their costs."""
        found = _measured(original, visited, evaluate, costs, cost, bytes_of, batch, kind)
        return found, min(getattr(candidate, kind) for candidate in found)

    least = min(map(cost, heuristic.timed.values()))
    if budget != "error" and least > limit * (1 + (_TOLERANCE if kind == "latency" else 0)):
        raise ValueError(_UNREACHABLE.format(_COSTS[kind], limit, least))
    reusing: Reusing = frozenset()
    visited = {reusing: heuristic.plan(reusing)}
    with progress_bar("searching") as progress:
        while True:
            if budget != "error" and cost(reusing) <= limit:
                found, least = measured()
                if least <= limit:
                    return found
            extensions = {e: heuristic.plan(e) for e in _extensions(heuristic, reusing, cost)[:breadth]}
            for plan in extensions.values():
                evaluate(plan)
            within = {e: plan for e, plan in extensions.items() if budget != "error" or evaluate(plan) <= limit}
            visited |= within
            if not within:
                break
            prices = {e: _price(cost, reusing, e, evaluate(visited[reusing]), evaluate(within[e])) for e in within}
            reusing = min(prices, key=prices.__getitem__)
            description = f"searching: error {evaluate(visited[reusing]):.4f} at {cost(reusing):.2f} of the {kind}"
            progress(description, len(reusing), heuristic.size)
    found, least = measured()
    if budget != "error" and least > limit:
        raise ValueError(_UNREACHABLE.format(_COSTS[kind], limit, least))
    return found


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


def _price(cost: Callable[[Reusing], float], old: Reusing, new: Reusing, old_error: float, new_error: float) -> float:
    """The growth of the error per saved time or byte."""
    return (new_error - old_error) / max(cost(old) - cost(new), 1e-6)


def _extensions(
    heuristic: SearchHeuristic | ShareModeHeuristic, reusing: Reusing, cost: Callable[[Reusing], float]
) -> list[Reusing]:
    """Extended plans, ordered by predicted growth of the error per saved time or byte."""
    found: list[Reusing] = list(heuristic.extensions(reusing))
    if isinstance(heuristic, ShareModeHeuristic):
        found = [one for one in found if cost(one) < cost(reusing)]
    if not found:
        return []
    error = heuristic.predicted(reusing)
    prices = {e: _price(cost, reusing, e, error, heuristic.predicted(e)) for e in found}
    return sorted(prices, key=prices.__getitem__)


def _relative_cache_bytes(original: nn.Module) -> Callable[[ReusePlan | None], float | None]:
    """A function of a plan: the bytes that a decoder caches for each token, divided by the original's."""
    if not keeps_cache(original):
        return lambda plan: None

    @functools.cache
    def of(plan: ReusePlan | None) -> float:
        found = cache_bytes(original, plan)
        return sum(found.layers) / sum(found.unshared)

    return of


class _CostModel:
    """Predicts the latency of a plan from the number of layers and heads that reuse.

    The largest plans of each kind are timed together with the original and with the plan that shares nothing. In a
    search for maps, all heads reuse, or half of the heads of each layer; else, all layers by one share mode.
    """

    def __init__(
        self,
        original: nn.Module,
        batch: Mapping[str, Any],
        heuristic: SearchHeuristic | ShareModeHeuristic,
        *,
        precision: float,
        cache: Path | None = None,
    ) -> None:
        self._original, self._heuristic = original, heuristic
        timed: dict[str, Any] = {"none": frozenset()} | dict(heuristic.timed)
        self._plans = {name: heuristic.plan(reusing) for name, reusing in timed.items()}
        described = [digest([batch]), precision, machine(), [plan.to_json() for plan in self._plans.values()]]
        self.calibrate(
            kept_json(
                None if cache is None else cache / "times.json",
                described,
                lambda: _times({"original": original} | self.models(), batch, precision=precision),
            )
        )

    def models(self) -> dict[str, nn.Module]:
        """New models under these plans. They take memory only while they are timed."""
        return {name: apply(copy_with_same_weights(self._original), plan) for name, plan in self._plans.items()}

    def calibrate(self, times: Mapping[str, float]) -> None:
        """Set the parameters from times of the original and under these plans."""
        self.exact = times["none"] / times["original"]
        self._saved = {
            name: (times["none"] - times[name]) / times["original"] / self._heuristic.units(reusing)[name]  # type: ignore[arg-type]
            for name, reusing in self._heuristic.timed.items()
        }

    def of(self, reusing: Any) -> float:
        """Predicted relative latency of the plan in which these reuse."""
        return self.exact - sum(self._saved[name] * number for name, number in self._heuristic.units(reusing).items())


def _measured(
    original: nn.Module,
    visited: Mapping[Reusing, ReusePlan],
    evaluate: PlanEvaluator,
    costs: _CostModel,
    cost: Callable[[Reusing], float],
    bytes_of: Callable[[ReusePlan | None], float | None],
    batch: Mapping[str, Any],
    kind: str,
) -> list[Candidate]:
    """Time the plans that no other plan beats, and calibrate the cost model in the same run."""
    reusing = {plan: one for one, plan in visited.items()}
    chosen = _front({plan: (evaluate(plan), cost(one)) for plan, one in reusing.items()})
    names = {plan: "none" if plan.is_full else str(number) for number, plan in enumerate(chosen)}
    models = costs.models()
    models |= {name: apply(copy_with_same_weights(original), plan) for plan, name in names.items() if name != "none"}
    times = _times({"original": original} | models, batch)
    costs.calibrate(times)
    found = []
    for plan, name in names.items():
        predicted, measured = costs.of(reusing[plan]), times[name] / times["original"]
        if abs(predicted - measured) > _TOLERANCE * measured:
            logger.warning(
                "predicted latency of a plan: %.2f times the original's; measured: %.2f", predicted, measured
            )
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        numbers = measured, costs.exact, predicted, parameters, bytes_of(plan)
        found.append(Candidate(plan, evaluate(plan), *numbers, evaluate.refitted))
    best = _front({candidate: (candidate.error, getattr(candidate, kind)) for candidate in found})
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
