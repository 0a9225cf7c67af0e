"""Speech recognisers with shared maps, before and after five minutes of training; results in lab/results/conversion/.

    python lab/experiments/recovery.py en baseline
    python lab/experiments/recovery.py es study
    python lab/experiments/recovery.py            # write the page from recovery.json

The second argument is the directory of a recogniser, "baseline" for the lab's English one, or "study" for the full
study's first recogniser of that language, which is trained if it is missing. Each plan is evaluated with heads shared
by index and nothing refitted, after `mr.convert` (aligned and refitted), and after five minutes of training on CTC
and the original's outputs with one thread. So is the original itself. Plans in recovery.json are not measured again;
two languages may run at once.
"""

from __future__ import annotations

import copy
import fcntl
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.study import Run, RunDirectory
from mapreuse_lab.training import BASELINE, Recogniser, TrainConfig, evaluate, open_corpus, speech_batches, train
from torch import nn

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.measure import machine

FILE = Path(__file__).parent.parent / "results/conversion/recovery.json"
TRAINING = TrainConfig(seconds=300, learning_rate=3e-4, warmup=0.1, evaluate_every=100)
WORK = Path("runs/recovery")
NUM_BATCHES = 16
"""Calibration batches of 8 utterances each."""


def main() -> None:
    if len(sys.argv) > 1:
        _measure(*sys.argv[1:])
    FILE.with_suffix(".md").write_text(_page(json.loads(FILE.read_text())))


def _measure(language: str, recogniser: str) -> None:
    torch.set_num_threads(1)
    if recogniser == "study":
        original = _from_study(language)
    else:
        original = Recogniser.load(BASELINE if recogniser == "baseline" else recogniser)
    corpus = open_corpus(f"prompts:{language}")
    calibration = speech_batches(original, f"prompts:{language}", split="train", max_batches=NUM_BATCHES)
    depth = original.model.config.encoder_config.num_hidden_layers

    def scores(model: nn.Module) -> dict[str, Any]:
        found = asdict(evaluate(original.with_model(model), corpus.test))
        return {name: value for name, value in found.items() if name not in ("references", "hypotheses")}

    def row(name: str, plan: mr.ReusePlan | None) -> dict[str, Any]:
        model = copy.deepcopy(original.model) if plan is None else mr.convert(original.model, plan, calibration)
        found = {} if plan is None else {"naive": scores(mr.convert(original.model, plan))}
        found["refitted"] = scores(model)
        trained = original.with_model(model)
        train(trained, corpus, TRAINING, WORK / f"{language}-{name.replace(' ', '-')}", original=original)
        found["trained"] = scores(trained.model)
        return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    half = depth // 2
    plans = {
        "original": None,
        "groups of 2": mr.ReusePlan.grouped(depth, 2),
        "groups of 4": mr.ReusePlan.grouped(depth, 4),
        "upper half from one": mr.ReusePlan.parse(f"1x{half},{depth - half}x1"),
        "all from one": mr.ReusePlan.grouped(depth, depth),
    }
    for name, plan in plans.items():
        known = json.loads(FILE.read_text())["languages"] if FILE.exists() else {}
        if name not in known.get(language, {}):
            _keep(language, name, row(name, plan))


def _from_study(language: str) -> Recogniser:
    """The full study's recogniser with full attention, seed 0; trained if it is missing."""
    run, directory = Run("full", f"prompts:{language}", 0), RunDirectory(WORK / "study", WORK / "study")
    if directory.finished(run) is None:
        directory.perform(run)
    recogniser = directory.original(run)
    if recogniser is None:
        raise ValueError(f"training failed: {directory.failed(run)}")
    return recogniser


def _keep(language: str, name: str, row: dict[str, Any]) -> None:
    """Add a row to the file; another process may add rows at the same time."""
    here = machine()
    row["commit"] = here.pop("commit")
    with FILE.open("a+") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        results = json.loads(shared.read() or '{"schema": 1, "languages": {}}') | {"machine": here}
        results["languages"].setdefault(language, {})[name] = row
        shared.truncate(0)
        shared.write(json.dumps(results, indent=1) + "\n")


def _page(results: dict[str, Any]) -> str:
    here = results["machine"]
    lines = [
        "# Speech recognisers with shared maps",
        "",
        "Command: `python lab/experiments/recovery.py LANGUAGE RECOGNISER`. Machine: "
        f"{here['processor']}, {here['instructions']}, one thread,",
        f"mapreuse {here['mapreuse']}. Later versions train in the same way, but weigh all channels",
        "equally in the refit.",
        "",
        "Cells: greedy WER on the test split with its 95 % interval, then CER. English: the lab's recogniser, 8",
        "layers (`baseline`). Spanish: the full study's recogniser with full attention, 6 layers, seed 0 (`study`).",
        f"Refitted on {NUM_BATCHES} batches of 8 recordings, then trained for {TRAINING.seconds:.0f} s on CTC and",
        "the original's outputs; the weights with the best dev WER are kept. How many steps fit into this time",
        "depends on the machine.",
        "",
    ]
    for language, rows in sorted(results["languages"].items()):
        header = ["plan", "heads by index", "aligned, refitted", "trained 5 minutes", "parameters"]
        stages = ("naive", "refitted", "trained")
        cells = [
            [name, *(_cell(row.get(stage)) for stage in stages), f"{row['parameters']:,}"]
            for name, row in rows.items()
        ]
        lines += [f"## `prompts:{language}`", "", Table("", header, cells).markdown(), ""]
    return "\n".join(lines)


def _cell(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return "—"
    low, high = scores["wer_interval"]
    return f"{scores['wer']:.1%} [{low:.1%}, {high:.1%}], {scores['cer']:.1%}"


if __name__ == "__main__":
    main()
