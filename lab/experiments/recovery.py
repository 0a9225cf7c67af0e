"""What converting a speech recogniser costs, before and after five minutes of training, into lab/results/conversion/.

    python scripts/recovery.py en shipped
    python scripts/recovery.py es study

RECOGNISER is a directory of `mapreuse train`, "shipped" for the English one of this package, or "study" for the full
study's first of full attention, which is trained first where it is not there. Every plan is judged
with heads shared by index and nothing refitted (naive), aligned and refitted by `mr.convert` (no training), and after
five minutes of fine-tuning from there, by the transcripts (CTC) and towards the original's outputs, on one thread;
so is the original itself, trained as long. The corpus is the language's prompts, test split, greedy decoding. A plan
that lab/results/conversion/recovery.json holds is not done again; both languages may run at once, each in a process of its
own.
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
from mapreuse_lab.study import FullConfig
from mapreuse_lab.study._runs import Run, RunDirectory, work_off
from mapreuse_lab.training import BASELINE, Recogniser, TrainConfig, evaluate, open_corpus, speech_batches, train

import mapreuse as mr
from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "lab/results/conversion"
TRAINING = TrainConfig(seconds=300, learning_rate=3e-4, warmup=0.1, evaluate_every=100)
WORK = Path("runs/recovery")
NUM_BATCHES = 16
"""Calibration batches, of 8 utterances of the training split."""


def main() -> None:
    language, directory = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    if directory == "study":
        original = _studied(language)
    else:
        original = Recogniser.load(BASELINE if directory == "shipped" else directory)
    corpus = open_corpus(f"prompts:{language}")
    calibration = speech_batches(original, f"prompts:{language}", split="train", max_batches=NUM_BATCHES)
    depth = original.model.config.encoder_config.num_hidden_layers

    def judged(model: Any) -> dict[str, Any]:
        scores = asdict(evaluate(_with(original, model), corpus.test))
        return {name: scores[name] for name in scores if name not in ("references", "hypotheses")}

    def trained(model: Any, name: str) -> dict[str, Any]:
        recogniser = _with(original, model)
        out = WORK / f"{language}-{name.replace(' ', '-')}"
        train(recogniser, corpus, TRAINING, out, original=original)
        return judged(recogniser.model)

    def of_plan(name: str, plan: mr.ReusePlan) -> dict[str, Any]:
        refitted = mr.convert(original.model, plan, calibration)
        found = {"naive": judged(mr.convert(original.model, plan)), "refitted": judged(refitted)}
        return found | {"trained": trained(refitted, name), "parameters": _parameters(refitted)}

    def of_original() -> dict[str, Any]:
        again = copy.deepcopy(original.model)
        return {"refitted": judged(again), "trained": trained(again, "original"), "parameters": _parameters(again)}

    _keep(language, "original", of_original)
    for name, plan in _plans(depth).items():
        _keep(language, name, lambda name=name, plan=plan: of_plan(name, plan))
    (TARGET / "recovery.md").write_text(_page(json.loads((TARGET / "recovery.json").read_text())))


def _plans(depth: int) -> dict[str, mr.ReusePlan]:
    half = depth // 2
    return {
        "groups of 2": mr.ReusePlan.grouped(depth, 2),
        "groups of 4": mr.ReusePlan.grouped(depth, 4),
        "upper half from one": mr.ReusePlan.parse(f"1x{half},{depth - half}x1"),
        "all from one": mr.ReusePlan.grouped(depth, depth),
    }


def _studied(language: str) -> Recogniser:
    """The recogniser of full attention that the full study trains in this language, seed 0."""
    run = Run("full", f"prompts:{language}", 0, FullConfig().recipe)
    directory = RunDirectory(WORK / "study", WORK / "study")
    work_off([run], directory)
    recogniser = directory.original(run)
    if recogniser is None:
        raise ValueError(f"training failed: {directory.failed(run)}")
    return recogniser


def _with(recogniser: Recogniser, model: Any) -> Recogniser:
    other = copy.copy(recogniser)
    other.model = model
    return other


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _keep(language: str, name: str, make: Any) -> None:
    """Add a row to the file, unless it is there, beside what the other process adds."""
    file = TARGET / "recovery.json"
    file.touch()
    if name in json.loads(file.read_text() or "{}").get("languages", {}).get(language, {}):
        return
    here = machine()
    row = make() | {"commit": here.pop("commit")}
    with file.open("r+") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        results = json.loads(shared.read() or '{"schema": 1, "languages": {}}')
        results |= {"command": "python scripts/recovery.py LANGUAGE RECOGNISER", "machine": here}
        results["languages"].setdefault(language, {})[name] = row
        shared.seek(0)
        shared.truncate()
        shared.write(json.dumps(results, indent=1) + "\n")


def _page(results: dict[str, Any]) -> str:
    here = results["machine"]
    lines = [
        "# Speech recognisers, converted",
        "",
        f"Written by `{results['command']}` ({here['processor']}, {here['instructions']}), one thread: how",
        "many steps five minutes hold depends on the machine. Greedy test WER [95 %], CER. English: the shipped",
        "recogniser (8 layers, `shipped`); Spanish: the study's (6 layers, its `full`, seed 0), trained there.",
        f"Refitted on {NUM_BATCHES} batches of 8 recordings; then {TRAINING.seconds:.0f} s of training by the",
        "transcripts (CTC) and towards the original's outputs, the best of dev kept.",
        "",
    ]
    for language, rows in sorted(results["languages"].items()):
        lines += [
            f"## `prompts:{language}`",
            "",
            "| plan | naive sharing | aligned, refitted | after 5 minutes | parameters |",
            "|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            cells = [_cell(row.get(stage)) for stage in ("naive", "refitted", "trained")]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['parameters']:,} |")
        lines.append("")
    return "\n".join(lines)


def _cell(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return "—"
    low, high = scores["wer_interval"]
    return f"{scores['wer']:.1%} [{low:.1%}, {high:.1%}], {scores['cer']:.1%}"


if __name__ == "__main__":
    main()
