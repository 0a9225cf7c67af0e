"""Put the tables of results/quick/results.json into README.md, or with --check fail when they differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mapreuse.study import error_table, latency_table

ROOT = Path(__file__).parent.parent


def main() -> int:
    measured = ROOT / "results/quick/results.json"
    if not measured.is_file():
        print("results/quick holds no results: README.md shows no figures")
        return 0
    results = json.loads(measured.read_text())
    tables = {"error": error_table(results), "latency": latency_table(results["latency"]["conformer-m"])}
    readme = ROOT / "README.md"
    text = fresh = readme.read_text()
    for name, rows in tables.items():
        begin, end = f"<!-- begin {name} table: make readme -->", f"<!-- end {name} table -->"
        block = "\n".join([begin, *rows, end])
        before, found_begin, rest = fresh.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            print(f"README.md has no place for the {name} table: {begin}")
            return 1
        fresh = before + block + after
    if "--check" not in sys.argv:
        readme.write_text(fresh)
    elif fresh != text:
        print("README.md does not show the figures of results/quick/results.json; run make readme")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
