"""Options, what was measured of them, and which one is recommended."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mapreuse.console import Table
from mapreuse.plan import ReusePlan

METRICS = {
    "cosine": "1 − mean cosine between outputs and the original's",
    "relative": "‖output − original‖ / ‖original‖",
}
"""Names of the metrics, and what they measure on held-out calibration batches."""

_SAME_LATENCY = 1.03
"""Of options that are as fast as the fastest up to this factor, the simplest is recommended."""


@dataclass(frozen=True)
class Option:
    """One way to run a model.

    Attributes:
        dropped: layers that are removed (see `drop_layers`).
        plan: plan in force, or None.
        optimized: `optimize` is called.
        runtime: "openvino" or "onnx" if the model is exported; "" for PyTorch.
        int8: the export is quantised to 8 bits.
    """

    dropped: tuple[int, ...] = ()
    plan: ReusePlan | None = None
    optimized: bool = False
    runtime: str = ""
    int8: bool = False

    @property
    def name(self) -> str:
        """Name in tables, such as "OpenVINO int8, without layers 2, 3"."""
        words = {"": "PyTorch", "openvino": "OpenVINO", "onnx": "ONNX Runtime"}[self.runtime]
        words += " int8" * self.int8 + " + optimize" * self.optimized
        if self.dropped:
            words += f", without layer{'s' * (len(self.dropped) > 1)} {', '.join(map(str, self.dropped))}"
        if self.plan is not None and self.plan.is_full:
            words += ", kernels of mapreuse"
        elif self.plan is not None:
            number = self.plan.num_heads or 1
            heads = [source for layer in range(self.plan.num_layers) for source in self.plan.heads(layer, number)]
            words += f", {sum(source is not None for source in heads) / len(heads):.0%} of the heads reuse maps"
        return words

    @property
    def shares(self) -> bool:
        """Whether layers share maps."""
        return self.plan is not None and not self.plan.is_full

    def commands(self, model: str = "MODEL", calibration: str = "DATA", out: str = "OUT") -> list[str]:
        """The commands that make this option of a model directory, and the Python line that opens it."""
        lines, given = [], model
        last = out if not self.runtime else f"{out}-pytorch"
        if self.dropped:
            layers = ",".join(map(str, self.dropped))
            lines.append(shlex.join(["mapreuse", "drop", given, "--layers", layers, "--out", last]))
            given = last
        if self.plan is not None and self.shares:
            plan = self.plan.to_json()
            lines.append(
                shlex.join(
                    ["mapreuse", "convert", given, "--calibration", calibration, "--out", last, "--plan", plan]
                )
            )
            given = last
        if self.runtime:
            export = ["mapreuse", "export", given, "--calibration", calibration, "--out", out]
            lines.append(shlex.join([*export, "--runtime", self.runtime, *["--int8"] * self.int8]))
            return lines
        opened = f"{'mapreuse.load' if self.shares else 'AutoModel.from_pretrained'}({given!r})"
        if self.plan is not None and self.plan.is_full:
            opened = f"mapreuse.apply({opened}, mapreuse.ReusePlan.full({self.plan.num_layers}))"
        return [*lines, f"in Python: model = {f'mapreuse.optimize({opened})' if self.optimized else opened}"]


@dataclass(frozen=True)
class MeasuredOption:
    """An option and what it costs.

    Attributes:
        option: the option.
        error: error of its outputs on held-out batches, by the metric of the advice.
        latency: time of a forward pass, divided by the original's.
        seconds: that time.
        model: the model in PyTorch, without `optimize`: the one to save or to export.
    """

    option: Option
    error: float
    latency: float
    seconds: float
    model: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class Advice:
    """Measured options, from the simplest to the most complex.

    Attributes:
        options: what was measured, the original first.
        metric: "cosine" or "relative".
        max_error: the limit of the recommendation.
        threads: CPU threads of all options.
        notes: options that could not be measured, and why.
        interrupted: the measurements were stopped, and some options are missing.
    """

    options: tuple[MeasuredOption, ...]
    metric: str
    max_error: float
    threads: int
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def pareto(self) -> tuple[MeasuredOption, ...]:
        """The options that no other one beats in both error (to four decimals) and latency, from the least error."""

        def beats(one: MeasuredOption, other: MeasuredOption) -> bool:
            a, b = (round(one.error, 4), one.latency), (round(other.error, 4), other.latency)
            return a != b and a[0] <= b[0] and a[1] <= b[1]

        best = [one for one in self.options if not any(beats(other, one) for other in self.options)]
        return tuple(sorted(best, key=lambda one: (one.error, one.latency)))

    @property
    def recommended(self) -> MeasuredOption:
        """The fastest option within `max_error`; of those that are within 3 % of it, the simplest."""
        within = [one for one in self.options if one.error <= self.max_error or one.option == Option()]
        fastest = min(one.latency for one in within)
        return next(one for one in within if one.latency <= fastest * _SAME_LATENCY)

    def table(self) -> Table:
        """All options, with the Pareto set and the recommendation marked."""
        best, chosen = self.pareto, self.recommended
        rows = [
            [
                one.option.name,
                f"{one.error:.4f}",
                f"{1 / one.latency:.2f}×",
                f"{1000 * one.seconds:.3g} ms",
                "recommended" if one is chosen else "Pareto" if one in best else "",
            ]
            for one in self.options
        ]
        header = ["option", f"error ({self.metric})", "speed-up", "latency", ""]
        title = f"Options that need no training, {self.threads} CPU thread{'s' * (self.threads > 1)}"
        notes = [
            f"Error: {METRICS[self.metric]}, on held-out calibration data. Speed-up: over the model as it is. "
            "Pareto: no other option is better in both."
        ]
        notes += ["Interrupted: some options are missing."] * self.interrupted
        return Table(title, header, rows, [*notes, *self.notes])

    def lines(self, model: str = "MODEL", calibration: str = "DATA", out: str = "OUT") -> list[str]:
        """The recommendation and its commands."""
        chosen = self.recommended
        lines = [
            f"Recommended at an error of at most {self.max_error:g}: {chosen.option.name} "
            f"({1 / chosen.latency:.2f}×, error {chosen.error:.4f})",
            *(f"  {line}" for line in chosen.option.commands(model, calibration, out)),
        ]
        tried = any(one.option.shares for one in self.options)
        if not chosen.option.shares and (tried or not self.interrupted):
            sharing = [one for one in self.options if one.option.shares and one.error <= self.max_error]
            best = min(sharing, key=lambda one: one.latency, default=None)
            lines.append(
                "No plan with shared maps is within the limit."
                if best is None
                else f"Sharing maps is not the best choice here: {best.option.name} has {1 / best.latency:.2f}×."
            )
        return lines

    def data(self) -> dict[str, Any]:
        """JSON-compatible results."""
        chosen, best = self.recommended, self.pareto
        options = [
            {
                "name": one.option.name,
                "dropped": list(one.option.dropped),
                "plan": None if one.option.plan is None else one.option.plan.to_json(),
                "optimized": one.option.optimized,
                "runtime": one.option.runtime,
                "int8": one.option.int8,
                "error": one.error,
                "latency": one.latency,
                "seconds": one.seconds,
                "pareto": one in best,
                "recommended": one is chosen,
            }
            for one in self.options
        ]
        described = {"metric": self.metric, "max_error": self.max_error, "threads": self.threads}
        return {
            "schema": 1,
            **described,
            "interrupted": self.interrupted,
            "notes": list(self.notes),
            "options": options,
        }
