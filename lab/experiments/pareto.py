"""Searched plans against groups of fixed sizes, at equal latency; results in lab/results/conversion/.

    python lab/experiments/pareto.py DIRECTORY    # measure what is missing, then write the page
    python lab/experiments/pareto.py              # write the page from pareto.json

Models are all-MiniLM-L6-v2 (DIRECTORY, as for minilm.py) and the lab's recogniser. Plans of both kinds are refitted
on the same calibration data, evaluated on the same held-out data, and timed in turns. Results are kept for each model
and each set of CPU instructions.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import EmbeddingModel, evaluation_sentences, python_reference
from mapreuse_lab.training import BASELINE, Recogniser, evaluate, features, open_corpus, speech_batches
from matplotlib.figure import Figure
from torch import nn

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.conversion import hidden_state_error
from mapreuse.measure import machine, time_interleaved

TARGET = Path(__file__).parent.parent / "results/conversion"
NUM_CALIBRATION, NUM_EVALUATION = 256, 512
METRICS = {"minilm": "1 − cosine of hidden states", "recogniser": "WER, greedy, test"}
MAX_ERROR = {"minilm": 0.15, "recogniser": 0.05}
"""Error of the hidden states up to which plans are searched."""
EXACT = "searched 0"
"""The plan that reuses nothing; the others' latencies are shown relative to it."""

Batch = Mapping[str, Any]
Metric = Callable[[nn.Module], float]


def main() -> None:
    file = TARGET / "pareto.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"schema": 2, "models": {}}
    if len(sys.argv) > 1:
        here = machine()
        commit = here.pop("commit")
        for name, make in {"recogniser": _recogniser, "minilm": lambda: _minilm(sys.argv[1])}.items():
            key = f"{name}-{here['instructions']}"
            if key not in results["models"]:
                results["models"][key] = {"model": name, "machine": here, "commit": commit} | _compare(name, *make())
                file.write_text(json.dumps(results, indent=1) + "\n")
    for key, compared in results["models"].items():
        _plot(compared).savefig(TARGET / f"pareto-{key}.png", dpi=110, format="png")
    (TARGET / "pareto.md").write_text(_page(results))


def _minilm(name: str) -> tuple[nn.Module, list[Batch], Metric, Batch]:
    """Model, calibration batches, metric, and the batch to time: 16 texts of 128 tokens."""
    task, topics = EmbeddingModel(name, num_calibration=NUM_CALIBRATION), python_reference()
    evaluation = task.batches(evaluation_sentences()[:NUM_EVALUATION])
    long = [topics[start : start + 2000] for start in range(0, 32_000, 2000)]
    return task.model, task.calibration(), hidden_state_error(task.model, evaluation), task.batches(long)[0]


def _recogniser() -> tuple[nn.Module, list[Batch], Metric, Batch]:
    """The same for the recogniser; 40 s of speech, 1000 frames, are timed."""
    recogniser = Recogniser.load(BASELINE)
    calibration = speech_batches(recogniser, "prompts:en", split="train", max_batches=16)
    cuts = list(open_corpus("prompts:en").test)

    def word_error_rate(model: nn.Module) -> float:
        return evaluate(recogniser.with_model(model), cuts).wer

    audio = torch.cat([torch.from_numpy(cut.load_audio()[0]) for cut in cuts])[: 40 * 8000]
    inputs, mask = features([audio.numpy()], recogniser.feature_config)
    return recogniser.model, calibration, word_error_rate, {"input_features": inputs, "attention_mask": mask}


def _compare(
    name: str, original: nn.Module, calibration: Sequence[Batch], metric: Metric, timed: Batch
) -> dict[str, Any]:
    cache = Path("runs/pareto") / name
    optimized = mr.optimize(copy.deepcopy(original))
    found = mr.search(optimized, calibration, error=MAX_ERROR[name], timed=timed, cache=cache)
    models = {f"searched {number}": candidate.build() for number, candidate in enumerate(found)}
    models |= {
        f"fixed {plan}": mr.convert(optimized, mr.ReusePlan.parse(plan), calibration) for plan in _fixed(original)
    }
    models["original"] = original
    calls = {name: functools.partial(model, **timed) for name, model in models.items()}
    times = time_interleaved(calls, repeats=7, precision=0.02)
    return {
        "points": {
            name: {
                "error": metric(model),
                "latency": times[name].median / times["original"].median,
                "spread": times[name].spread,
                "plan": None if (plan := mr.plan_of(model)) is None else json.loads(plan.to_json())["layers"],
            }
            for name, model in models.items()
        },
        "predicted": {f"searched {number}": one.predicted_latency for number, one in enumerate(found)},
        "measured_by_search": {f"searched {number}": one.latency for number, one in enumerate(found)},
    }


def _fixed(original: nn.Module) -> list[str]:
    """Groups of 2, 3, 4 and all layers, and groups in the upper half only."""
    depth = getattr(original.config, "num_hidden_layers", None) or original.config.encoder_config.num_hidden_layers
    half = depth // 2
    groups = [f"{size}x{depth // size}" + (f",{depth % size}x1" if depth % size else "") for size in (2, 3, 4, depth)]
    return [*groups, f"1x{half},{depth - half}x1", f"1x{depth - 2},2x1"]


def _plot(compared: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    points, exact = compared["points"], compared["points"][EXACT]["latency"]
    for kind, marker, label in (("searched", "o-", "search"), ("fixed", "s", "fixed groups")):
        own = sorted((one["latency"] / exact, one["error"]) for key, one in points.items() if key.startswith(kind))
        axes.plot(*zip(*own, strict=True), marker, label=label)
    axes.set_title(f"{compared['model']}, {compared['machine']['instructions']}")
    axes.set_xlabel("latency relative to the model without sharing")
    axes.set_ylabel(METRICS[compared["model"]])
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _page(results: dict[str, Any]) -> str:
    lines = [
        "# Search against fixed groups",
        "",
        "Command: `python lab/experiments/pareto.py DIRECTORY`. Plans are refitted, not trained, and evaluated on",
        "data that neither calibration nor search used. All models include `mapreuse.optimize`. Figures of version",
        "0.1.0 still hold: its `apply` did what `mapreuse.optimize` does now.",
        "",
        "**Latency** is relative to the model without sharing, *searched 0*; all models of a table were timed in",
        "turns. ± is half the interquartile range: closer plans cannot be distinguished. **In the search**: the",
        "latency measured by the search itself, and the prediction of its cost model.",
        "",
    ]
    for key, compared in results["models"].items():
        name, here, points = compared["model"], compared["machine"], compared["points"]
        machine_name = f"{here['processor']}, {here['instructions']}, {here['cores']} cores"
        lines += [
            f"## {name} ({machine_name})",
            "",
            f"mapreuse {here['mapreuse']}, commit {compared['commit']}.",
            "",
            f"![{name}](pareto-{key}.png)",
            "",
        ]
        exact, searches = points[EXACT]["latency"], (compared["measured_by_search"], compared["predicted"])
        rows = []
        for plan, point in sorted(points.items(), key=lambda item: item[1]["latency"]):
            if plan == "original":
                continue
            searched = ", ".join(f"{one[plan] / one[EXACT]:.2f}" for one in searches if plan in one)
            latency = f"{point['latency'] / exact:.2f} ± {point['spread']:.0%}"
            rows.append([plan, f"{point['error']:.4f}", latency, searched])
        lines += [Table("", ["plan", METRICS[name], "latency", "in the search"], rows).markdown(), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
