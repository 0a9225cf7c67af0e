"""Does the search beat fixed grouping at equal latency? Both judged and timed together, into lab/results/conversion/.

    python scripts/pareto.py DIRECTORY

For all-MiniLM-L6-v2 (DIRECTORY, as for scripts/minilm.py) and for the shipped recogniser. Both kinds of plan are
refitted on the same calibration data, judged on the same data that neither saw, and timed in turns. MiniLM is judged
by the cosine of its hidden states to the original's, the recogniser by its word error rate.
A model whose figures are in lab/results/conversion/pareto.json already, of a processor with the same instructions, is not
done again.
"""

from __future__ import annotations

import copy
import json
import pydoc_data.topics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.training import BASELINE, Recogniser, evaluate, features, open_corpus, speech_batches
from matplotlib.figure import Figure
from minilm import batches_of, calibration_texts, judging_texts
from torch import nn
from transformers import AutoModel, AutoTokenizer

import mapreuse as mr
from mapreuse.conversion import hidden_state_error, refit
from mapreuse.measure import machine, time_interleaved

TARGET = Path(__file__).parent.parent / "lab/results/conversion"
NUM_CALIBRATION, NUM_JUDGING = 256, 512
ERRORS = {"minilm": "1 − cosine of hidden states", "recogniser": "word error rate, greedy, test"}
MOST_ERROR = {"minilm": 0.15, "recogniser": 0.05}
"""Errors of hidden states up to which plans are searched for."""
_REPEATS = 7
_PRECISION = 0.02
"""Relative standard error that times are to have; where they vary more, there are up to four times the repeats."""

Batch = Mapping[str, Any]
Judge = Callable[[nn.Module], float]


def main() -> None:
    file = TARGET / "pareto.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"schema": 2, "models": {}}
    here = machine()
    commit = here.pop("commit")
    results["command"] = "python scripts/pareto.py DIRECTORY"
    for name, make in {"recogniser": _recogniser, "minilm": lambda: _minilm(Path(sys.argv[1]))}.items():
        key = f"{name}-{here['instructions']}"
        if key not in results["models"]:
            results["models"][key] = {"model": name, "machine": here, "commit": commit} | _compared(name, *make())
            file.write_text(json.dumps(results, indent=1) + "\n")
    for key, compared in results["models"].items():
        _plot(compared).savefig(TARGET / f"pareto-{key}.png", dpi=110, format="png")
    (TARGET / "pareto.md").write_text(_page(results))


def _minilm(directory: Path) -> tuple[nn.Module, list[Batch], Judge, Batch]:
    """The model, calibration batches, what judges, and the batch that is timed: 16 texts of 128 tokens."""
    tokenizer, original = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    calibration = batches_of(tokenizer, calibration_texts(NUM_CALIBRATION))
    judging = batches_of(tokenizer, judging_texts(NUM_JUDGING))
    long = [topics[start : start + 2000] for start in range(0, 32_000, 2000)]
    return original, calibration, hidden_state_error(original, judging), batches_of(tokenizer, long)[0]


def _recogniser() -> tuple[nn.Module, list[Batch], Judge, Batch]:
    """Likewise; what is timed is 40 s of speech, 1000 frames."""
    recogniser = Recogniser.load(BASELINE)
    calibration = speech_batches(recogniser, "prompts:en", split="train", max_batches=16)
    cuts = list(open_corpus("prompts:en").test)

    def word_error_rate(model: nn.Module) -> float:
        judged = copy.copy(recogniser)
        judged.model = model
        return evaluate(judged, cuts).wer

    audio = [cut.load_audio()[0] for cut in cuts]
    seconds = torch.cat([torch.from_numpy(samples) for samples in audio])[: 40 * 8000]
    inputs, mask = features([seconds.numpy()], recogniser.feature_config)
    return recogniser.model, calibration, word_error_rate, {"input_features": inputs, "attention_mask": mask}


