"""The tables of the study's reports. docs/results_format.md documents the results that they are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mapreuse.console import Table
from mapreuse.measure import PARTS
from mapreuse_lab.study._statistics import significance

Results = dict[str, Any]

MISSING = "–"

_SUMMARY_LENGTHS = ("1000", "2000", "8000")
_MAX_NAME = 40  # characters; the name of a plan with single heads has hundreds


def main_corpus(results: Results) -> str:
    """The corpus that every technique was trained on."""
    return results["config"]["corpus"]


def by_name(results: Results) -> dict[str, dict[str, Any]]:
    """The techniques, by name."""
    return {technique["name"]: technique for technique in results["techniques"]}


def scored(results: Results) -> list[dict[str, Any]]:
    """Techniques with error rates on the main corpus, by CER; empty if full attention has none."""
    corpus = main_corpus(results)
    found = sorted(
        (t for t in results["techniques"] if corpus in t["scores"]), key=lambda t: t["scores"][corpus]["cer"]
    )
    return found if any(t["name"] == "full" for t in found) else []


def lengths(results: Results) -> list[str]:
    """Encoder frames at which latency was measured, in ascending order."""
    return sorted(by_name(results).get("full", {}).get("latency", {}), key=int)


def speedup(results: Results, technique: Mapping[str, Any], length: str) -> float:
    """Speed-up over full attention."""
    return by_name(results)["full"]["latency"][length]["median"] / technique["latency"][length]["median"]


def cer_loss(technique: Mapping[str, Any], corpus: str) -> float:
    """CER minus that of full attention with the same seeds."""
    scores = technique["scores"][corpus]
    return scores["against_full"]["cer"]["difference"] if "against_full" in scores else 0.0


def pareto_front(results: Results, length: str) -> list[dict[str, Any]]:
    """The techniques for which no other one is at least as good in CER and latency, and better in one.

    Fastest first. CER is compared as the difference to full attention, on the main corpus.
    """
    corpus = main_corpus(results)
    comparable = [t for t in scored(results) if t["name"] == "full" or "against_full" in t["scores"][corpus]]
    costs = {t["name"]: (t["latency"][length]["median"], cer_loss(t, corpus)) for t in comparable}
    return [
        technique
        for technique in sorted(comparable, key=lambda t: (costs[t["name"]], t["name"]))
        if not any(_dominates(other, costs[technique["name"]]) for other in costs.values())
    ]


def _dominates(costs: tuple[float, float], others: tuple[float, float]) -> bool:
    return costs != others and costs[0] <= others[0] and costs[1] <= others[1]


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def interval(ends: Sequence[float], show: Callable[[float], str] = "{:.1%}".format) -> str:
    """An interval in brackets."""
    return f"[{show(ends[0])}, {show(ends[1])}]"


def plural(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rate(scores: Mapping[str, Any] | None, metric: str) -> str:
    """An error rate with its 95 % interval."""
    return f"{scores[metric]:.1%} {interval(scores[f'{metric}_interval'])}" if scores else MISSING


def against_full(scores: Mapping[str, Any], metric: str) -> str:
    """Difference to full attention in points, its 95 % interval, and whether it is significant."""
    if "against_full" not in scores:
        return MISSING
    found = scores["against_full"][metric]
    shown = f"{points(found['difference'])} {interval(found['interval'], points)}"
    return ", ".join(filter(None, (shown, significance(found["interval"]))))


def speedup_table(title: str, measured: Mapping[str, Mapping[str, Any]], baseline: str) -> Table:
    """Latency of the baseline, and speed-ups of the other contestants over it, by length; with their spread."""
    names = dict.fromkeys(name for one in measured.values() for name in one)
    rows = []
    for name in names:
        cells = []
        for contestants in measured.values():
            one, base = contestants[name], contestants[baseline]
            shown = _time(one["median"]) if name == baseline else f"{base['median'] / one['median']:.2f}×"
            cells.append(f"{shown} ± {one['spread']:.0%}")
        rows.append([name, *cells])
    return Table(title, ["", *(f"T = {length}" for length in measured)], rows)


def latency_by_title(results: Results) -> dict[str, dict[str, Any]]:
    """Latencies of the full study, by length and title of the contestant."""
    return {
        length: {t["title"]: t["latency"][length] for t in results["techniques"]}
        | {name: one["latency"][length] for name, one in results["references"].items()}
        for length in lengths(results)
    }


def summary_table(results: Results) -> Table:
    """One row for each technique, by CER: accuracy and speed-up."""
    corpus = main_corpus(results)
    timed = [length for length in lengths(results) if length in _SUMMARY_LENGTHS] or lengths(results)
    fronts = {length: pareto_front(results, length) for length in lengths(results)}
    header = ["technique", "positions", "CER", "CER difference to full, points", "seeds"]
    header += [*(f"speed-up, T = {length}" for length in timed), "Pareto front at T ="]
    rows = []
    for technique in scored(results):
        scores = technique["scores"][corpus]
        cells = [technique["title"], technique["positions"], rate(scores, "cer"), against_full(scores, "cer")]
        cells.append(str(len(scores["seeds"])))
        for length in timed:
            spread = technique["latency"][length]["spread"]
            cells.append(f"{speedup(results, technique, length):.2f}× ± {spread:.0%}")
        front = [length for length, techniques in fronts.items() if technique in techniques]
        cells.append("all" if len(front) == len(fronts) else ", ".join(front))
        rows.append(cells)
    return Table("Techniques by CER", header, rows)


def error_tables(results: Results) -> list[Table]:
    """CER and WER of every technique, one table for each corpus."""
    tables = []
    for corpus in results["corpora"]:
        rows = _error_rows(results["techniques"], corpus, lambda technique: [technique["source"]])
        if rows:
            tables.append(Table(f"Error rates on {corpus}", [*_ERROR_HEADER, "source"], rows))
    return tables


def longer_table(results: Results) -> Table:
    """Techniques trained by the longer recipe, beside their CER with the standard recipe."""
    corpus, before = main_corpus(results), by_name(results)

    def standard(technique: Mapping[str, Any]) -> list[str]:
        return [rate(before[technique["name"]]["scores"].get(corpus), "cer")]

    rows = _error_rows(results["longer"]["techniques"], corpus, standard)
    return Table(f"Trained longer, error rates on {corpus}", [*_ERROR_HEADER, "CER, standard recipe"], rows)


_ERROR_HEADER = [
    "technique",
    "seeds",
    "CER",
    "CER difference to full, points",
    "WER",
    "WER difference to full, points",
]


def _error_rows(
    techniques: Sequence[Mapping[str, Any]], corpus: str, more: Callable[[Mapping[str, Any]], list[str]]
) -> list[list[str]]:
    rows = []
    for technique in techniques:
        if corpus in technique["scores"]:
            scores = technique["scores"][corpus]
            cells = [technique["title"], str(len(scores["seeds"]))]
            for metric in ("cer", "wer"):
                cells += [rate(scores, metric), against_full(scores, metric)]
            rows.append(cells + more(technique))
    return rows


def cost_table(results: Results) -> Table:
    """Parameters, FLOPs, peak memory and training steps: of full attention, and as ratios to it."""
    full, rows = by_name(results)["full"], []
    flops, memory, steps = full["flops"], full.get("memory", {}), full["training_step"]
    header = ["", "parameters", *(f"FLOPs, T = {length}" for length in flops)]
    header += [f"peak memory, T = {length}" for length in memory]
    header += [f"training step, {batch if batch == 'utterances' else f'T = {batch}'}" for batch in steps]
    contestants = [(t["title"], t) for t in results["techniques"]] + list(results["references"].items())
    for title, one in contestants:
        measured = one.get("memory", {})
        cells = [title, _relative(one.get("parameters"), full["parameters"], one is full, "{:.2f} M", 1e6)]
        cells += [_relative(one["flops"][at], n, one is full, "{:.3g} GFLOP", 1e9) for at, n in flops.items()]
        cells += [_relative(measured.get(at), n, one is full, "{:,.0f} MiB", 2**20) for at, n in memory.items()]
        for batch, base in steps.items():
            step = one["training_step"][batch]
            shown = _time(step["median"]) if one is full else f"{step['median'] / base['median']:.2f}"
            cells.append(f"{shown} ± {step['spread']:.0%}")
        rows.append(cells)
    return Table("Other costs, as ratios to full attention", header, rows)


def study_breakdown_tables(results: Results) -> list[Table]:
    """Time of each part of the forward pass by length, and its share."""
    tables = []
    for group, title in (("contestants", "The whole encoder"), ("layer", "One layer")):
        for name, measured in results["breakdown"][group].items():
            timed = sorted(measured, key=int)
            sums = {length: sum(measured[length].values()) for length in timed}
            rows = [
                [PARTS.get(part, part)]
                + [f"{_time(measured[at][part])} ({measured[at][part] / sums[at]:.0%})" for at in timed]
                for part in measured[timed[0]]
                if any(measured[at][part] for at in timed)
            ]
            rows.append(["all parts", *(_time(sums[at]) for at in timed)])
            tables.append(Table(f"{title}: {name}", ["part", *(f"T = {at}" for at in timed)], rows))
    return tables


def similarity_table(similarity: Mapping[str, Any]) -> Table:
    """Similarity of each pair of layers."""
    rows = [[str(layer), *(f"{value:.2f}" for value in row)] for layer, row in enumerate(similarity["layers"])]
    return Table("Similarity of layers", ["layer", *map(str, range(len(rows)))], rows)


def corpora_table(results: Results) -> Table:
    """Size and origin of each corpus."""
    header = ["corpus", "language", "test utterances", "test words", "minutes of training speech", "attribution"]
    fields = ("language", "test_utterances", "test_words", "train_minutes", "attribution")
    rows = [[name, *(str(one[field]) for field in fields)] for name, one in results["corpora"].items()]
    return Table("Corpora", header, rows)


def runs_table(results: Results) -> Table:
    """All training runs, unfinished ones first."""
    order = {"failed": 0, "not run": 1}
    rows = []
    for run in sorted(all_runs(results), key=lambda run: order.get(run["state"], 2)):
        name = run["technique"] if len(run["technique"]) <= _MAX_NAME else f"{run['technique'][: _MAX_NAME - 1]}…"
        cells = [name, run["corpus"], str(run["seed"])]
        cells.append(f"failed: {run['error']}" if run["state"] == "failed" else run["state"])
        if run["state"] == "finished":
            cells += [str(run["steps"]), f"{run['seconds'] / 60:.1f}", run["commit"]]
            cells.append(f"{run['processor']}, {run['instructions']}")
        rows.append(cells + [""] * (8 - len(cells)))
    return Table("Runs", ["technique", "corpus", "seed", "state", "steps", "minutes", "commit", "machine"], rows)


def all_runs(results: Results) -> list[dict[str, Any]]:
    """Every training run; those with the longer recipe last."""
    return [*results["runs"], *results.get("longer", {}).get("runs", [])]


def settings_table(title: str, settings: Mapping[str, Any]) -> Table:
    """Settings, nested ones under names such as "recipe.steps"."""
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in _flat(settings)]
    return Table(title, ["setting", "value"], rows)


def quick_error_table(results: Results) -> Table:
    """Error rates of the quick study before and after recovery, one row for each plan."""
    original = results["baseline"]
    header = ["plan", "reusing layers", "parameters", "WER by index", "WER aligned", "WER recovered", "CER recovered"]
    parameters = _millions(original["parameters"])
    rows = [["full (original)", "0", parameters, "", "", rate(original, "wer"), rate(original, "cer")]]
    for variant in results["variants"]:
        saved = 1 - variant["parameters"] / original["parameters"]
        cells = [
            variant["name"],
            str(variant["reusing_layers"]),
            f"{_millions(variant['parameters'])} (−{saved:.0%})",
        ]
        cells += [rate(variant[stage], "wer") for stage in ("by_index", "aligned", "recovered")]
        rows.append([*cells, rate(variant["recovered"], "cer")])
    return Table("Error rates", header, rows)


def pretrained_table(results: Results) -> Table:
    """WER of the pretrained recogniser under plans of its encoder, one row for each."""
    quality = results["pretrained"]["quality"]
    stages = list(dict.fromkeys(stage for found in quality.values() for stage in found if stage != "original"))
    original = next(iter(quality.values()))["original"]["WER"]
    rows = [["full (original)", _metric(original), *("" for _ in stages[1:])]]
    for plan, found in quality.items():
        rows.append([plan, *(_metric(found[stage]["WER"]) if stage in found else "" for stage in stages)])
    note = "Change of recovered plans against the original, paired: " + "; ".join(
        f"{plan} {points(against[0])} points {interval(against[1], points)}"
        for plan, found in quality.items()
        if "recovered" in found
        for against in [found["recovered"]["WER"]["against"]]
    )
    return Table(f"{results['pretrained']['model']}: WER", ["plan", *stages], rows, [note])


def _metric(found: Mapping[str, Any]) -> str:
    return rate({"wer": found["value"], "wer_interval": found["interval"]}, "wer")


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _relative(number: float | None, base: float, is_base: bool, text: str, unit: float) -> str:
    """The ratio to the base, or the base itself as text."""
    if number is None:
        return MISSING
    return text.format(number / unit) if is_base else f"{number / base:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f} M"
