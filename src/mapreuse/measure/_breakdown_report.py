"""What `breakdown` found, as tables of text, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mapreuse.console import Table
from mapreuse.measure._breakdown import Breakdown, BreakdownConfig, PartCost
from mapreuse.measure._encoders import ENCODERS
from mapreuse.measure._flops import PARTS
from mapreuse.measure._machine import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.05
"""How far the sum of the parts may be from the whole."""


def breakdown_data(breakdowns: Sequence[Breakdown], config: BreakdownConfig, command: str) -> dict[str, Any]:
    """Breakdowns, and what made them and where, for `json.dumps`."""
    threads = {} if config.threads is None else {"threads": config.threads}
    return {
        "schema": 1,
        "command": command,
        "machine": machine() | threads,
        "config": asdict(config),
        "signal": ENCODERS["conformer-m"].signal,
        "parts": PARTS,
        "breakdowns": [
            {
                "name": one.name,
                "frames": one.frames,
                "batch": one.batch,
                "whole": {"seconds": one.whole.median, "spread": one.whole.spread},
                "attributed": one.attributed,
                "coverage": one.coverage,
                "parts": _parts_data(one.parts),
                "layers": [
                    {"kind": layer.kind, "count": layer.count, "parts": _parts_data(layer.parts)}
                    for layer in one.layers
                ],
            }
            for one in breakdowns
        ],
    }


def breakdown_tables(breakdowns: Sequence[Breakdown]) -> list[Table]:
    """For each length: the time of each part, the time of one layer of each kind, and the arithmetic and traffic."""
    tables = []
    for frames in dict.fromkeys(one.frames for one in breakdowns):
        here = [one for one in breakdowns if one.frames == frames]
        tables += [_time_table(here), _layer_table(here), _work_table(here)]
    return tables


def breakdown_plot(breakdowns: Sequence[Breakdown]) -> Figure:
    """Stacked areas of the parts' time by length, one panel for each encoder; the whole pass as a dashed line.

    Raises `ValueError` for a single length, or where matplotlib is missing.
    """
    lengths = sorted({one.frames for one in breakdowns})
    if len(lengths) < 2:
        raise ValueError("a plot by length needs at least two lengths")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'mapreuse[study]'") from None
    names = list(dict.fromkeys(one.name for one in breakdowns))
    shown = _shown(breakdowns)
    colours = dict(zip(PARTS, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(3 * len(names) + 3, 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        ordered = sorted((one for one in breakdowns if one.name == name), key=lambda one: one.frames)
        frames = [one.frames for one in ordered]
        stacks = [[1000 * one.parts[part].seconds for one in ordered] for part in shown]
        areas = panel.stackplot(frames, stacks, colors=[colours[part] for part in shown])
        whole = [1000 * one.whole.median for one in ordered]
        (line,) = panel.plot(frames, whole, color="black", linestyle="--", marker=".")
        panel.set_title(name)
        panel.set_xlabel("encoder frames T")
        panel.set_xlim(frames[0], frames[-1])
    panels[0].set_ylabel("milliseconds of one forward pass")
    panels[0].set_ylim(bottom=0)
    handles = [line, *reversed(areas)]
    labels = ["the whole pass, measured by itself", *(PARTS[part] for part in reversed(shown))]
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def _time_table(breakdowns: Sequence[Breakdown]) -> Table:
    def cell(one: Breakdown, part: str) -> str:
        seconds = one.parts[part].seconds
        return f"{1000 * seconds:.1f} ({seconds / one.attributed:.0%})" if seconds else ""

    rows = [[PARTS[part], *(cell(one, part) for one in breakdowns)] for part in _shown(breakdowns)]
    rows.append(["sum of the parts", *(f"{1000 * one.attributed:.1f}" for one in breakdowns)])
    rows.append(["whole pass", *(f"{1000 * one.whole.median:.1f} ± {one.whole.spread:.0%}" for one in breakdowns)])
    rows.append(["sum ÷ whole", *(f"{one.coverage:.1%}" for one in breakdowns)])
    notes = [
        f"{one.name}: the parts add up to {one.coverage:.1%} of the pass: the machine was busy, or the pass is too "
        "short to be profiled; repeat more often, or take a longer input"
        for one in breakdowns
        if abs(one.coverage - 1) > TOLERANCE
    ]
    return Table(f"{_setting(breakdowns)}: milliseconds", ["", *(one.name for one in breakdowns)], rows, notes)


def _layer_table(breakdowns: Sequence[Breakdown]) -> Table:
    columns = [(f"{one.name}, {layer.kind}", layer.parts) for one in breakdowns for layer in one.layers]
    rows = []
    for part in _shown(breakdowns):
        seconds = [parts[part].seconds for _, parts in columns]
        if any(seconds):
            rows.append([PARTS[part], *(f"{1000 * taken:.2f}" if taken else "" for taken in seconds)])
    sums = (sum(cost.seconds for cost in parts.values()) for _, parts in columns)
    rows.append(["layer", *(f"{1000 * taken:.2f}" for taken in sums)])
    return Table(f"{_setting(breakdowns)}: milliseconds of one layer", ["", *(name for name, _ in columns)], rows, [])


def _work_table(breakdowns: Sequence[Breakdown]) -> Table:
    def cells(costs: Sequence[PartCost]) -> list[str]:
        flops, nbytes = sum(cost.flops for cost in costs), sum(cost.nbytes for cost in costs)
        return [f"{flops / 1e9:.2f}" if flops else "", f"{nbytes / 1e6:.1f}" if nbytes else ""]

    rows = [
        [PARTS[part], *(text for one in breakdowns for text in cells([one.parts[part]]))]
        for part in _shown(breakdowns)
    ]
    rows.append(["sum", *(text for one in breakdowns for text in cells(list(one.parts.values())))])
    header = ["", *(text for one in breakdowns for text in (f"{one.name}, GFLOP", "MB"))]
    return Table(f"{_setting(breakdowns)}: GFLOP and MB", header, rows, [])


def _setting(breakdowns: Sequence[Breakdown]) -> str:
    return f"T = {breakdowns[0].frames}, batch {breakdowns[0].batch}"


def _shown(breakdowns: Sequence[Breakdown]) -> list[str]:
    """The parts that some of the encoders have."""
    return [part for part in PARTS if any(one.parts[part].seconds or one.parts[part].nbytes for one in breakdowns)]


def _parts_data(parts: dict[str, PartCost]) -> dict[str, dict[str, float]]:
    return {
        part: {"seconds": cost.seconds, "flops": cost.flops, "bytes": cost.nbytes} for part, cost in parts.items()
    }
