"""Moonshine tiny with shared maps: word error rates before and after recovery; results in lab/results/recogniser/.

    python lab/experiments/moonshine.py convert 0           # a plan of PLANS: by index, aligned, refitted
    python lab/experiments/moonshine.py convert 4 472       # the same, calibrated on 472 recordings
    python lab/experiments/moonshine.py recover 1000 0      # encoder 2x3, 1000 steps of recovery, seed 0
    python lab/experiments/moonshine.py choose              # how to calibrate and refit, on the dev part
    python lab/experiments/moonshine.py                     # write the page from moonshine.json

The corpus is `prompts:en`; its parts have no transcript in common. The train part is for calibration and recovery,
the dev part for choices, the test part for the results. Rows in moonshine.json are not measured again, and an
interrupted recovery continues from its checkpoint. One thread.
"""

from __future__ import annotations

import copy
import fcntl
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mapreuse_lab.models import Metric, SpeechModel, models_under_plan

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.measure import machine

FILE = Path(__file__).parent.parent / "results/recogniser/moonshine.json"
WORK = Path("runs/moonshine")
ENCODER, DECODER = "model.encoder", "model.decoder"
PLANS = [
    ("encoder", ENCODER, "1x2,2x2"),
    ("encoder", ENCODER, "2x3"),
    ("encoder", ENCODER, "3x2"),
    ("decoder", DECODER, "2x3"),
    ("decoder.cross", f"{DECODER}.cross", "2x3"),
]
"""Which attention shares maps, the path of its layers, and the plan."""

CALIBRATION = 128
"""Number of recordings for alignment and refit."""

STAGES = ("by index", "aligned", "refitted")
RECOVERED = mr.ReusePlan.parse("2x3")
RECOVERY_SAMPLES, EVALUATION_SAMPLES = 800, 24
CHOICES = {"128 recordings": (128, 0), "128 varied samples": (0, 128), "512 recordings": (512, 0)}
"""Name, number of recordings of the train part, and number of samples of `SpeechModel.varied`."""


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        {"convert": _convert, "recover": _recover, "choose": _choose}[sys.argv[1]](*map(int, sys.argv[2:]))
    FILE.with_suffix(".md").write_text(_page(json.loads(FILE.read_text())))


def _convert(number: int, recordings: int = CALIBRATION) -> None:
    """The original, and a plan at every stage that depends on the number of calibration recordings."""
    speech = SpeechModel(num_calibration=recordings)
    attention, stack, plan = PLANS[number]
    if not _known("test", _name(attention, plan, "refitted", recordings)):
        for stage, model in models_under_plan(speech, mr.ReusePlan.parse(plan), stack):
            _measure("test", _name(attention, plan, stage, recordings), speech, lambda model=model: model)
    _measure("test", "full", speech, lambda: speech.model)


def _name(attention: str, plan: str, stage: str, recordings: int = CALIBRATION) -> str:
    """The name of a row."""
    more = "" if recordings == CALIBRATION or stage == STAGES[0] else f", {recordings} recordings"
    return f"{attention} {plan}, {stage}{more}"


def _choose() -> None:
    """The refitted encoder 2x3, on the dev part, for each choice of calibration data."""
    speech = SpeechModel(split="dev")
    _measure("dev", "full", speech, lambda: speech.model)
    for name, (recordings, samples) in CHOICES.items():
        _measure("dev", name, speech, partial(_refitted, speech, recordings, samples))


def _refitted(speech: SpeechModel, recordings: int, samples: int) -> Any:
    batches = SpeechModel(num_calibration=recordings).calibration() if recordings else speech.varied(samples)
    encoder, model = speech.model.get_submodule(ENCODER), copy.deepcopy(speech.model)
    converted = mr.apply(model.get_submodule(ENCODER), mr.align(encoder, RECOVERED, batches))
    mr.refit(converted, encoder, batches)
    return model


def _recover(steps: int, seed: int) -> None:
    """Train the refitted encoder 2x3 to match the original's hidden states on varied speech of five languages."""
    dev = SpeechModel(split="dev", num_calibration=CALIBRATION)
    name = f"encoder 2x3, {steps} steps, seed {seed}"
    _measure("dev", "full", dev, lambda: dev.model)
    if not _known("test", name):
        refitted = WORK / "refitted"
        if not refitted.exists():
            *_, (_, aligned_and_refitted) = models_under_plan(dev, RECOVERED)
            mr.save(aligned_and_refitted.get_submodule(ENCODER), refitted)
        encoder, original = mr.load(refitted), dev.model.get_submodule(ENCODER)
        batches = dev.varied(RECOVERY_SAMPLES, seed)
        held_out = dev.varied(EVALUATION_SAMPLES, split="dev")
        config = mr.DistillConfig(steps=steps, evaluate_every=100, patience=steps, bfloat16=False)
        done = mr.distill(encoder, original, batches, config, held_out=held_out, out_dir=WORK / f"{steps}-{seed}")
        model = copy.deepcopy(dev.model)
        model.model.encoder = encoder
        minutes = sum(one["input_values"].shape[-1] for one in batches) / 16000 / 60
        more = {"errors": [done.before, done.after], "training_seconds": done.elapsed, "minutes_of_audio": minutes}
        _measure("dev", name, dev, lambda: model)
        _measure("test", name, SpeechModel(), lambda: model, more)


