"""The error of a converted model, and of plans after conversion and refit."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.conversion._refit import RefitCache, refit_layers
from mapreuse.conversion._targets import Targets
from mapreuse.models import apply, not_padding, optimized, recorded_states, with_projections
from mapreuse.plan import ReusePlan

_SAME_ERROR = 1e-2
"""Relative tolerance for two errors of the same plan: another linear algebra library rounds differently."""

_MAX_BYTES = 2**27
"""Size of the cache of refitted layers."""


def hidden_state_error(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[nn.Module], float]:
    """Make a function that gives the error of a converted model's last hidden states.

        error = 1 − mean of cos(h, h°)

    with h and h° the states of the converted and the original model after the last layer. The mean is over all
    positions except padding. Errors are between 0 (equal) and 2. This function and the one it returns raise
    `ValueError` if states are not finite.
    """
    batches = list(batches)

    @torch.no_grad()
    def last_states(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found = []
        model = with_projections(model)
        with in_evaluation_mode(model), optimized(model):
            for batch in batches:
                with recorded_states(model) as (states, masks):
                    model(**batch)
                rows = not_padding(masks[0], states[-1])
                if not bool(torch.isfinite(states[-1][rows]).all()):
                    raise ValueError(
                        f"{type(model).__name__}: its last hidden states are not finite; check its weights and the "
                        "calibration batches"
                    )
                found.append((states[-1], rows))
        return found

    targets = last_states(original)

    def error(model: nn.Module) -> float:
        pairs = zip(last_states(model), targets, strict=True)
        cosines = torch.cat(
            [
                functional.cosine_similarity(states[rows], target[rows], dim=-1)
                for (states, _), (target, rows) in pairs
            ]
        )
        return max(0.0, 1 - float(cosines.double().mean()))  # rounding can make the mean exceed 1

    return error


class PlanEvaluator:
    """The error of a plan after `apply` and `refit`. Each plan is evaluated once.

    Plans that begin with the same layers share the refit of these. With a `cache`, errors of earlier runs with the
    same `identity` and metric are used. Two metrics are the same if they agree on the first plan, which is always
    evaluated.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches for `refit`.
        metric: the error of a converted model.
        cache: a file of evaluated plans, one JSON object per line. New plans are added.
        identity: identifies the model and the batches.

    Raises:
        ValueError: if the cache cannot be read or has other content, or an error is not finite.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        metric: Callable[[nn.Module], float],
        cache: str | Path | None = None,
        identity: str = "",
    ) -> None:
        self._original, self._batches, self._metric = original, batches, metric
        self._path, self._identity = None if cache is None else Path(cache), identity
        self._entries = [] if self._path is None else _read_entries(self._path)
        self._errors: dict[ReusePlan, float] = {}
        self._refits = RefitCache(_MAX_BYTES)
        self._first: tuple[str, float] | None = None
        self._original_error = self._evaluate(original)

    def __call__(self, plan: ReusePlan) -> float:
        """The error of a plan."""
        if plan.is_full:
            return self._original_error
        if plan not in self._errors:
            error = self._evaluate(self.refitted(plan))
            if self._first is None:
                self._first = plan.to_json(), error
                self._errors = self._cached_errors(*self._first)
            if plan not in self._errors:
                self._errors[plan] = error
                if self._path is not None:
                    entry = {"search": self._identity, "first": self._first, "plan": plan.to_json(), "error": error}
                    self._entries.append(entry)
                    text = "".join(json.dumps(one) + "\n" for one in self._entries)
                    partial = self._path.with_name(f"{self._path.name}.partial")
                    partial.write_text(text)
                    partial.replace(self._path)
        return self._errors[plan]

    def refitted(self, plan: ReusePlan) -> nn.Module:
        """A copy of the original after `apply` and `refit`."""
        model = apply(copy.deepcopy(self._original), plan)
        refit_layers(model, self._targets, self._refits)
        return model

    @functools.cached_property
    def _targets(self) -> Targets:
        return Targets(self._original, self._batches)

    def _evaluate(self, model: nn.Module) -> float:
        error = float(self._metric(model))
        if not math.isfinite(error):
            raise ValueError(f"the metric must be finite, got {error}")
        return error

    def _cached_errors(self, plan: str, error: float) -> dict[ReusePlan, float]:
        """Cached errors, if the first plan has this error under the current metric."""
        return {
            ReusePlan.from_json(entry["plan"]): float(entry["error"])
            for entry in self._entries
            if entry["search"] == self._identity
            and entry["first"][0] == plan
            and math.isclose(entry["first"][1], error, rel_tol=_SAME_ERROR)
        }


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a cache file; none if there is no file yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the cache of a search ({error}); choose another file") from None
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict) or set(entry) != {"search", "first", "plan", "error"}:
            raise ValueError(f"{path}, line {number}: not an evaluated plan; choose another file as cache")
    return found
