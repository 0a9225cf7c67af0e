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

from mapreuse.console import one_line
from mapreuse.conversion._kept_work import write_atomically
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

    Plans that begin with the same layers share the refit of these. With a `cache`, errors and refits of earlier runs
    with the same metric are used. Two metrics are the same if they agree on the first plan, which is always
    evaluated.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches for `refit`.
        metric: the error of a converted model.
        cache: folder of this model and these batches, for evaluated plans and refitted layers.

    Raises:
        ValueError: if the cache cannot be read or has other content, or an error is not finite.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        metric: Callable[[nn.Module], float],
        cache: Path | None = None,
    ) -> None:
        self._original, self._batches, self._metric = original, batches, metric
        self._file = None if cache is None else cache / "plans.jsonl"
        self._entries = [] if self._file is None else _read_entries(self._file)
        self._errors: dict[ReusePlan, float] = {}
        self._refits = RefitCache(_MAX_BYTES, None if cache is None else cache / "refits")
        self._first: tuple[str, float] | None = None
        self._original_error = self._evaluate(original)

    def __call__(self, plan: ReusePlan) -> float:
        """The error of a plan."""
        if plan.is_full:
            return self._original_error
        if plan not in self._errors:
            try:
                error = self._evaluate(self.refitted(plan))
            except KeyboardInterrupt as stop:
                if self._file is not None:
                    stop.add_note(f"{len(self._entries)} evaluated plans are kept, the first is evaluated again")
                raise
            if self._first is None:
                self._first = plan.to_json(), error
                self._errors = self._cached_errors(*self._first)
            if plan not in self._errors:
                self._errors[plan] = error
                self._entries.append({"first": self._first, "plan": plan.to_json(), "error": error})
                if self._file is not None:
                    text = "".join(json.dumps(one) + "\n" for one in self._entries)
                    write_atomically(self._file, lambda partial: partial.write_text(text))
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
            if entry["first"][0] == plan and math.isclose(entry["first"][1], error, rel_tol=_SAME_ERROR)
        }


def _read_entries(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of evaluated plans; none if there is no file yet."""
    try:
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); delete it") from None
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict) or set(entry) != {"first", "plan", "error"}:
            raise ValueError(f"{file}, line {number}: not an evaluated plan; delete the file")
    return found
