"""Time and memory for converting a model of BERT-base's size; results in lab/results/conversion/.

    python lab/experiments/bert_base.py DIRECTORY    # measure, then write the page
    python lab/experiments/bert_base.py              # write the page from bert_base.json

The model is a `BertModel` of 12 layers of width 768 with random weights and peaked maps, with the tokenizer of
DIRECTORY (as for minilm.py). `mapreuse convert` converts it on 256 sentences of Debian's fortunes, by a plan and by a
budget, each in its own process. Run it alone on the machine.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import calibration_sentences
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from mapreuse.console import Table
from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "results/conversion/bert_base.json"
NUM_SENTENCES = 256
OPTIONS = ("--plan 4x3", "--budget 'error<=0.02'")


def main() -> None:
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _model().save_pretrained(folder / "bert-base")
            AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(folder / "bert-base")
            (folder / "sentences.txt").write_text("\n".join(calibration_sentences()[:NUM_SENTENCES]))
            conversions = [_convert(folder, options, f"converted-{number}") for number, options in enumerate(OPTIONS)]
        results = {"schema": 3, "machine": machine(), "conversions": conversions}
        TARGET.write_text(json.dumps(results, indent=1) + "\n")
    TARGET.with_suffix(".md").write_text(_page(json.loads(TARGET.read_text())))


def _convert(folder: Path, options: str, out: str) -> dict[str, Any]:
    """One conversion: its time, its peak memory and its output."""
    arguments = (
        f"convert bert-base {options} --calibration sentences.txt --max-batches {NUM_SENTENCES // 8} --out {out}"
    )
    program = [sys.executable, "-c", "from mapreuse.cli import main; main()", *shlex.split(arguments)]
    begun = time.perf_counter()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(program, cwd=folder, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        raise SystemExit(f"mapreuse {arguments}: exit status {process.returncode}")
    shown = [line for line in lines if line.startswith(("error,", "latency", "parameters"))]
    return {
        "command": f"mapreuse {arguments}",
        "seconds": seconds,
        "peak_bytes": used.ru_maxrss * 1024,
        "output": shown,
    }


def _model() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False)
    for layer in model.encoder.layer:
        for projection in (layer.attention.self.query, layer.attention.self.key):
            nn.init.normal_(projection.weight, std=0.07)
    return model


def _page(results: dict[str, Any]) -> str:
    here = results["machine"]
    lines = [
        "# Time and memory for converting a model of BERT-base's size",
        "",
        f"Command: `python lab/experiments/bert_base.py DIRECTORY`. Machine: {here['processor']},",
        f"{here['instructions']}, {here['cores']} cores, mapreuse {here['mapreuse']}, commit {here['commit']}.",
        "Later versions weigh all channels equally in the refit. Latencies of 0.1.0 include what `mapreuse.optimize`",
        "does now.",
        "",
        f"12 layers of width 768 with random weights, so the errors mean nothing; {NUM_SENTENCES} sentences. Times",
        "include starting the program and loading the model.",
        "",
        Table(
            "",
            ["command", "time", "peak memory"],
            [
                [f"`{one['command']}`", f"{one['seconds']:.0f} s", f"{one['peak_bytes'] / 1e9:.2f} GB"]
                for one in results["conversions"]
            ],
        ).markdown(),
    ]
    for one in results["conversions"]:
        lines += ["", f"Output of `{one['command'].partition(' --calibration')[0]}`:", ""]
        lines += [f"    {line}" for line in one["output"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
