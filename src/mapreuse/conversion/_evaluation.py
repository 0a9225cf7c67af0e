"""The error of a plan: converted, refitted, judged, and remembered."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mapreuse.conversion._refit import refit_layers
from mapreuse.conversion._refits import Refits
from mapreuse.conversion._targets import Wanted
from mapreuse.models import apply
from mapreuse.plan import ReusePlan

_SAME = 1e-2
"""How near two errors of one plan are by one judge, relatively: another library rounds otherwise."""

_KEPT_BYTES = 2**27
"""Of layers as other plans' refits left them."""

_START = '{"search": '
"""Of a line, also of one that was cut short."""


class Judged:
    """The error of a plan after `apply` and `refit`; every plan is judged once, also over several processes by a file.
    What plans have in common up to a layer is refitted once, as long as it is remembered.

    What the file says counts where it is of the same `identity` and of the same judge, who is told by the error of
    the first plan: that one is judged in any case.

    Args:
        original: a trained model that `apply` accepts; it is left as it is.
        batches: calibration batches for `refit`.
        judge: the error of a converted model.
        cache: a file to which every judged plan is written, one JSON object a line.
        identity: of the model and the batches.

    Raises:
        ValueError: where the cache cannot be read or written, or holds anything else, which is then left as it is;
            or where an error is not finite.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        judge: Callable[[nn.Module], float],
        cache: Path | None = None,
        identity: str = "",
    ) -> None:
        self._original, self._batches, self._judge = original, batches, judge
        self._path, self._identity = cache, identity
        self._entries = [] if cache is None else _entries(cache)
        self._errors: dict[ReusePlan, float] = {}
        self._refits = Refits(_KEPT_BYTES)
        self._first: tuple[str, float] | None = None
        self._of_original = self._error_of(original)

    def __call__(self, plan: ReusePlan) -> float:
        """The error of a plan."""
        if plan.is_full:
            return self._of_original
        if plan not in self._errors:
            error = self._error_of(self.refitted(plan))
            if self._first is None:
                self._first = plan.to_json(), error
                self._recall()
            if plan not in self._errors:
                self._errors[plan] = error
                self._write(plan)
        return self._errors[plan]

    def refitted(self, plan: ReusePlan) -> nn.Module:
        """A copy of the original, after `apply` and `refit`."""
        model = apply(copy.deepcopy(self._original), plan)
        refit_layers(model, self._wanted, self._refits)
        return model

    @functools.cached_property
    def _wanted(self) -> Wanted:
        return Wanted(self._original, self._batches)

    def _error_of(self, model: nn.Module) -> float:
        error = float(self._judge(model))
        if not math.isfinite(error):
            raise ValueError(f"the error that the judge finds must be finite, got {error}")
        return error

    def _recall(self) -> None:
        """Take the errors that the file holds of the same plans by the same judge."""
        assert self._first is not None
        plan, error = self._first
        for entry in self._entries:
            first, of_first = entry["first"]
            if entry["search"] == self._identity and first == plan and math.isclose(of_first, error, rel_tol=_SAME):
                self._errors[ReusePlan.from_json(entry["plan"])] = float(entry["error"])

    def _write(self, plan: ReusePlan) -> None:
        if self._path is not None:
            entry = {"search": self._identity, "first": self._first, "plan": plan.to_json()}
            with self._path.open("a") as file:
                file.write(json.dumps(entry | {"error": self._errors[plan]}) + "\n")


def _entries(path: Path) -> list[dict[str, Any]]:
    """What is written in a cache, which may not be there yet; a line that was cut short is removed from it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file that a search could keep its plans in: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    found, rest = [], text[len(whole) :]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            ReusePlan.from_json(entry["plan"]), float(entry["error"]), entry["search"]
            (_, of_first) = entry["first"]
            float(of_first)
        except (KeyError, TypeError, ValueError) as damage:
            raise ValueError(
                f"{path}, line {number}: not a judged plan of this version ({damage}); name another cache"
            ) from None
        found.append(entry)
    if rest:
        if not (rest.startswith(_START) or _START.startswith(rest)):
            raise ValueError(f"{path}, line {len(found) + 1}: not a judged plan; name another cache")
        os.truncate(path, len(whole.encode()))
    return found
