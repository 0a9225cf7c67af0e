"""Write lab/results/speed/README.md from the JSON files beside it; with --check, fail if it is out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapreuse.console import Table
from mapreuse.measure import latency_text

SPEED = Path(__file__).parent.parent / "results" / "speed"

Results = dict[str, Any]

SECTIONS = {
    "encoder": ("Conformer-M, encoder layers", "The papers' encoder: 16 layers of width 256, relative positions."),
    "two": ("Conformer-M, two maps", "With groups of 8 layers, two layers compute a map."),
    "whole": ("Conformer-M with its front end", "Subsampling included, which no plan makes faster."),
    "compiled": ("Conformer-M under torch.compile", "`+optimize` has no effect in compiled code."),
    "plain": ("Conformer-M without relative positions", "`sdpa` is a fused kernel here."),
    "minilm": ("all-MiniLM-L6-v2", "A trained sentence encoder, 6 layers of width 384; 16 texts per batch."),
    "bert": ("BERT-base", "12 layers of width 768, absolute positions."),
    "training": ("A training step of Conformer-M", "Forward and backward, with dropout; `+optimize` has no effect."),
    "bfloat16": ("Conformer-M in bfloat16", "On a processor with fast bfloat16 products (AMX)."),
    "memory": ("Peak memory of Conformer-M", "In addition to weights and inputs, with each storage of shared maps."),
    "storage": ("Storages of shared maps", "`auto` takes the fastest one that fits a quarter of the memory."),
    "long": ("Long recordings", "One pass of Conformer-M with `+optimize`, without warm-up."),
    "kernels": (
        "Attention kernels and matrix products",
        "Latency of one layer's kernel, relative to the matrix products (PyTorch's, by MKL) that it has to do.",
    ),
    "breakdown": ("Where the time goes", "Share of a forward pass of Conformer-M, front end included."),
}


def main() -> int:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(SPEED.glob("*.json"))}
    text = "\n".join(page(files)) + "\n"
    target = SPEED / "README.md"
    if "--check" not in sys.argv:
        target.write_text(text)
    elif target.read_text() != text:
        print("lab/results/speed/README.md does not match the JSON files; run make readme")
        return 1
    return 0


def page(files: dict[str, Results]) -> list[str]:
    """The page: a table for each JSON file, then the command of each."""
    machine = files["encoder"]["machine"]
    lines = [
        "# Speed",
        "",
        "Latency of encoders with random weights, batch 1, float32, 2 CPU threads. `sdpa` and `eager` are the",
        "attention implementations of transformers. `mapreuse full` is the same model with mapreuse's exact kernels;",
        "`mapreuse 4x4` has 4 groups of 4 layers that share a map. `+optimize` also makes convolutions and linear",
        "layers faster, which has nothing to do with shared maps: compare rows with it to `sdpa+optimize`.",
        "Contestants took turns; speed-ups are medians of quotients. `make speed` measures everything again,",
        "`make speed-encoder` and the like one file, and `make readme` writes this page.",
        "",
        f"Machine: {describe(machine)}; torch {machine['torch']}, transformers {machine['transformers']}.",
    ]
    for name, (title, note) in SECTIONS.items():
        if name in files:
            lines += ["", f"## {title}", "", note]
            if describe(files[name]["machine"]) != describe(machine):
                lines.append(f"Measured on another machine: {describe(files[name]['machine'])}.")
            lines += ["", OTHER_TABLES.get(name, bench_table)(files[name]).markdown()]
    lines += ["", "## Commands", ""]
    return [*lines, *(f"- `{name}.json`: `{results['command']}`" for name, results in files.items())]


def describe(machine: dict[str, Any]) -> str:
    """Processor, cores and vector instructions."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}"


def bench_table(results: Results) -> Table:
    """Contestants by length: latency, speed-up over each attention implementation of transformers, memory."""
    batches = results["batches"]
    cells = [cell for at in batches.values() for cell in at["contestants"].values()]
    others = list(dict.fromkeys(other for at in batches.values() for row in at["ratios"].values() for other in row))
    others = [name for name in others if not name.startswith("mapreuse")] or others
    with_memory = any("memory_bytes" in cell for cell in cells)
    rows = []
    for length, at in batches.items():
        for name, cell in at["contestants"].items():
            stored = f" ({cell['chosen_storage']})" if "chosen_storage" in cell else ""
            ratios = at["ratios"].get(name, {})
            row = [length, name + stored, latency_text(cell)]
            row += [f"{ratios[other]['median']:.2f}×" if other in ratios else "" for other in others]
            row += [f"{cell['memory_bytes'] / 1e6:.0f} MB" if "memory_bytes" in cell else ""] * with_memory
            rows.append(row)
    header = ["T", "", "latency", *(f"speed-up over {name}" for name in others), *["peak memory"] * with_memory]
    return Table("", header, rows)


def kernel_table(results: Results) -> Table:
    """Ratios of kernels to products, and growth, by length."""
    lengths = results["lengths"]
    names = next(iter(lengths.values()))["ratios"]
    rows = [[name, *(f"{at['ratios'][name]['median']:.2f}" for at in lengths.values())] for name in names]
    return Table("", ["", *(f"T = {length}" for length in lengths)], rows)


def breakdown_table(results: Results) -> Table:
    """Share of each part of a forward pass, by length and contestant."""
    breakdowns = results["breakdowns"]
    parts = [part for part in results["parts"] if any(one["parts"][part]["seconds"] for one in breakdowns)]
    rows = [
        [results["parts"][part], *(f"{one['parts'][part]['seconds'] / one['attributed']:.0%}" for one in breakdowns)]
        for part in parts
    ]
    rows.append(["milliseconds", *(f"{1000 * one['whole']['seconds']:.0f}" for one in breakdowns)])
    return Table("", ["", *(f"{one['name']}, T = {one['batch']}" for one in breakdowns)], rows)


def long_table(results: Results) -> Table:
    """Time and memory of one pass over each recording."""
    rows = [
        [
            f"{one['recording']}, T = {one['length']:,}",
            one["plan"],
            one["storage"],
            f"{one['seconds']:.0f} s",
            f"{one['memory_bytes'] / 1e9:.2f} GB",
        ]
        for one in results["passes"]
    ]
    return Table("", ["recording", "plan", "storage", "time", "peak memory"], rows)


OTHER_TABLES = {
    "kernels": kernel_table,
    "breakdown": breakdown_table,
    "long": long_table,
}
"""Tables of the files that `mapreuse-lab bench` did not write."""


if __name__ == "__main__":
    sys.exit(main())
