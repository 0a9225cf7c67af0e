"""Results of `breakdown` as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mapreuse.console import Table
from mapreuse.measure._breakdown import PARTS, Breakdown
from mapreuse.measure._machine import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.05
"""Maximum relative difference of the sum of the parts and the whole pass without a note."""


def breakdown_data(breakdowns: Sequence[Breakdown]) -> dict[str, Any]:
    """Breakdowns and the machine, for JSON."""
    return {
        "schema": 2,
        "machine": machine(),
        "parts": PARTS,
        "breakdowns": [
            asdict(one)
            | {"whole": {"seconds": one.whole.median, "spread": one.whole.spread}, "attributed": one.attributed}
            for one in breakdowns
        ],
    }


def breakdown_tables(breakdowns: Sequence[Breakdown]) -> list[Table]:
    """For each batch: the time of each part, the time of one layer of each kind, and FLOPs."""
    tables = []
    for batch in dict.fromkeys(one.batch for one in breakdowns):
        here = [one for one in breakdowns if one.batch == batch]
        tables += [_time_table(here), _layer_table(here), _flop_table(here)]
    return tables


def breakdown_plot(breakdowns: Sequence[Breakdown]) -> Figure:
    """Stacked bars of the parts' times: a panel for each contestant, a bar for each batch. Needs matplotlib."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.name for one in breakdowns))
    colours = dict(zip(PARTS, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(3 * len(names) + 3, 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        here = [one for one in breakdowns if one.name == name]
        bottoms = [0.0] * len(here)
        for part in PARTS:
            if not any(one.parts[part].seconds for one in breakdowns):
                continue
            heights = [1000 * one.parts[part].seconds for one in here]
            panel.bar([one.batch for one in here], heights, bottom=bottoms, color=colours[part], label=PARTS[part])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        panel.set_title(name)
        panel.tick_params(axis="x", labelrotation=30)
    panels[0].set_ylabel("milliseconds per forward pass")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    return figure


def _time_table(breakdowns: Sequence[Breakdown]) -> Table:
    rows = _rows(
        lambda part: (
            (
                one.parts[part].seconds,
                f"{1000 * one.parts[part].seconds:.1f} ({one.parts[part].seconds / one.attributed:.0%})",
            )
            for one in breakdowns
        )
    )
    rows.append(["sum of the parts", *(f"{1000 * one.attributed:.1f}" for one in breakdowns)])
    rows.append(["whole pass", *(f"{1000 * one.whole.median:.1f} ± {one.whole.spread:.0%}" for one in breakdowns)])
    rows.append(["sum ÷ whole", *(f"{one.coverage:.1%}" for one in breakdowns)])
    notes = [
        f"{one.name}: the parts add up to {one.coverage:.1%} of the pass. The machine was busy, or the pass is too "
        "short for the profiler: use more repeats or longer inputs."
        for one in breakdowns
        if abs(one.coverage - 1) > TOLERANCE
    ]
    return Table(f"{breakdowns[0].batch}: milliseconds", ["", *(one.name for one in breakdowns)], rows, notes)


def _layer_table(breakdowns: Sequence[Breakdown]) -> Table:
    columns = [(f"{one.name}, {layer.kind}", layer.parts) for one in breakdowns for layer in one.layers]
    rows = _rows(lambda part: ((parts[part].seconds, f"{1000 * parts[part].seconds:.2f}") for _, parts in columns))
    sums = (sum(cost.seconds for cost in parts.values()) for _, parts in columns)
    rows.append(["layer", *(f"{1000 * taken:.2f}" for taken in sums)])
    return Table(f"{breakdowns[0].batch}: milliseconds per layer", ["", *(name for name, _ in columns)], rows)


def _flop_table(breakdowns: Sequence[Breakdown]) -> Table:
    rows = _rows(lambda part: ((one.parts[part].flops, f"{one.parts[part].flops / 1e9:.3g}") for one in breakdowns))
    sums = (sum(part.flops for part in one.parts.values()) for one in breakdowns)
    rows.append(["sum", *(f"{flops / 1e9:.3g}" for flops in sums)])
    return Table(f"{breakdowns[0].batch}: GFLOPs", ["", *(one.name for one in breakdowns)], rows)


def _rows(cells: Callable[[str], Iterable[tuple[float, str]]]) -> list[list[str]]:
    """A row for each part: its cost in each column, and the text of the cell. Costs of 0 stay empty."""
    rows = [[title, *(text if cost else "" for cost, text in cells(part))] for part, title in PARTS.items()]
    return [row for row in rows if any(row[1:])]
