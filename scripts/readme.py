"""Put the figures of results/quick and results/full into README.md and docs/papers.md; with --check fail on drift."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapreuse.study import error_table, latency_table, markdown, papers_page, summary_table

ROOT = Path(__file__).parent.parent


def main() -> int:
    quick, full = _results("quick"), _results("full")
    tables: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    if quick is not None:
        tables["error"] = error_table(quick)
        tables["latency"] = latency_table(quick["latency"]["conformer-m"])
    if full is not None:
        tables["technique"] = summary_table(full)
        tables["verdict"] = [f"- {sentence}" for sentence in full["verdict"]]
        files["docs/papers.md"] = papers_page(full)
        files["results/full/report.md"] = markdown(full)
    try:
        files["README.md"] = _with_tables((ROOT / "README.md").read_text(), tables)
    except ValueError as missing:
        print(missing)
        return 1
    for name, fresh in files.items():
        if "--check" not in sys.argv:
            (ROOT / name).write_text(fresh)
        elif not (ROOT / name).is_file() or (ROOT / name).read_text() != fresh:
            print(f"{name} does not show the figures of results; run make readme")
            return 1
    return 0


def _results(preset: str) -> dict[str, Any] | None:
    file = ROOT / "results" / preset / "results.json"
    if not file.is_file():
        print(f"results/{preset} holds no results: their figures are not shown")
        return None
    return json.loads(file.read_text())


def _with_tables(text: str, tables: dict[str, list[str]]) -> str:
    for name, rows in tables.items():
        begin, end = f"<!-- begin {name} table: make readme -->", f"<!-- end {name} table -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"README.md has no place for the {name} table: {begin}")
        text = before + "\n".join([begin, *rows, end]) + after
    return text


if __name__ == "__main__":
    sys.exit(main())
