"""What `analyze` found, as tables of text, as JSON and as heat maps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from mapreuse.console import Table
from mapreuse.measure._analysis import Analysis
from mapreuse.measure._machine import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIGITS = 4
_MOST_PANELS = 4  # beside each other
_MOST_HEADS = 6  # beside each other, in a terminal of 80 columns
_MOST_WRITTEN = 150  # cells of a plot whose values are written into them; more make it large and unreadable


@dataclass(frozen=True)
class HeatMap:
    """Values to be shown as colours.

    Attributes:
        name: a word, for file names.
        title: what the values are.
        note: how to read them.
        rows: what the rows are; they are numbered from 0.
        columns: likewise.
        span: the values of the first and the last colour; what lies outside takes the nearer one.
        panels: one or more tables of values, by their titles.
    """

    name: str
    title: str
    note: str
    rows: str
    columns: str
    span: tuple[float, float]
    panels: dict[str, Float[Tensor, "rows columns"]]


def heat_maps(analysis: Analysis) -> list[HeatMap]:
    """Similarity of layers; entropy, diagonality and concentration of heads; heads of neighbouring layers."""
    epsilon, block_rows = analysis.concentration.epsilon, analysis.concentration.block_rows
    found = [
        HeatMap(
            "similarity",
            "Similarity of layers",
            "One minus the total variation of two rows, each head of the column's layer to its most similar head of "
            "the row's, averaged. Layers near 1 may share a map.",
            "layer that computes",
            "layer that reuses",
            (0.0, 1.0),
            {"": analysis.similarity.layers},
        ),
        HeatMap(
            "entropy",
            "Entropy",
            "Of a query's attention, relative to the logarithm of the number of keys: 0 where it attends to one key, "
            "1 where to all alike.",
            "layer",
            "head",
            (0.0, 1.0),
            {"": analysis.entropy.relative},
        ),
        HeatMap(
            "diagonality",
            "Diagonality",
            "Cumulative attention diagonality: 1 where all attention lies on the diagonal, about 0.67 where it is "
            "spread evenly. Colours begin at 0.5.",
            "layer",
            "head",
            (0.5, 1.0),
            {"": analysis.diagonality.heads},
        ),
        HeatMap(
            "concentration",
            "Concentration",
            f"Share of the keys that {block_rows} neighbouring queries need for all but {epsilon:g} of every row's "
            "mass: what a map stored sparsely would cost, beside the whole.",
            "layer",
            "head",
            (0.0, 1.0),
            {"": analysis.concentration.heads},
        ),
    ]
    pairs = neighbours(analysis)
    if pairs:
        found.append(
            HeatMap(
                "neighbours",
                "Heads of neighbouring layers",
                "Similarity of every head of a layer to every head of the layer before it.",
                "head of the layer before",
                "head of the layer",
                (0.0, 1.0),
                {f"layers {layer} and {layer + 1}": pair for layer, pair in enumerate(pairs)},
            )
        )
    return found


def neighbours(analysis: Analysis) -> list[Float[Tensor, "heads heads"]]:
    """Similarity of every layer's heads (rows) to the next layer's (columns)."""
    heads = analysis.similarity.heads
    return [heads[layer, :, layer + 1] for layer in range(len(heads) - 1)]


def analysis_tables(analysis: Analysis) -> list[Table]:
    """One row for each layer, then the most similar head of the layer before, then the measures of every head."""
    layers = analysis.similarity.layers
    rows = [
        [
            str(layer),
            f"{layers[layer - 1, layer].item():.2f}" if layer else "",
            f"{analysis.entropy.heads[layer].mean().item():.2f}",
            _spread(analysis.entropy.relative[layer]),
            _spread(analysis.diagonality.heads[layer]),
            _spread(analysis.concentration.heads[layer]),
        ]
        for layer in range(len(layers))
    ]
    header = ["layer", "similarity to the one before", "entropy, nats", "entropy, relative"]
    header += ["diagonality", f"keys needed, ε = {analysis.concentration.epsilon:g}"]
    note = f"Mean over heads, least and greatest head in brackets; over {analysis.similarity.num_queries} queries."
    tables = [Table("Layers", header, rows, [note])]
    pairs = neighbours(analysis)
    if pairs:
        matches = [[f"{int(head)}: {value:.2f}" for value, head in zip(*_best(pair), strict=True)] for pair in pairs]
        tables += _head_tables("Most similar head of the layer before, and its similarity", matches, first=1)
    for shown in heat_maps(analysis):
        if (shown.rows, shown.columns) == ("layer", "head"):
            cells = [[f"{value:.2f}" for value in values] for values in shown.panels[""].tolist()]
            tables += _head_tables(shown.title, cells, first=0, note=shown.note)
    return tables


def analysis_data(analysis: Analysis, *, model: str, calibration: str, command: str) -> dict[str, Any]:
    """What JSON can hold, numbers rounded to 4 digits after the point.

    Keys: `schema` (1), `command`, `model`, `calibration` and `machine`; `num_queries`, over which means were taken;
    `similarity` with `layers[computing][reusing]` and `heads[layer][head][layer][head]`; `entropy` with `heads`
    (nats) and `relative`; `diagonality` with `heads`, and `curve[layer][head]` at `ranges`; `concentration` with
    `heads`, `epsilon` and `block_rows`. `heads` without more are `[layer][head]`; layers and heads count from 0.
    """
    return {
        "schema": 1,
        "command": command,
        "model": model,
        "calibration": calibration,
        "machine": machine(),
        "num_queries": analysis.similarity.num_queries,
        "similarity": {"layers": _rounded(analysis.similarity.layers), "heads": _rounded(analysis.similarity.heads)},
        "entropy": {"heads": _rounded(analysis.entropy.heads), "relative": _rounded(analysis.entropy.relative)},
        "diagonality": {
            "heads": _rounded(analysis.diagonality.heads),
            "ranges": _rounded(analysis.diagonality.ranges),
            "curve": _rounded(analysis.diagonality.curve),
        },
        "concentration": {
            "heads": _rounded(analysis.concentration.heads),
            "epsilon": analysis.concentration.epsilon,
            "block_rows": analysis.concentration.block_rows,
        },
    }


def write_analysis(analysis: Analysis, directory: str | Path, *, model: str, calibration: str, command: str) -> None:
    """Write `analysis.json`, `index.html` (one page that needs nothing else) and a PNG of every heat map.

    Raises `ValueError` where matplotlib is missing, after the first two are written.
    """
    from mapreuse.measure._analysis_page import analysis_page

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = analysis_data(analysis, model=model, calibration=calibration, command=command)
    innermost = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    text = innermost.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(data, indent=1))
    (directory / "analysis.json").write_text(text + "\n", encoding="utf-8")
    page = analysis_page(analysis, model=model, calibration=calibration, command=command)
    (directory / "index.html").write_text(page, encoding="utf-8")
    for shown in heat_maps(analysis):
        heat_map_plot(shown).savefig(directory / f"{shown.name}.png", dpi=90, format="png")


def heat_map_plot(shown: HeatMap) -> Figure:
    """The heat map as a plot. Raises `ValueError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plots need matplotlib: pip install 'mapreuse[study]'") from None
    num_columns = min(_MOST_PANELS, len(shown.panels))
    num_rows = -(-len(shown.panels) // num_columns)
    height, width = next(iter(shown.panels.values())).shape
    size = (1.5 + num_columns * (0.8 + 0.36 * width), 0.8 + num_rows * (0.9 + 0.3 * height))
    figure = Figure(figsize=(max(size[0], 4.5), size[1]), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel().tolist()
    low, high = shown.span
    for axes, (title, values) in zip(grid, shown.panels.items(), strict=False):
        image = axes.imshow(values.numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(width), [str(column) for column in range(width)], fontsize="small")
        axes.set_yticks(range(height), [str(row) for row in range(height)], fontsize="small")
        if height * width * len(shown.panels) <= _MOST_WRITTEN:
            for row, cells in enumerate(values.tolist()):
                for column, value in enumerate(cells):
                    colour = "black" if (value - low) / (high - low) > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    for axes in grid[len(shown.panels) :]:
        axes.set_axis_off()
    figure.suptitle(shown.title)
    figure.supxlabel(shown.columns, fontsize="medium")
    figure.supylabel(shown.rows, fontsize="medium")
    figure.colorbar(image, ax=grid, label=shown.title.lower() if len(shown.panels) == 1 else "similarity")
    return figure


def _spread(values: Float[Tensor, " heads"]) -> str:
    return f"{values.mean().item():.2f} ({values.min().item():.2f} to {values.max().item():.2f})"


def _head_tables(title: str, cells: list[list[str]], *, first: int, note: str = "") -> list[Table]:
    """Layers from `first` on, by heads, in as many tables as a terminal is wide enough for."""
    tables = []
    for start in range(0, len(cells[0]), _MOST_HEADS):
        header = ["layer", *(f"head {head}" for head in range(start, min(start + _MOST_HEADS, len(cells[0]))))]
        rows = [[str(layer), *row[start : start + _MOST_HEADS]] for layer, row in enumerate(cells, start=first)]
        tables.append(Table(title, header, rows, []))
    tables[-1].notes.extend([note] if note else [])
    return tables


def _best(pair: Float[Tensor, "heads heads"]) -> tuple[list[float], list[int]]:
    """Of every column, the greatest value and its row."""
    values, rows = pair.max(dim=0)
    return values.tolist(), rows.tolist()


def _rounded(values: Float[Tensor, "*shape"]) -> Any:
    def of(value: Any) -> Any:
        return [of(one) for one in value] if isinstance(value, list) else round(value, _DIGITS)

    return of(values.tolist())
