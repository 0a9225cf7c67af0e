"""Time and peak memory of one pass over 20 minutes and over an hour of audio; write lab/results/speed/long.json.

    python lab/experiments/long_audio.py

The model has the layers of Conformer-M, with `mapreuse.optimize`. Each pass runs in a fresh process, once, without
warm-up. Two CPU threads, float32.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.benchmarks import open_encoder

import mapreuse as mr
from mapreuse.measure import machine, peak_memory

TARGET = Path(__file__).parent.parent / "results/speed/long.json"
THREADS = 2
PASSES = (("20 minutes", 30_000, "4x4", "dense8"), ("20 minutes", 30_000, "full", ""), ("1 hour", 90_000, "full", ""))
"""Recording, number of encoder frames of 40 ms, plan, and storage of shared maps."""


def main() -> None:
    torch.set_num_threads(THREADS)
    results = {"schema": 1, "command": "python lab/experiments/long_audio.py", "machine": machine()}
    rows = []
    for one in PASSES:
        print(*filter(None, map(str, one)), flush=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(one_pass, one))
        print(f"{rows[-1]['seconds']:.0f} s, {rows[-1]['memory_bytes'] / 1e9:.2f} GB", flush=True)
        TARGET.write_text(json.dumps(results | {"passes": rows}, indent=1) + "\n")


def one_pass(recording: str, length: int, plan: str, storage: str) -> dict[str, Any]:
    """Run the encoder once."""
    torch.set_num_threads(THREADS)
    model, batches = open_encoder("conformer-m", (length,))
    mr.apply(model, mr.ReusePlan.parse(plan, num_layers=16), storage=storage or "dense")
    mr.optimize(model.eval())
    seconds = []

    def run() -> None:
        with torch.inference_mode():
            started = time.perf_counter()
            model(**batches[str(length)])
            seconds.append(time.perf_counter() - started)

    memory = peak_memory(run, "cpu")
    row = {"recording": recording, "length": length, "plan": plan, "storage": storage}
    return row | {"seconds": seconds[0], "memory_bytes": memory}


if __name__ == "__main__":
    main()
