"""Write lab/results/speed/README.md from the JSON files beside it; with --check, fail if it is out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapreuse.console import Table
from mapreuse.measure import bench_tables

SPEED = Path(__file__).parent.parent / "results" / "speed"

Results = dict[str, Any]

_MINILM = "A trained text encoder, 6 layers of width 384. Maps are shared by index: quality is not measured here."

SECTIONS = {
    "conformer": ("Conformer-M", "The papers' encoder: 16 layers of width 256, relative positions, subsampling."),
    "conformer-long": ("Conformer-M, long inputs", "One run of each contestant."),
    "conformer-8": ("Conformer-M, eight inputs at a time", "Longer inputs take minutes a run and were left out."),
    "compile": ("torch.compile", "The layers of Conformer-M at short lengths."),
    "minilm-1": ("all-MiniLM-L6-v2, one text at a time", _MINILM),
    "minilm": ("all-MiniLM-L6-v2, eight texts at a time", _MINILM),
    "memory": ("Peak memory of Conformer-M", "Above weights and inputs, with each storage of shared maps."),
    "long": ("Long recordings", "One pass of Conformer-M with `+optimize`, without warm-up."),
}
"""Files, their titles, and a line about each."""


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
    shown = {name: files[name] for name in SECTIONS if name in files}
    machine = next(iter(shown.values()))["machine"]
    lines = [
        "# Speed",
        "",
        "Each cell has the speed-up over `sdpa`, then the latency in float32. `sdpa` is the fused attention of",
        "transformers; `sdpa+openvino` and `sdpa+onnx` are the same model in OpenVINO and ONNX Runtime. `mapreuse",
        "full` has the exact kernels of mapreuse, `mapreuse 4x4` four groups of four layers that share a map.",
        "`+optimize` also makes convolutions and linear layers faster, which has nothing to do with shared maps.",
        "`+int8` is quantised; its error is relative to the same plan in float32 (random weights for Conformer-M).",
        "Contestants took turns; speed-ups are medians of quotients. `make speed` measures everything again,",
        "`make speed-conformer` and the like one file, and `make readme` writes this page.",
        "",
        f"Machine: {describe(machine)}; torch {machine['torch']}, transformers {machine['transformers']}.",
    ]
    for name, results in shown.items():
        title, note = SECTIONS[name]
        lines += ["", f"## {title}", "", note]
        if describe(results["machine"]) != describe(machine):
            lines.append(f"Measured on another machine: {describe(results['machine'])}.")
        tables = [OTHER_TABLES[name](results)] if name in OTHER_TABLES else bench_tables(results)
        for table in tables:
            lines += ["", *([f"{table.title}.", ""] if table.title else []), table.markdown()]
            lines += ["", *(f"- {text}" for text in table.notes)] if table.notes else []
    lines += ["", "## Commands", ""]
    return [*lines, *(f"- `{name}.json`: `{results['command']}`" for name, results in shown.items())]


def describe(machine: dict[str, Any]) -> str:
    """Processor, cores and vector instructions."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}"


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
    "long": long_table,
}
"""Tables of the files that `bench` did not write."""


if __name__ == "__main__":
    sys.exit(main())
