"""A small Conformer that Moonshine teaches, with and without attention; results in lab/results/recogniser/.

    python lab/experiments/conformer.py full 0          # a technique and a seed
    python lab/experiments/conformer.py diagonal 0      # every frame attends to itself
    python lab/experiments/conformer.py reuse-2x3 0     # one map for two layers
    python lab/experiments/conformer.py                 # write the page from conformer.json

Every technique is trained from scratch with the same samples, steps and settings, on the CTC loss and the error of
the teacher's encoder states. Convolutions are short, so that only attention brings distant frames together. The
weights with the best WER on the dev part are kept, and evaluated once on the test part. Rows in conformer.json are
not measured again, and an interrupted run continues from its checkpoint. One thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mapreuse_lab.models import Metric, SpeechModel, taught_corpus
from mapreuse_lab.techniques import parse
from mapreuse_lab.training import Errors, Recogniser, TrainConfig, alphabet, evaluate, train

from mapreuse.console import Table
from mapreuse.measure import machine

FILE = Path(__file__).parent.parent / "results/recogniser/conformer.json"
WORK = Path("runs/conformer")
TEACHER = "moonshine-tiny"
SAMPLES = 1000
"""Number of training samples; half of them are synthetic speech."""

SIZE = {"num_layers": 6, "hidden_size": 96, "intermediate_size": 288, "subsampling_channels": 32, "kernel_size": 3}
TRAINING = {
    "steps": 8000,
    "learning_rate": 2e-3,
    "batch_seconds": 20.0,
    "evaluate_every": 1000,
    "speeds": (1.0,),
    "noise_probability": 0.0,
    "mask_bands": 1,
    "mask_spans_per_second": 0.35,
    "teacher_weight": 1.0,
}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        _measure(sys.argv[1], int(sys.argv[2]))
    FILE.with_suffix(".md").write_text(_page(json.loads(FILE.read_text())))


def _measure(technique: str, seed: int) -> None:
    results = json.loads(FILE.read_text()) if FILE.exists() else {"schema": 1, "rows": {}}
    name = f"{technique}, seed {seed}"
    if name in results["rows"]:
        return
    corpus = taught_corpus(SpeechModel(TEACHER), TEACHER, SAMPLES)
    recogniser = Recogniser.create(alphabet(corpus.language), dropout=0.0, seed=seed, **SIZE)
    recogniser.compress(parse(technique))
    out = WORK / name.replace(", seed ", "-")
    train(recogniser, corpus, TrainConfig(seed=seed, **TRAINING), out)
    curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    scores = evaluate(recogniser, corpus.test)
    counts = Errors.of(scores.references, [scores.hypotheses]).counts
    results["rows"][name] = {
        **{metric: counts[metric].sum(0).tolist() for metric in ("wer", "cer")},
        "dev_wer": min(one["dev_wer"] for one in curve),
        "steps": curve[-1]["step"],
        "seconds": curve[-1]["elapsed"],
        "minutes_of_audio": sum(cut.duration for cut in corpus.train) / 60,
        "parameters": sum(one.numel() for one in recogniser.model.parameters()),
        "settings": {"size": SIZE, "training": TRAINING, "teacher": TEACHER, "samples": SAMPLES},
    }
    FILE.write_text(json.dumps(results | {"machine": machine()}) + "\n")
    print(f"{name}: {scores}", flush=True)


def _page(results: dict[str, Any]) -> str:
    here, rows = results["machine"], results["rows"]
    metrics = {name: Metric("WER", "rate", np.array(row["wer"])) for name, row in rows.items()}
    characters = {name: Metric("CER", "rate", np.array(row["cer"])) for name, row in rows.items()}
    cells = []
    for name, row in rows.items():
        full = metrics.get(f"full, {name.split(', ')[1]}")
        difference = metrics[name].text_against(full) if full and not name.startswith("full") else ""
        minutes = f"{row['seconds'] / 60:.0f}"
        shown = [metrics[name].text(), difference, characters[name].text(), f"{row['dev_wer']:.1%}"]
        cells.append([name, *shown, f"{row['steps']:,}", minutes, f"{row['parameters']:,}"])
    header = ["technique", "WER", "difference to full", "CER", "WER, dev", "steps", "minutes", "parameters"]
    first = next(iter(rows.values()))
    size, settings = first["settings"]["size"], first["settings"]["training"]
    lines = [
        "# A small Conformer taught by Moonshine",
        "",
        "Command: `python lab/experiments/conformer.py TECHNIQUE SEED`. Machine:",
        f"{here['processor']}, {here['instructions']}, one thread, torch {here['torch']}, shared with other work.",
        "",
        f"A Conformer with relative positions, {size['num_layers']} layers × {size['hidden_size']}, and convolutions "
        f"of {size['kernel_size']} frames,",
        f"is trained from scratch on {first['minutes_of_audio']:.0f} minutes of varied speech: half of the samples "
        "are recordings of the",
        "train part of `prompts:en`, half are synthetic voices. The loss is CTC plus "
        f"{settings['teacher_weight']:g} × the error of the encoder",
        "states of Moonshine tiny. Error rates: greedy decoding of the test part of `prompts:en`. Brackets: 95 %",
        "bootstrap interval over utterances, paired in the differences. It does not include the variation with the",
        f"seed: seeds per technique: {len({name.split(', ')[1] for name in rows})}.",
        "",
        Table("", header, cells).markdown(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