def _known(split: str, name: str) -> Any:
    return json.loads(FILE.read_text()).get(split, {}).get(name) if FILE.exists() else None


def _measure(
    split: str, name: str, speech: SpeechModel, model: Callable[[], Any], more: dict[str, Any] | None = None
) -> None:
    """Error rates of a model, added to the file unless they are known; another process may add rows, too."""
    if _known(split, name):
        return
    print(f"{split}: {name}", flush=True)
    metrics = speech.evaluate(model())
    row = {one.name: one.sums.tolist() for one in metrics} | (more or {})
    here = machine()
    with FILE.open("a+") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        results = json.loads(shared.read() or '{"schema": 1}') | {"machine": here}
        results.setdefault(split, {})[name] = row
        shared.truncate(0)
        shared.write(json.dumps(results) + "\n")
    print(f"{split}: {name}: WER {metrics[0].text()}", flush=True)


def _page(results: dict[str, Any]) -> str:
    here, test = results["machine"], results["test"]
    lines = [
        "# Moonshine tiny with shared maps",
        "",
        "Command: `python lab/experiments/moonshine.py convert 0`, and the others at the top of that file. Machine:",
        f"{here['processor']}, {here['instructions']}, one thread, torch {here['torch']}, transformers "
        f"{here['transformers']}.",
        "",
        *(f"- {sentence}" for sentence in _findings(test)),
        "",
        f"Aligned and refitted on {CALIBRATION} recordings of the train part, unless a row says another number.",
        "Recovery (steps, seed) trains the refitted encoder to match the hidden states of the original on samples",
        "of the train parts of five languages, with varied speed, level and noise. The weights with the least",
        "error on such samples of the dev parts are kept. `decoder.cross`: the decoder's attention to the encoder.",
        "The test part has one voice; other voices are not measured. Brackets: 95 % bootstrap interval, paired in",
        "the last column.",
        "",
    ]
    for split, title in (("test", "The test part"), ("dev", "The dev part, for choices")):
        if split in results:
            lines += [f"## {title}", "", _table(results[split]).markdown(), ""]
    return "\n".join(lines)


def _findings(test: dict[str, Any]) -> list[str]:
    """What the rows of the test part say, in words."""
    metrics = {name: Metric("WER", "rate", np.array(row["WER"])) for name, row in test.items()}
    full, words = metrics["full"], int(np.array(test["full"]["WER"])[:, 1].sum())
    found = [
        f"Full attention has a WER of {full.text()} on {len(full.sums)} recordings with {words} words. A looping "
        "transcript counts more errors than words, so that rates can exceed 100 %."
    ]
    for attention, _, plan in PLANS:
        stages = [
            f"{one.value:.1%} {name.partition(', ')[2]}"
            for name, one in metrics.items()
            if name.startswith(f"{attention} {plan}, ") and "seed" not in name
        ]
        if stages:
            found.append(f"{attention.capitalize()} {plan}, without training: {', '.join(stages)}.")
    for name, one in metrics.items():
        if "seed" in name:
            row = test[name]
            found.append(
                f"{name.capitalize()}: {one.text()}, {one.text_against(full)} against full attention, after "
                f"{row['training_seconds'] / 60:.0f} minutes of training on {row['minutes_of_audio']:.0f} minutes of "
                "audio; the processor was shared with other work."
            )
    return found


def _table(rows: dict[str, Any]) -> Table:
    metrics = {name: Metric("WER", "rate", np.array(row["WER"])) for name, row in rows.items()}
    order = [f"{attention} {plan}, {stage}" for attention, _, plan in PLANS for stage in STAGES]
    names = [name for name in ("full", *order) if name in metrics]
    cells = [
        [name, metrics[name].text(), "" if name == "full" else metrics[name].text_against(metrics["full"])]
        for name in dict.fromkeys([*names, *sorted(metrics)])
    ]
    return Table("", ["model", "WER", "difference to full"], cells)


if __name__ == "__main__":
    main()
