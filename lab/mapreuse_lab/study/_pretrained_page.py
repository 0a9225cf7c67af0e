"""The page of the techniques on pretrained models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mapreuse.console import Table
from mapreuse_lab.study._technique_comparison import (
    MAX_LOSS,
    Comparison,
    baseline_metrics,
    loss_text,
    stages_of,
    verdict_sentence,
)

_SHOWN = ("WER", "cosine", "top-10 overlap", "perplexity, all", "copying")
"""The metrics of the page; the JSON files have all."""

_BEST = 10
_LABELLED = 12
"""Techniques with a name in a scatter: the best ones, and those that reuse maps."""

_FROM_SCRATCH = "lab/results/study/full/report.md"


def write_technique_page(out: Path) -> None:
    """Write README.md, and a scatter for each timed model, from the JSON files in `out`."""
    models = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}
    compared = {name: Comparison.of(results) for name, results in models.items() if baseline_metrics(results)}
    lines = ["# Techniques on pretrained models", ""]
    for name in compared:
        lines += [f"- {verdict_sentence(name, models[name])}"]
    kinds = dict.fromkeys(found.full.kind for found in compared.values())
    limits = ", ".join(loss_text(kind) for kind in kinds)
    lines += [
        "",
        f"The choice is the fastest technique whose loss is at most {limits}, by the mean speed-up over all lengths",
        "in PyTorch on one thread; each technique counts with the better of its results without training and after",
        "recovery. Seconds are those of recovery on one core.",
        "",
    ]
    for name, found in compared.items():
        if "latency" in models[name] and found.ranked():
            plot_scatter(models[name]).savefig(out / f"{name}.png", dpi=100)
            lines += [f"![Quality and latency of techniques on {name}]({name}.png)", ""]
    lines += ["## The ten best", ""]
    for name, found in compared.items():
        lines += [f"### {name}", "", _best_table(found).markdown(), "", _power(found), ""]
    lines += [
        "The order is: a loss within the limit, fastest first; then the smallest loss. *p*: paired permutation test",
        "over the test samples, Holm-corrected for all comparisons of the same model and stage. *Reuse*: the same",
        "stage of the first plan below whose layers reuse whole maps.",
        "",
        "## All techniques",
        "",
        "Command: `mapreuse-lab techniques MODEL [--recover STEPS] [--time]`. Brackets: 95 % bootstrap interval of",
        "the difference to full attention, or of the ratio of perplexities. *No training*: projections may be fitted",
        "to calibration data in closed form. *Recovered*: the same distillation for the same number of steps for",
        "every technique. A dash: not measured yet; the same command continues. It also replaces results of an",
        "earlier version, which have no result of each sample and cannot be compared above.",
        "",
    ]
    for name, results in models.items():
        lines += [f"### {name}", "", _machine(results), "", _quality_table(results).markdown(), ""]
        latency = [_latency_table(results).markdown()] if "latency" in results else ["Latency was not measured."]
        lines += [*latency, ""]
    lines += [
        "## Which technique applies to which model",
        "",
        _applies(models).markdown(),
        "",
        "## Appendix: trained from scratch",
        "",
        f"`{_FROM_SCRATCH}` compares these techniques on a small recogniser that is trained from scratch with each.",
        "That recogniser is too small to tell most of them apart, so it decides nothing here.",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines))


def _best_table(found: Comparison) -> Table:
    ranked = found.ranked()[:_BEST]
    lengths = list(ranked[0].speed_ups) if ranked else []
    name = found.full.name
    header = ["technique", "stage", name, "loss", "p, full", "p, reuse", *(f"speed-up at {one}" for one in lengths)]
    rows = [
        [
            f"{one.title} (`{one.name}`)",
            one.stage,
            one.metric.text(),
            loss_text(one.metric.kind, one.loss) + (" ✓" if one.is_good else ""),
            _p_text(one.p_full),
            _p_text(one.p_reuse),
            *(f"{one.speed_ups[length]:.2f}×" if length in one.speed_ups else "—" for length in lengths),
        ]
        for one in ranked
    ]
    return Table("", header, rows)


def _p_text(p: float | None) -> str:
    if p is None:
        return "—"
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def _power(found: Comparison) -> str:
    ranked, samples = found.ranked()[:_BEST], len(found.full.sums)
    if not ranked:
        return f"{samples} test samples."
    number = max(found.comparisons.values())
    text = f"{samples} test samples, {number} comparisons: after correction, the test detects a difference to full "
    smallest = loss_text(found.full.kind, found.detectable(ranked))
    text += f"attention of {smallest} in 80 % of cases (median of the table)."
    if (lowest := number * 2.0 ** (1 - samples)) > 0.05:
        text += f" With so few samples, no corrected p-value can be below {min(1.0, lowest):.2f}."
    return text


def _machine(results: dict[str, Any]) -> str:
    here = results["machine"]
    return (
        f"Command: `{results['command']}`. Machine: {here['processor']}, {here['instructions']}; "
        f"mapreuse {here['mapreuse']}."
    )


def _metric_names(results: dict[str, Any]) -> list[str]:
    names = [one["name"] for one in results.get("baseline", ())]
    return [name for name in _SHOWN if name in names]


def _quality_table(results: dict[str, Any]) -> Table:
    names, stages = _metric_names(results), stages_of(results)
    header = ["technique", "parameters", *(f"{name}, {stage}" for stage in stages for name in names)]
    rows = []
    for technique, row in results["techniques"].items():
        if row["why not"]:
            continue
        cells = [
            f"{row['title']} (`{technique}`)",
            f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "—",
        ]
        rows.append(cells + [_cell(row.get(stage), name) for stage in stages for name in names])
    return Table("", header, rows)


def _cell(stage: dict[str, Any] | None, metric: str) -> str:
    if stage is None:
        return "—"
    if "failed" in stage:
        return "failed"
    one = stage["metrics"][metric]
    value, (low, high) = one["value"], one["against"][1]
    if metric == "WER":
        return f"{value:.1%} [{low:+.1%}, {high:+.1%}]"
    if metric in ("cosine", "top-10 overlap"):
        return f"{value:.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{value:.4g} [×{low:.3g}, ×{high:.3g}]"


def _latency_table(results: dict[str, Any]) -> Table:
    latency = results["latency"]
    names = list(next(iter(latency.values()))["techniques"])
    header = ["speed-up over full attention (sdpa of transformers)", *latency]
    rows = [
        [results["techniques"][name]["title"], *(_speed_up(one["techniques"].get(name)) for one in latency.values())]
        for name in names
    ]
    return Table("", header, rows)


def _speed_up(one: dict[str, Any] | None) -> str:
    return "—" if one is None else f"{one['speed-up']['median']:.2f}×"


def plot_scatter(results: Mapping[str, Any]) -> Figure:
    """Quality against latency at the greatest length, each technique after its better stage; reuse is marked."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, found = figure.subplots(), Comparison.of(results)
    length, timed = list(results["latency"].items())[-1]
    latency = {name: 1000 * one["median"] for name, one in timed["techniques"].items()}
    ranked = [one for one in found.ranked() if one.name in latency]
    labelled = [one for i, one in enumerate(ranked) if i < _LABELLED or one.reuses]
    for reuses, marker, colour, label in (
        (False, "o", "tab:blue", "other techniques"),
        (True, "*", "tab:red", "reuse"),
    ):
        for trained in (False, True):
            some = [one for one in ranked if one.reuses == reuses and (one.stage != "no training") == trained]
            if some:
                x, y = zip(*((latency[one.name], one.metric.value) for one in some), strict=True)
                faces, name = colour if trained else "none", f"{label}, {some[0].stage}"
                axes.scatter(x, y, s=60, marker=marker, edgecolors=colour, facecolors=faces, label=name)
    for one in labelled:
        place = latency[one.name], one.metric.value
        axes.annotate(one.name, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    full = found.full.value
    axes.scatter([latency["full"]], [full], marker="D", color="black", label="full attention")
    axes.axhline(_limit(found), color="grey", linestyle="--", linewidth=1, label="limit of the loss")
    axes.set_xlabel(f"latency at length {length}, milliseconds")
    axes.set_ylabel(found.full.name)
    if found.full.kind != "similarity":
        axes.set_yscale("log")
        axes.invert_yaxis()  # up is better in every chart
    axes.legend(fontsize=8)
    return figure


def _limit(found: Comparison) -> float:
    """The worst value within the limit of the loss."""
    most, value = MAX_LOSS[found.full.kind], found.full.value
    if found.full.kind == "perplexity":
        return value * math.exp(most)
    return value - most if found.full.kind == "similarity" else value + most


def _applies(models: dict[str, dict[str, Any]]) -> Table:
    """Every technique, without settings, and whether it applies to each model."""
    titles: dict[str, dict[str, str]] = {}
    for model, results in models.items():
        for name, row in results["techniques"].items():
            titles.setdefault(_family(name), {}).setdefault(model, row["why not"] or "yes")
            if not row["why not"]:
                titles[_family(name)][model] = "yes"
    rows = [[name, *(found.get(model, "—") for model in models)] for name, found in titles.items()]
    return Table("", ["technique", *models], rows)


def _family(name: str) -> str:
    """A technique's name without its settings: "window-16+reuse-2x3" is "window+reuse"."""
    parts = ["-".join(word for word in part.split("-") if word[0].isalpha()) for part in name.split("+")]
    return "+".join(parts)
