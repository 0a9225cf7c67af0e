"""Write the tables of README.md and docs/ from committed results and from the options of the commands.

With --check, fail where one differs.

A table stands between `<!-- begin NAME table: make readme -->` and `<!-- end NAME table -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapreuse_lab import cli as lab_cli
from mapreuse_lab.study import read_results, significance, summary_tables
from mapreuse_lab.techniques import parse
from typer.main import get_command

from mapreuse import cli

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
    tables = {name: make() for name, make in TABLES.items()} | dict(option_tables())
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = MARKED.sub(lambda match: _block(match[1], tables[match[1]]), text)
        if fresh != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"{', '.join(map(str, stale))}: tables differ from lab/results; run make readme")
        return 1
    return 0


def _block(name: str, rows: list[str]) -> str:
    return "\n".join([f"<!-- begin {name} table: make readme -->", *rows, f"<!-- end {name} table -->"])


def results_table() -> list[str]:
    """README: quality beside speed-up, for three models."""
    quick, rows = _read("study/quick/results.json"), _read("conversion/minilm.json")["rows"]
    conformer, recogniser = quick["latency"]["conformer-m"], quick["latency"]["recogniser"]
    recovered = {variant["name"]: _wer(variant["recovered"]) for variant in quick["variants"]}

    def speed(name: str, measured: dict[str, Any]) -> str:
        return ", ".join(f"{_ratio(measured[length], name):.2f}× at {length}" for length in ("250", "1000", "3000"))

    def row(model: str, option: str, quality: str, speed_up: str) -> str:
        return f"| {model} | {option} | {quality} | {speed_up} |"

    return [
        "| model | option | quality | speed-up at T positions |",
        "|---|---|---|---|",
        row("Conformer-M size", "`optimize` alone", "same outputs", speed("transformers + optimize", conformer)),
        row("", "nothing shared, exact kernel", "same outputs", speed("full", conformer)),
        row("", "groups of 4", "random weights", speed("groups of 4", conformer)),
        row("", "groups of 4 + `optimize`", "random weights", speed("groups of 4 + optimize", conformer)),
        row(
            "speech recogniser",
            "nothing shared + `optimize`",
            f"WER {_wer(quick['baseline'])}",
            speed("full + optimize", recogniser),
        ),
        *(
            row("", f"{name} + `optimize`", f"WER {recovered[name]}", speed(f"{name} + optimize", recogniser))
            for name in ("groups of 2", "groups of 4")
        ),
        row("MiniLM", "`optimize` alone", "same outputs", _minilm_speed("sdpa+optimize")),
        row("", "nothing shared + `optimize`", "same outputs", _minilm_speed("mapreuse full+optimize")),
        row(
            "",
            "2 of 6 layers reuse + `optimize`",
            f"cosine {rows[MINILM[1][0]]['cosine']:.3f}",
            _minilm_speed("mapreuse 1x2,2x2+optimize"),
        ),
        row(
            "",
            "3 layers reuse + `optimize`, distilled",
            f"cosine {rows[MINILM[4][0]]['cosine']:.3f}",
            _minilm_speed("mapreuse 2x3+optimize"),
        ),
    ]


def _minilm_speed(contestant: str) -> str:
    batches = _read("speed/minilm.json")["batches"]
    return ", ".join(
        f"{found['ratios'][contestant]['sdpa']['median']:.2f}× at {name.split()[-1]}"
        for name, found in batches.items()
    )


def minilm_table() -> list[str]:
    """Guide to encoders: quality and speed of each option on MiniLM."""
    rows = _read("conversion/minilm.json")["rows"]
    lines = ["| option | cosine | top 10 | speed-up, 16 sentences | speed-up, 512 tokens |", "|---|---|---|---|---|"]
    for name, shown in MINILM:
        row = rows[name]
        speeds = (f"{1 / row['latency'][tokens]:.2f}×" for tokens in ("short", "512"))
        lines.append(f"| {shown} | {row['cosine']:.3f} | {row['top10_overlap']:.3f} | {' | '.join(speeds)} |")
    return lines


def memory_table() -> list[str]:
    """Guide to long audio: time and peak memory of each storage beside `transformers`."""
    ((length, measured),) = _read("speed/memory.json")["batches"].items()
    lines = [f"| T = {length} | time | peak memory |", "|---|---|---|"]
    for name, found in measured["contestants"].items():
        lines.append(f"| {name} | {found['median']:.2f} s | {found['memory_bytes'] / 1e6:,.0f} MB |")
    return lines


def long_table() -> list[str]:
    """Guide to long audio: one pass over recordings of 20 minutes and of an hour."""
    lines = ["| recording | plan | storage | time | peak memory |", "|---|---|---|---|---|"]
    lines += (
        f"| {one['recording']}, T = {one['length']:,} | {one['plan']} | {one['storage']} | "
        f"{one['seconds']:.0f} s | {one['memory_bytes'] / 1e9:.1f} GB |"
        for one in _read("speed/long.json")["passes"]
    )
    return lines


def techniques_table() -> list[str]:
    """Techniques of the full study: class, paper, quality and speed."""
    techniques = _read("study/full/results.json")["techniques"]
    (full,) = (technique for technique in techniques if technique["kind"] == "full")
    lines = [
        "| technique | class | paper | positions | CER against full | T = 1000 | T = 8000 |",
        "|---|---|---|---|---|---|---|",
    ]
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
        cells = (technique["title"], f"[{cls.__name__}]({file})", source, technique["positions"], quality, *speeds)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def option_tables() -> Iterator[tuple[str, list[str]]]:
    """Arguments and options of every command, by the command."""
    for name, app in (("mapreuse", cli.app), ("mapreuse-lab", lab_cli.app)):
        for command_name, command in get_command(app).commands.items():
            lines = ["| argument or option | meaning | default |", "|---|---|---|"]
            for parameter in command.params:
                shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
                default = "required" if parameter.required else parameter.default
                cell = "" if default in (None, False, "") else str(default)
                lines.append(f"| `{shown}` | {parameter.help} | {cell} |")
            yield f"{name} {command_name}", lines


def _quick_table(index: int) -> list[str]:
    """A main table of the quick study: error rates (0), latency of the recogniser (1) and of Conformer-M (2)."""
    return summary_tables(read_results(RESULTS / "study/quick"))[index].markdown().splitlines()


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _ratio(measured: dict[str, Any], name: str) -> float:
    return measured["transformers"]["median"] / measured[name]["median"]


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