def _compared(
    name: str, original: nn.Module, calibration: Sequence[Batch], error: Judge, timed: Batch
) -> dict[str, Any]:
    cache = Path("runs/pareto") / f"{name}.jsonl"
    found = mr.search(original, calibration, error=MOST_ERROR[name], timed=timed, cache=cache)
    models = {"original": original}
    for number, candidate in enumerate(found):
        models[f"searched {number}"] = _refitted(original, candidate.plan, calibration)
    for plan in _fixed(original):
        models[f"fixed {plan}"] = mr.convert(original, mr.ReusePlan.parse(plan), calibration)
    calls = {name: (lambda model=model: model(**timed)) for name, model in models.items()}
    times = time_interleaved(calls, repeats=_REPEATS, precision=_PRECISION)
    return {
        "points": {
            name: {
                "error": error(model),
                "latency": times[name].median / times["original"].median,
                "spread": times[name].spread,
                "plan": None if (plan := mr.plan_of(model)) is None else json.loads(plan.to_json())["layers"],
            }
            for name, model in models.items()
        },
        "predicted": {f"searched {number}": one.predicted for number, one in enumerate(found)},
        "measured_by_search": {f"searched {number}": one.latency for number, one in enumerate(found)},
    }


def _fixed(original: nn.Module) -> list[str]:
    """Fixed grouping: groups of every size, and groups over the upper half alone."""
    depth = getattr(original.config, "num_hidden_layers", None) or original.config.encoder_config.num_hidden_layers
    half = depth // 2
    groups = [f"{size}x{depth // size}" + (f",{depth % size}x1" if depth % size else "") for size in (2, 3, 4, depth)]
    return [*groups, f"1x{half},{depth - half}x1", f"1x{depth - 2},2x1"]


def _refitted(original: nn.Module, plan: mr.ReusePlan, batches: Sequence[Batch]) -> nn.Module:
    model = mr.apply(copy.deepcopy(original), plan)
    refit(model, original, batches)
    return model


def _plot(compared: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("searched", "o-"), ("fixed", "s")):
        own = [point for key, point in compared["points"].items() if key.startswith(kind)]
        points = sorted((point["latency"], point["error"]) for point in own)
        axes.plot(*zip(*points, strict=True), marker, label={"searched": "search", "fixed": "fixed grouping"}[kind])
    axes.set_title(f"{compared['model']}, {compared['machine']['instructions']}")
    axes.set_xlabel("time, by the original's")
    axes.set_ylabel(ERRORS[compared["model"]])
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _page(results: dict[str, Any]) -> str:
    lines = [
        "# Search against fixed grouping",
        "",
        f"Written by `{results['command']}`. Judged on data that neither calibration nor search saw. No training.",
        "Time: by the original's, all models in turns, with half the range between quartiles; plans whose times are",
        "nearer than that are not told apart. The original took other times in the search than here, where more",
        "models are in memory, so that ratios differ: compare plans within a column. In the search: as measured, and",
        "by its cost model calibrated in that run.",
        "",
    ]
    for key, compared in results["models"].items():
        name, here = compared["model"], compared["machine"]
        where = f"{here['processor']}, {here['instructions']}, {here['cores']} cores"
        lines += [f"## {name} ({where})", "", f"![{name}](pareto-{key}.png)", ""]
        lines += [f"| plan | {ERRORS[name]} | time | in the search |", "|---|---|---|---|"]
        for key, point in sorted(compared["points"].items(), key=lambda item: item[1]["latency"]):
            predicted = compared["predicted"].get(key)
            cells = [key, f"{point['error']:.4f}", f"{point['latency']:.2f} ± {point['spread']:.0%}"]
            if predicted is not None:
                cells.append(f"{compared['measured_by_search'][key]:.2f}, {predicted:.2f}")
            lines.append(f"| {' | '.join([*cells, ''][:4])} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
