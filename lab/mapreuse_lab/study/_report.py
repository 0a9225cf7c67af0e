"""The quick study's results as JSON, Markdown and plots."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mapreuse_lab.study._page import page
from mapreuse_lab.study._page_tables import Results
from mapreuse_lab.training import write_whole

_MADE_BY_DEFAULT = "mapreuse-lab study --preset quick --corpus prompts:en"
"""The command that `make study` runs."""


def write_report(results: Results, out_dir: Path) -> None:
    """Write `results.json`, `report.md`, its plots, and `report.html` to `out_dir`, each whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(out_dir / "results.json", lambda file: file.write_text(json.dumps(results, indent=1) + "\n"))
    write_whole(out_dir / "report.md", lambda file: file.write_text(report(results)))
    write_whole(out_dir / "report.html", lambda file: file.write_text(page(page_results(results)), encoding="utf-8"))
    plots = {"error.png": plot_error, "latency.png": plot_latency, "similarity.png": plot_similarity}
    for name, plot in plots.items():
        figure = plot(results)
        write_whole(out_dir / name, partial(figure.savefig, dpi=110, format="png"))


def report(results: Results) -> str:
    """The report in Markdown."""
    baseline, config = results["baseline"], results["config"]
    machine = results["machine"]
    lines = [
        "# Attention map reuse in a speech recogniser",
        "",
        f"Made by `{results['command']}` (seed {config['seed']}) on {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"commit {machine['commit']}.",
        "",
        f"Corpus: {config['corpus']}, test set {baseline['num_utterances']} utterances, "
        f"{baseline['num_words']} words. {results['attribution']}",
        "",
        "## Error rates",
        "",
        "Greedy decoding; 95 % bootstrap intervals over utterances in brackets. *By index*: "
        "converted, no training, each head applies the source head of its own number. *Aligned*: converted, no "
        "training, heads assigned by map similarity. *Recovered*: aligned, then "
        f"{config['recovery_seconds']:.0f} s of fine-tuning.",
        "",
        *error_table(results),
        "",
        "![Word error rate of every plan](error.png)",
        "",
        "## Latency",
        "",
        "Encoder, subsampling included, batch 1, float32, ratio to `transformers`' own encoder with fused attention "
        "(`sdpa`) at the same length, medians of interleaved rounds; T counts encoder frames.",
        "",
    ]
    for name, title in (("recogniser", "The recogniser"), ("conformer-m", "Conformer-M (16 layers × 256 × 4 heads)")):
        lines += [f"### {title}", "", *latency_table(results["latency"][name]), ""]
    lines += [
        "![Speed-up by length](latency.png)",
        "",
        "### One layer's attention (Conformer-M, projections included)",
        "",
        *latency_table(results["attention"]),
        "",
        "## Similarity of attention maps",
        "",
        f"One minus total variation, each head to its most similar head, over {results['similarity']['num_queries']} "
        "frames of training utterances.",
        "",
        "![Similarity of layers](similarity.png)",
        "",
        "## Not measured",
        "",
        "GPU latency, peak memory, error rates of the Conformer-M encoder (its weights are random).",
        "",
    ]
    return "\n".join(lines)


def page_results(results: Results) -> Results:
    """The results as the page reads them (docs/results_format.md): each plan, recovered, is a technique."""
    corpus, latency = results["config"]["corpus"], results["latency"]["recogniser"]
    full = results["baseline"]
    variants = [("full", full, full["parameters"])]
    variants += [(v["name"], v["recovered"], v["parameters"]) for v in results["variants"]]
    techniques = [
        {
            "name": name,
            "title": "full attention" if name == "full" else f"reuse, {name}",
            "source": "the shipped recogniser" if name == "full" else "Shim, Choi & Sung, ICLR 2022",
            "positions": "kept",
            "kind": "full" if name == "full" else "reuse",
            "parameters": parameters,
            "scores": {corpus: scores | {"seeds": [results["config"]["seed"]]}},
            "latency": {length: measured[name] for length, measured in latency.items()},
        }
        for name, scores, parameters in variants
    ]
    return {
        "schema": 2,
        "preset": "quick",
        "command": results["command"],
        "commands": ["make study"] if results["command"] == _MADE_BY_DEFAULT else [results["command"]],
        "machine": results["machine"],
        "config": results["config"],
        "corpora": {
            corpus: {
                "attribution": results["attribution"],
                "test_utterances": full["num_utterances"],
                "test_words": full["num_words"],
            }
        },
        "techniques": techniques,
        "reference": {"latency": {length: measured["transformers"] for length, measured in latency.items()}},
        "similarity": {"layers": results["similarity"]["layers"]},
        "verdict": _verdict(results),
    }


