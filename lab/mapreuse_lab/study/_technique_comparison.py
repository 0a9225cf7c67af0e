"""Techniques on pretrained models compared with full attention and with reuse, and what follows for each model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mapreuse_lab.models import Metric
from mapreuse_lab.study._statistics import holm

MAIN_METRICS = ("WER", "cosine", "perplexity, all")
"""The metric by which the techniques on a model are ranked: the first of these that it has."""

MAX_LOSS = {"rate": 0.02, "similarity": 0.05, "perplexity": math.log(1.05)}
"""The loss that a recommended technique may have, by kind of metric; of perplexities, the logarithm of the ratio."""

_MIN_SPEED_UP = 1.05
"""Speed-up from which a technique is faster than full attention."""

_LEVEL, _POWER = 0.05, 0.8
_SIMPLE = ("layers-", "int8", "low-rank-", "heads-", "skip-")
"""Beginnings of the names of techniques that need no sharing of maps and no kernel of their own."""


def amounts_text(metric: Metric) -> str:
    """The amount of each test sample, for a JSON file; the units are those of the baseline."""
    return " ".join(f"{amount:.6g}" for amount in metric.sums[:, 0])


def baseline_metrics(results: Mapping[str, Any]) -> list[Metric]:
    """The metrics of the original model in the results of `TechniqueStudy`."""
    return [Metric(one["name"], one["kind"], np.array(one["sums"])) for one in results.get("baseline", ())]


def stages_of(results: Mapping[str, Any]) -> list[str]:
    """The stages that were evaluated: without training, and after recovery."""
    found = {key for row in results["techniques"].values() for key in row if key.startswith(("no ", "recovered"))}
    return sorted(found)


def is_complete(stage: Mapping[str, Any] | None) -> bool:
    """A stage was evaluated, with the amount of each sample; results of earlier versions have means alone."""
    return stage is not None and all("amounts" in one for one in stage.get("metrics", {}).values())


def loss(metric: Metric, full: Metric) -> float:
    """How much worse a metric is than another: positive is worse; of perplexities, the logarithm of the ratio."""
    if metric.kind == "perplexity":
        return math.log(metric.value / full.value)
    return full.value - metric.value if metric.kind == "similarity" else metric.value - full.value


@dataclass
class Evaluated:
    """A technique after one stage.

    Attributes:
        name, title: of the technique.
        stage: "no training", or "recovered, … steps".
        metric: the model's main metric.
        loss: against full attention, as `loss` defines it.
        seconds: of training.
        speed_ups: over full attention, by length; empty if latency was not measured.
        p_full, p_reuse: p-values of the comparisons with full attention and with reuse, corrected for all comparisons
            of the stage; None for the technique itself.
    """

    name: str
    title: str
    stage: str
    metric: Metric
    loss: float
    seconds: float
    speed_ups: dict[str, float]
    p_full: float | None = None
    p_reuse: float | None = None

    @property
    def speed_up(self) -> float:
        """Geometric mean over the lengths."""
        return statistics.geometric_mean(self.speed_ups.values()) if self.speed_ups else 1.0

    @property
    def reuses(self) -> bool:
        """Whether layers share maps, or what matters in them."""
        return "reuse-" in self.name

    @property
    def is_good(self) -> bool:
        """The loss is one that a recommended technique may have."""
        return self.loss <= MAX_LOSS[self.metric.kind]


@dataclass
class Comparison:
    """The techniques on one model.

    Attributes:
        full: the original's main metric.
        reuse: name of the technique that others are compared with, besides full attention: the first plan by which
            whole layers reuse maps.
        techniques: every technique after each stage that it has a result of, in the order of the results.
        comparisons: number of comparisons, stage by stage, that p-values are corrected for.
    """

    full: Metric
    reuse: str
    techniques: list[Evaluated]
    comparisons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Comparison:
        """The comparison that the results of `TechniqueStudy` give."""
        full = next(one for name in MAIN_METRICS for one in baseline_metrics(results) if one.name == name)
        rows = results["techniques"]
        plain = (name for name in rows if name.startswith("reuse-") and "-partial-" not in name)
        made = cls(full, next(plain, "reuse"), [])
        for stage in stages_of(results):
            for name, row in rows.items():
                if is_complete(row.get(stage)) and "metrics" in row[stage]:
                    made.techniques.append(_evaluated(results, name, stage, full))
            made._compare(stage)
        return made

    def _compare(self, stage: str) -> None:
        """Holm-corrected paired tests against full attention and against reuse after the same stage."""
        ours = [one for one in self.techniques if one.stage == stage]
        reuse = next((one for one in ours if one.name == self.reuse), None)
        pairs = [(one, "p_full", self.full) for one in ours if one.name != "full"]
        if reuse is not None:
            pairs += [(one, "p_reuse", reuse.metric) for one in ours if one.name not in ("full", self.reuse)]
        corrected = holm([one.metric.p_value(other) for one, _, other in pairs])
        for (one, name, _), p in zip(pairs, corrected, strict=True):
            setattr(one, name, p)
        self.comparisons[stage] = len(pairs)

    def best_stages(self) -> list[Evaluated]:
        """Each technique after the stage that loses least."""
        found: dict[str, Evaluated] = {}
        for one in self.techniques:
            if one.name not in found or one.loss < found[one.name].loss:
                found[one.name] = one
        return list(found.values())

    def ranked(self) -> list[Evaluated]:
        """Those with a small loss, fastest first; then the others, best first. Full attention is left out."""
        others = [one for one in self.best_stages() if one.name != "full"]
        return sorted(others, key=lambda one: (0, -one.speed_up) if one.is_good else (1, one.loss))

    def detectable(self, techniques: Sequence[Evaluated]) -> float:
        """The smallest difference to full attention that the test detects in 80 % of cases, the median of techniques.

            (z(1 − α / 2m) + z(0.8)) · s

        with α = 0.05, m comparisons and s the bootstrap's standard error of the difference; of perplexities, of the
        logarithm of their ratio.
        """
        normal = statistics.NormalDist()
        found = []
        for one in techniques:
            ends = one.metric.against(self.full)[1]
            low, high = (math.log(end) for end in ends) if one.metric.kind == "perplexity" else ends
            error = (high - low) / (2 * normal.inv_cdf(0.975))
            z = normal.inv_cdf(1 - _LEVEL / 2 / self.comparisons[one.stage]) + normal.inv_cdf(_POWER)
            found.append(z * error)
        return statistics.median(found)


def _evaluated(results: Mapping[str, Any], name: str, stage: str, full: Metric) -> Evaluated:
    row = results["techniques"][name]
    amounts = np.array(row[stage]["metrics"][full.name]["amounts"].split(), dtype=float)
    metric = Metric(full.name, full.kind, np.stack([amounts, full.sums[:, 1]], 1))
    timed = {length: one["techniques"].get(name) for length, one in results.get("latency", {}).items()}
    return Evaluated(
        name,
        row["title"],
        stage,
        metric,
        loss(metric, full),
        row[stage].get("recovery", {}).get("seconds", 0.0),
        {length: one["speed-up"]["median"] for length, one in timed.items() if one},
    )


def verdict_sentence(model: str, results: Mapping[str, Any]) -> str:
    """Which technique to use on a model, what it costs, and how reuse compares, in one sentence."""
    found = Comparison.of(results)
    ranked = found.ranked()
    if "latency" not in results or not ranked:
        missing = "the quality of each sample" if "latency" in results else "latency"
        return f"**{model}**: no verdict yet, because {missing} was not measured."
    fast = [one for one in ranked if one.is_good and one.speed_up >= _MIN_SPEED_UP]
    reusing = [one for one in fast or ranked if one.reuses] or [one for one in ranked if one.reuses]
    unit = "s of speech" if found.full.name == "WER" else "tokens"
    if not fast:
        stages = "; ".join(found.comparisons)
        text = (
            f"keep full attention, because no faster technique loses {loss_text(found.full.kind)} or less ({stages})"
        )
    elif fast[0].name.startswith(_SIMPLE) and not fast[0].reuses:
        text = f"something simpler than sharing maps is the best choice: {_described(fast[0], found, unit)}"
    else:
        text = f"use {_described(fast[0], found, unit)}"
    if reusing and reusing[0] not in fast[:1]:
        text += f"; sharing maps comes to {_described(reusing[0], found, unit)}"
    elif fast and (others := [one for one in fast if not one.reuses]):
        text += f"; without sharing maps, {_described(others[0], found, unit)}"
    return f"**{model}**: {text}."


def loss_text(kind: str, value: float | None = None) -> str:
    """A loss, by default the largest that a recommended technique may have."""
    amount = MAX_LOSS[kind] if value is None else value
    if kind == "rate":
        return f"{100 * amount:.1f} points of WER"
    return f"{amount:.3f} of cosine" if kind == "similarity" else f"{100 * math.expm1(amount):.1f} % of perplexity"


def value_text(metric: Metric) -> str:
    """The value of a metric."""
    return f"{metric.value:.1%}" if metric.kind == "rate" else f"{metric.value:.4g}"


def _described(one: Evaluated, found: Comparison, unit: str) -> str:
    """The technique, its training, its speed-ups, and its metric beside that of full attention."""
    speed = ", ".join(f"{value:.2f}× at {length}" for length, value in one.speed_ups.items())
    name = found.full.name.removesuffix(", all")
    stage = f"{one.stage}, {one.seconds:.0f} s" if one.seconds else one.stage
    return (
        f"{one.title} ({stage}), which runs {speed} {unit}, with {name} {value_text(one.metric)} instead of "
        f"{value_text(found.full)}"
    )
