"""Plots of the study's reports as PNG files, made with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from mapreuse_lab.study._figures import KINDS
from mapreuse_lab.study._tables import Results, main_corpus, pareto_front, scored, speedup

_STAGES = {"by_index": "heads by index", "aligned": "heads aligned", "recovered": "recovered"}
"""Stages of a conversion in the quick study."""


def plot_stages(results: Results) -> Figure:
    """WER of each plan of the quick study before and after recovery, beside the original's."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, variants = figure.subplots(), results["variants"]
    for offset, (stage, title) in enumerate(_STAGES.items()):
        rates = [100 * variant[stage]["wer"] for variant in variants]
        ends = [[100 * end for end in variant[stage]["wer_interval"]] for variant in variants]
        below = [rate - low for rate, (low, _) in zip(rates, ends, strict=True)]
        above = [high - rate for rate, (_, high) in zip(rates, ends, strict=True)]
        positions = [index + 0.27 * (offset - 1) for index in range(len(variants))]
        axes.bar(positions, rates, 0.25, yerr=[below, above], label=title, capsize=2)
    original = 100 * results["baseline"]["wer"]
    axes.axhline(original, color="black", linestyle="--", label=f"original, {original:.1f} %")
    axes.set_xticks(range(len(variants)), [variant["name"] for variant in variants])
    axes.set_ylabel("word error rate, %")
    axes.set_ylim(0, 105)
    axes.legend()
    return figure


def plot_speedup(latency: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Speed-up over `transformers` by length, one panel for each encoder."""
    figure = Figure(figsize=(5 * len(latency), 4), layout="constrained")
    panels = figure.subplots(1, len(latency), squeeze=False)[0]
    for axes, (name, measured) in zip(panels, latency.items(), strict=True):
        for contestant in next(iter(measured.values())):
            ratios = [one["sdpa"]["median"] / one[contestant]["median"] for one in measured.values()]
            axes.plot([int(length) for length in measured], ratios, marker="o", label=contestant)
        axes.set_title(name)
        axes.set_xlabel("encoder frames")
        axes.set_ylabel("speed-up over sdpa (transformers)")
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def plot_similarity(similarity: Mapping[str, Any]) -> Figure:
    """Similarity of each pair of layers as a heat map."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similarity["layers"], vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("reusing layer")
    axes.set_ylabel("computing layer")
    figure.colorbar(image, label="similarity")
    return figure


def plot_error_against_speed(results: Results, length: str) -> Figure:
    """CER against speed-up of every technique at one length, with the Pareto front."""
    figure, corpus = Figure(figsize=(8, 5), layout="constrained"), main_corpus(results)
    axes = figure.subplots()
    for kind, title in KINDS.items():
        own = [t for t in scored(results) if t["kind"] == kind]
        speeds, errors = [speedup(results, t, length) for t in own], [100 * t["scores"][corpus]["cer"] for t in own]
        axes.plot(speeds, errors, "o", label=title)
    front = pareto_front(results, length)
    speeds, errors = [speedup(results, t, length) for t in front], [100 * t["scores"][corpus]["cer"] for t in front]
    axes.plot(speeds, errors, color="grey", label="Pareto front")
    for technique, x, y in zip(front, speeds, errors, strict=True):
        axes.annotate(technique["title"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel(f"speed-up over full attention, T = {length}")
    axes.set_ylabel(f"CER on {corpus}, %")
    axes.legend()
    return figure
