"""Compare the latency of shared maps in this version and in another commit.

    python lab/experiments/versions.py COMMIT

Fresh processes of both versions take turns, so that both meet the same disturbances. Each runs every case once as a
warm-up and then several times. The table shows medians over the turns of the quotient of two medians. One CPU thread,
float32, random weights: an encoder of MiniLM's size on token ids, and the layers of Conformer-M.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TURNS = 3
CASES = [
    *(("MiniLM", plan, length, 30 if length < 200 else 10) for plan in ("1x6", "2x3") for length in (20, 128, 512)),
    *(("Conformer-M", plan, length, 3) for plan in ("1x16", "4x4") for length in (250, 1000, 2000)),
]
"""Model, plan, number of positions, and number of timed calls in a turn."""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        other, turns = Path(directory) / "other", []
        subprocess.run(["git", "worktree", "add", "-q", "--detach", other, sys.argv[1]], cwd=ROOT, check=True)
        try:
            for library in (ROOT / "src/mapreuse/maps").glob("*.so"):
                (other / "src/mapreuse/maps" / library.name).write_bytes(library.read_bytes())
            for turn in range(TURNS):  # who comes first may matter
                found = {root: _measured(root) for root in ((other, ROOT) if turn % 2 else (ROOT, other))}
                turns.append((found[other], found[ROOT]))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    print(f"| model | plan | T | {sys.argv[1][:12]} | this version ÷ {sys.argv[1][:12]} |\n|---|---|---|---|---|")
    for index, (model, plan, length, _) in enumerate(CASES):
        quotients = [new[index] / old[index] for old, new in turns]
        before = statistics.median(old[index] for old, _ in turns)
        low, middle, high = statistics.quantiles(quotients, n=4)
        print(f"| {model} | {plan} | {length} | {before * 1e3:.1f} ms | {middle:.3f} [{low:.3f}, {high:.3f}] |")


def _measured(root: Path) -> list[float]:
    """Median seconds of each case, measured by the version in `root`."""
    paths = {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "lab")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> None:
    """Print the median seconds of each case."""
    import torch
    from mapreuse_lab.benchmarks import open_encoder
    from transformers import BertConfig, BertModel

    import mapreuse as mr

    torch.set_num_threads(1)
    found = []
    for name, plan, length, repeats in CASES:
        torch.manual_seed(0)
        if name == "MiniLM":
            config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
            model, batch = BertModel(config), {"input_ids": torch.randint(1000, 30000, (1, length))}
        else:
            model, batches = open_encoder("conformer-m", (length,))
            batch = batches[str(length)]
        mr.apply(model.eval(), mr.ReusePlan.parse(plan))
        seconds = []
        with torch.inference_mode():
            for _ in range(1 + repeats):
                started = time.perf_counter()
                model(**batch)
                seconds.append(time.perf_counter() - started)
        found.append(statistics.median(seconds[1:]))
    print(json.dumps(found))


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
