"""Write the tables of README.md and docs/ from committed results and from the options of the commands.

With --check, fail where one differs.

A table stands between `<!-- begin NAME table: make readme -->` and `<!-- end NAME table -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapreuse_lab import cli as lab_cli
from mapreuse_lab.study import read_results, significance, summary_tables
from mapreuse_lab.techniques import parse
from typer.main import get_command

from mapreuse import cli
from mapreuse.console import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "lab/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
MARKED = re.compile(r"<!-- begin ([\w -]+) table: make readme -->\n(.*?)<!-- end \1 table -->", re.DOTALL)

MINILM = (
    ("no layer reuses", "nothing shared"),
    ("2 layers, aligned and refitted", "2 of 6 layers reuse, refitted"),
    ("24 heads, aligned and refitted", "24 of 72 heads reuse, refitted"),
    ("3 layers, aligned and refitted", "3 layers reuse, refitted"),
    ("3 layers, distilled 10 minutes", "3 layers reuse, distilled 10 minutes"),
    ("36 heads, distilled 10 minutes", "36 heads reuse, distilled 10 minutes"),
    ("1 layer dropped, distilled 10 minutes", "1 layer dropped, distilled 10 minutes"),
)
"""Rows of lab/results/conversion/minilm.json, and what the guide calls them."""


def main() -> int:
    """Update the pages, or with --check list those that are out of date."""
    tables = option_tables()
    for name, make in TABLES.items():
        try:
            tables[name] = make()
        except FileNotFoundError as missing:
            print(f"{missing.filename} is missing: the table {name!r} stays as it is")
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = MARKED.sub(lambda match: _block(match[1], tables[match[1]]) if match[1] in tables else match[0], text)
        if fresh != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"{', '.join(map(str, stale))}: tables differ from lab/results; run make readme")
        return 1
    return 0


def _block(name: str, table: Table) -> str:
    text = "\n\n".join([table.markdown(), *table.notes])
    return f"<!-- begin {name} table: make readme -->\n{text}\n<!-- end {name} table -->"


def results_table() -> Table:
    """README: quality beside speed-up, for three models."""
    conformer, minilm = _read("speed/conformer.json")["batches"], _read("speed/minilm-1.json")["batches"]
    quick = _read("study/quick/results.json")
    recogniser = quick["latency"]["recogniser"]
    recovered = {variant["name"]: _wer(variant["recovered"]) for variant in quick["variants"]}

    def speeds(batches: dict[str, Any], name: str, lengths: Sequence[str]) -> str:
        found = {label.split()[-1]: at["ratios"].get(name, {}).get("sdpa") for label, at in batches.items()}
        return ", ".join(f"{found[length]['median']:.2f}× at {length}" for length in lengths if found.get(length))

    def recogniser_speeds(name: str) -> str:
        return ", ".join(f"{_ratio(recogniser[length], name):.2f}× at {length}" for length in ("250", "1000", "2000"))

    conformers = (
        ("sdpa+openvino", "OpenVINO", "same outputs"),
        ("sdpa+openvino+int8", "OpenVINO int8", "random weights"),
        ("mapreuse full+optimize", "exact kernel + `optimize`", "same outputs"),
        ("mapreuse full+openvino+kernels+int8", "exact kernel in OpenVINO int8", "random weights"),
        ("mapreuse 4x4+optimize", "groups of 4 + `optimize`", "random weights"),
        ("mapreuse 4x4+openvino+kernels+int8", "groups of 4 in OpenVINO int8", "random weights"),
    )
    pairs = _read("int8/minilm.json")
    cosines = {name: f"cosine {metrics['cosine']['value']:.3f}" for name, metrics in pairs["metrics"].items()}
    encoders = (
        ("sdpa+openvino+int8", "OpenVINO int8", cosines["original, openvino int8"]),
        ("mapreuse 1x2,2x2+openvino+kernels", "2 of 6 layers reuse, OpenVINO", cosines["refitted"]),
    )
    long, short = ("250", "1000", "2000"), ("20", "128", "512")
    cells = [["", option, quality, speeds(conformer, name, long)] for name, option, quality in conformers]
    cells += [
        ["", "exact kernel + `optimize`", f"WER {_wer(quick['baseline'])}", recogniser_speeds("full+optimize")],
        [
            "",
            "groups of 4 + `optimize`",
            f"WER {recovered['groups of 4']}",
            recogniser_speeds("groups of 4+optimize"),
        ],
    ]
    cells += [_moonshine_row(quick["pretrained"])]
    cells += [["", option, quality, speeds(minilm, name, short)] for name, option, quality in encoders]
    for row, model in (
        (0, "Conformer-M size"),
        (len(conformers), "speech recogniser"),
        (len(conformers) + 2, "Moonshine tiny"),
        (len(conformers) + 3, "MiniLM"),
    ):
        cells[row][0] = model
    threads = _read("speed/conformer.json")["config"]["threads"]
    note = (
        "Word error rates have their 95 % interval. One input at a time with "
        f"{threads} CPU thread{'s' * (threads > 1)} (recognisers: 2); float32 or int8. "
        f"MiniLM: quality of plan `{pairs['plan']}`, speed of `1x2,2x2`; two layers reuse in both."
    )
    return Table("", ["model", "option", "quality", "speed-up at T positions"], cells, [note])


def _moonshine_row(found: dict[str, Any]) -> list[str]:
    """README: the pretrained recogniser with half of the layers of its encoder reusing, after recovery."""
    before, after = (found["quality"]["2x3"][stage]["WER"]["value"] for stage in ("original", "recovered"))
    at = {
        name: batch["ratios"]["mapreuse 2x3+openvino"]["sdpa"]["median"]
        for name, batch in found["latency"]["batches"].items()
    }
    speeds = ", ".join(f"{ratio:.2f}× at {name}" for name, ratio in at.items())
    return [
        "",
        "3 of 6 encoder layers reuse, OpenVINO",
        f"WER {after:.1%}, original {before:.1%}",
        f"encoder {speeds}",
    ]


def minilm_table() -> Table:
    """Guide to encoders: quality and speed of each option on MiniLM."""
    rows = []
    for name, shown in MINILM:
        row = _read("conversion/minilm.json")["rows"][name]
        speeds = (f"{1 / row['latency'][tokens]:.2f}×" for tokens in ("short", "512"))
        rows.append([shown, f"{row['cosine']:.3f}", f"{row['top10_overlap']:.3f}", *speeds])
    return Table("", ["option", "cosine", "top 10", "speed-up, 16 sentences", "speed-up, 512 tokens"], rows)


def memory_table() -> Table:
    """Guide to long audio: time and peak memory of each storage beside `transformers`."""
    ((length, measured),) = _read("speed/memory.json")["batches"].items()
    rows = [
        [name, f"{found['median']:.2f} s", f"{found['memory_bytes'] / 1e6:,.0f} MB"]
        for name, found in measured["contestants"].items()
    ]
    return Table("", [f"T = {length}", "time", "peak memory"], rows)


def long_table() -> Table:
    """Guide to long audio: one pass over recordings of 20 minutes and of an hour."""
    rows = [
        [
            *(f"{one['recording']}, T = {one['length']:,}", one["plan"], one["storage"]),
            *(f"{one['seconds']:.0f} s", f"{one['memory_bytes'] / 1e9:.1f} GB"),
        ]
        for one in _read("speed/long.json")["passes"]
    ]
    return Table("", ["recording", "plan", "storage", "time", "peak memory"], rows)


def techniques_table() -> Table:
    """Techniques of the full study: class, paper, quality and speed."""
    techniques = _read("study/full/results.json")["techniques"]
    (full,) = (technique for technique in techniques if technique["kind"] == "full")
    rows = []
    for technique in techniques:
        cls = type(parse(technique["name"]))
        (scores,) = (scores for corpus, scores in technique["scores"].items() if corpus == "prompts:en")
        difference = scores.get("against_full", {}).get("cer")
        quality = "" if difference is None else f"{100 * difference['difference']:+.1f} points"
        if difference is not None and (outcome := significance(difference["interval"])):
            quality += f", significantly {outcome}"
        speeds = [
            f"{full['latency'][length]['median'] / technique['latency'][length]['median']:.2f}×"
            for length in ("1000", "8000")
        ]
        file = f"../lab/{cls.__module__.replace('.', '/')}.py"
        source = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", technique["source"])
        linked = f"[{cls.__name__}]({file})"
        rows.append([technique["title"], linked, source, technique["positions"], quality, *speeds])
    header = ["technique", "class", "paper", "positions", "CER against full", "T = 1000", "T = 8000"]
    return Table("", header, rows)


def option_tables() -> dict[str, Table]:
    """Arguments and options of every command, by the command."""
    tables = {}
    for name, app in (("mapreuse", cli.app), ("mapreuse-lab", lab_cli.app)):
        for command_name, command in get_command(app).commands.items():
            rows = []
            for parameter in command.params:
                shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
                default = "required" if parameter.required else parameter.default
                cell = "" if default in (None, False, "") else str(default)
                rows.append([f"`{shown}`", parameter.help, cell])
            tables[f"{name} {command_name}"] = Table("", ["argument or option", "meaning", "default"], rows)
    return tables


def _quick_table(index: int) -> Table:
    """A main table of the quick study: error rates (0), latency of the recogniser (1) and of Conformer-M (2)."""
    return summary_tables(read_results(RESULTS / "study/quick"))[index]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _ratio(measured: dict[str, Any], name: str) -> float:
    return measured["sdpa"]["median"] / measured[name]["median"]


def _wer(scores: dict[str, Any]) -> str:
    low, high = (f"{100 * end:.0f}" for end in scores["wer_interval"])
    return f"{scores['wer']:.1%} [{low}–{high}]"


TABLES = {
    "results": results_table,
    "minilm": minilm_table,
    "memory": memory_table,
    "long": long_table,
    "techniques": techniques_table,
    "error": lambda: _quick_table(0),
    "latency": lambda: _quick_table(2),
}


if __name__ == "__main__":
    sys.exit(main())
