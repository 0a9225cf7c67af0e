"""The study's report in Markdown."""

from __future__ import annotations

import json
import re
from typing import Any

from mapreuse_lab.study._page_tables import (
    GROUPING,
    LONGER,
    NOT_MEASURED,
    Cell,
    Grid,
    Results,
    all_runs,
    breakdown_grid,
    clean,
    corpora,
    corpus_grid,
    flat,
    front,
    grouping,
    lengths,
    longer_grid,
    paper_grid,
    percent,
    run_grid,
    speed_grid,
    technique_grid,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$])")


def markdown(results: Results) -> str:
    """The study's report in Markdown; `docs/results_format.md` documents `results`.

    Every part of `results` is optional: a section whose part is absent says "not measured".
    """
    results = clean(results)
    first, *rest = results.get("verdict") or [f"Verdict: {NOT_MEASURED}."]
    lines = ["# Attention map reuse in a speech recogniser", "", f"**{_text(first)}**", ""]
    lines += [*(f"- {_text(sentence)}" for sentence in rest), *([""] if rest else [])]
    sections = {
        "Accuracy against latency": _fronts(results),
        "All techniques": _techniques(results),
        "Error against grouping": _grouping(results),
        "Trained for longer": _longer(results),
        "Speed-up by length": _speed(results),
        "Where the time goes": _breakdown(results),
        "Likeness of attention maps": _similarity(results),
        "Published claims": _rows(paper_grid(results)),
        "Corpora": _rows(corpus_grid(results)),
        "Runs": _rows(run_grid(all_runs(results))),
        "Commands": _commands(results),
        "Machine and versions": _definitions(results.get("machine")),
        "Settings and seeds": _definitions(results.get("config")),
    }
    for title, body in sections.items():
        lines += [f"## {title}", "", *(body or [NOT_MEASURED]), ""]
    return "\n".join(lines)


def _fronts(results: Results) -> list[str]:
    names = corpora(results)
    if not names or not any(front(results, length, names[0], "cer") for length in lengths(results)):
        return []
    lines = [
        f"Techniques that no other beats in both CER on {_text(names[0])} and latency, fastest first.",
        "",
        "| T | front |",
        "|---|---|",
    ]
    for length in lengths(results):
        found = ", ".join(map(_text, front(results, length, names[0], "cer"))) or NOT_MEASURED
        lines.append(f"| {length} | {found} |")
    return lines


def _techniques(results: Results) -> list[str]:
    if not results.get("techniques"):
        return []
    grid = technique_grid(results)
    return [
        "Accuracy, with 95 % intervals:",
        "",
        *_rows(grid.about("accuracy")),
        "",
        "Cost, as ratios to full attention, measured figures in brackets:",
        "",
        *_rows(grid.about("cost")),
    ]


def _grouping(results: Results) -> list[str]:
    techniques = [one for one in results.get("techniques", []) if one.get("kind") == "reuse" and one.get("scores")]
    if not techniques:
        return []
    names = corpora(results)
    lines = [
        GROUPING,
        "",
        "| technique | maps computed | " + " | ".join(f"WER, {_text(name)}" for name in names) + " |",
    ]
    lines.append("|---|---|" + "---|" * len(names))
    for one in techniques:
        found = grouping(one)
        counted = NOT_MEASURED if found is None else f"{found[0]} of {found[1]}"
        rates = (percent(one["scores"].get(name, {}).get("wer")) for name in names)
        lines.append(f"| {_text(one['name'])} | {counted} | " + " | ".join(rates) + " |")
    return lines


def _longer(results: Results) -> list[str]:
    rows = _rows(longer_grid(results))
    return [LONGER, "", *rows] if rows else []


def _speed(results: Results) -> list[str]:
    rows = _rows(speed_grid(results))
    return ["How many times as fast as full attention.", "", *rows] if rows else []


def _breakdown(results: Results) -> list[str]:
    lines: list[str] = []
    for group, entries in results.get("breakdown", {}).items():
        for name, measured in entries.items():
            lines += [f"### {_text(group)}: {_text(name)}", "", *_rows(breakdown_grid(measured)), ""]
    return lines[:-1]


def _similarity(results: Results) -> list[str]:
    layers = (results.get("similarity") or {}).get("layers")
    if not layers:
        return []
    lines = ["Similarity of every pair of layers.", "", "| | " + " | ".join(map(str, range(len(layers)))) + " |"]
    lines.append("|---|" + "---|" * len(layers))
    for layer, row in enumerate(layers):
        cells = (NOT_MEASURED if value is None else f"{value:.2f}" for value in row)
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def _commands(results: Results) -> list[str]:
    commands = results.get("commands") or ([results["command"]] if "command" in results else [])
    return [*(f"    {line}" for command in commands for line in command.splitlines())]


def _definitions(found: dict[str, Any] | None) -> list[str]:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return [f"- {_text(key)}: {_text(shown(value))}" for key, value in flat(found or {})]


def _rows(grid: Grid) -> list[str]:
    """A table; empty where it has no rows."""
    if not grid.rows:
        return []
    heads = (" ".join(filter(None, (column.title, column.small))) for column in grid.columns)
    rule = ("---:" if column.numeric else "---" for column in grid.columns)
    rows = [" | ".join(map(_cell, row)) for row in grid.rows]
    return [f"| {' | '.join(map(_text, heads))} |", f"|{'|'.join(rule)}|", *(f"| {row} |" for row in rows)]


def _cell(cell: Cell) -> str:
    if not cell.small:
        return _text(cell.text)
    return _text(f"{cell.text} {cell.small}" if cell.small.startswith("[") else f"{cell.text} ({cell.small})")


def _text(text: str) -> str:
    """Text with what Markdown or HTML would read as markup escaped, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