def _verdict(results: Results) -> list[str]:
    """What the quick study says of each plan, in a sentence."""
    full, seconds = results["baseline"], results["config"]["recovery_seconds"]
    length, timed = list(results["latency"]["conformer-m"].items())[-1]
    sentences = []
    for variant in results["variants"]:
        low, high = variant["recovered"]["wer_interval"]
        faster = ""
        if variant["name"] in timed:
            ratio = timed["transformers"]["median"] / timed[variant["name"]]["median"]
            faster = f"; a Conformer-M so converted is {ratio:.1f} times as fast as transformers' at T = {length}"
        sentences.append(
            f"{variant['name'][0].upper()}{variant['name'][1:]}: WER {variant['recovered']['wer']:.1%} [{low:.1%}, "
            f"{high:.1%}] after {seconds:.0f} s of recovery, {full['wer']:.1%} before conversion{faster}."
        )
    return sentences


def error_table(results: Results) -> list[str]:
    """One row for the original and for each plan: error rates before and after recovery, parameters."""
    full = results["baseline"]
    rows = [
        "| plan | reusing layers | parameters | WER by index | WER aligned | WER recovered | CER recovered |",
        "|---|---|---|---|---|---|---|",
        f"| full (original) | 0 | {full['parameters']:,} | | | {_rate(full, 'wer')} "
        f"| {_rate(full, 'cer')} | {_rate(full.get('beam+lm'), 'wer')} |",
    ]
    for variant in results["variants"]:
        saved = 1 - variant["parameters"] / full["parameters"]
        rows.append(
            f"| {variant['name']} | {variant['reusing_layers']} | {variant['parameters']:,} (−{saved:.0%}) "
            f"| {_rate(variant['by_index'], 'wer')} | {_rate(variant['aligned'], 'wer')} "
            f"| {_rate(variant['recovered'], 'wer')} | {_rate(variant['recovered'], 'cer')} |"
        )
    return rows


def latency_table(measured: dict[str, Any]) -> list[str]:
    """Speed-up over `transformers` for each contestant and length, with the spread of its repeats."""
    lengths = list(measured)
    names = list(measured[lengths[0]])
    rows = ["| | " + " | ".join(f"T = {length}" for length in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for name in names:
        cells = []
        for length in lengths:
            taken, base = measured[length][name], measured[length]["transformers"]
            if name == "transformers":
                cells.append(f"{taken['median'] * 1000:.0f} ms ± {taken['spread']:.0%}")
            else:
                cells.append(f"{base['median'] / taken['median']:.2f}× ± {taken['spread']:.0%}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def plot_error(results: Results) -> Figure:
    """Word error rate of every plan: by index, aligned, recovered, beside the original's."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    variants = results["variants"]
    stages = {
        "by_index": "converted, heads by index",
        "aligned": "converted, heads aligned",
        "recovered": "recovered",
    }
    for offset, (stage, label) in enumerate(stages.items()):
        rates = [100 * variant[stage]["wer"] for variant in variants]
        intervals = [variant[stage]["wer_interval"] for variant in variants]
        bars = [
            [rate - 100 * low for rate, (low, _) in zip(rates, intervals, strict=True)],
            [100 * high - rate for rate, (_, high) in zip(rates, intervals, strict=True)],
        ]
        positions = [index + 0.27 * (offset - 1) for index in range(len(variants))]
        axes.bar(positions, rates, 0.25, yerr=bars, label=label, capsize=2)
    original = 100 * results["baseline"]["wer"]
    axes.axhline(original, color="black", linestyle="--", label=f"original, {original:.1f} %")
    axes.set_xticks(range(len(variants)), [variant["name"] for variant in variants])
    axes.set_ylabel("word error rate, %")
    axes.set_ylim(0, 105)
    axes.legend()
    return figure


def plot_latency(results: Results) -> Figure:
    """Speed-up over `transformers` against length, for both encoders."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, measured) in zip(figure.subplots(1, 2), results["latency"].items(), strict=True):
        lengths = list(measured)
        for contestant in measured[lengths[0]]:
            speedup = [
                measured[length]["transformers"]["median"] / measured[length][contestant]["median"]
                for length in lengths
            ]
            axes.plot([int(length) for length in lengths], speedup, marker="o", label=contestant)
        axes.set_title(name)
        axes.set_xlabel("encoder frames")
        axes.set_ylabel("times as fast as transformers (sdpa)")
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def plot_similarity(results: Results) -> Figure:
    """Similarity of every pair of layers as a heat map."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(results["similarity"]["layers"], vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("layer that reuses")
    axes.set_ylabel("layer that computes")
    figure.colorbar(image, label="similarity")
    return figure


def _rate(scores: dict[str, Any] | None, name: str) -> str:
    if scores is None:
        return "not measured"
    low, high = scores[f"{name}_interval"]
    return f"{scores[name]:.1%} [{low:.1%}, {high:.1%}]"
