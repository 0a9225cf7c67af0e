"""Results of `analyze` as tables, JSON and one page of HTML."""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.console import Table
from mapreuse.measure._analysis import CURVE_STEPS, Analysis
from mapreuse.measure._machine import machine
from mapreuse.measure._page import Block, Section, write_page

_log = logging.getLogger("mapreuse")

_DIGITS = 4
_MAX_HEADS = 6  # side by side, in a terminal of 80 columns
_RANGES = torch.arange(CURVE_STEPS + 1) / CURVE_STEPS


class _HeatMap(NamedTuple):
    """One or more matrices to show as colours, by title. Rows and columns count from 0; the last colour is 1."""

    title: str
    note: str
    panels: dict[str, Float[Tensor, "rows columns"]]
    rows: str = "layer"
    columns: str = "head"
    first_colour: float = 0.0


def _heat_maps(analysis: Analysis) -> list[_HeatMap]:
    """Similarity of layers; entropy and diagonality of heads; heads of neighbouring layers."""
    similarity = _HeatMap(
        "Similarity of layers",
        "1 − total variation of two rows. Each head of the reusing layer is compared with its most similar head of "
        "the computing layer; the value is the mean over heads. Layers near 1 can share a map.",
        {"": analysis.similarity.layers},
        rows="computing layer",
        columns="reusing layer",
    )
    entropy = _HeatMap(
        "Entropy",
        "Mean entropy of a query's attention, divided by the logarithm of the number of keys: 0 if the query attends "
        "to one key, 1 if it attends to all keys equally.",
        {"": analysis.relative_entropy},
    )
    diagonality = _HeatMap(
        "Diagonality",
        "Cumulative attention diagonality: 1 if all attention is on the diagonal, about 0.67 if it is uniform. "
        "Colours begin at 0.5.",
        {"": analysis.diagonality},
        first_colour=0.5,
    )
    neighbours = _HeatMap(
        "Heads of neighbouring layers",
        "Similarity of each head of a layer to each head of the layer before it.",
        {f"layers {layer} and {layer + 1}": pair for layer, pair in enumerate(_neighbours(analysis))},
        rows="head of the layer before",
        columns="head of the layer",
    )
    return [shown for shown in (similarity, entropy, diagonality, neighbours) if shown.panels]


def analysis_tables(analysis: Analysis) -> list[Table]:
    """Tables of an analysis: one row per layer, the best matching heads of neighbouring layers, and all heads."""
    layers = analysis.similarity.layers
    rows = [
        [
            str(layer),
            f"{layers[layer - 1, layer].item():.2f}" if layer else "",
            f"{analysis.entropy[layer].mean().item():.2f}",
            *(
                f"{heads.mean().item():.2f} ({heads.min().item():.2f} to {heads.max().item():.2f})"
                for heads in (analysis.relative_entropy[layer], analysis.diagonality[layer])
            ),
        ]
        for layer in range(len(layers))
    ]
    header = ["layer", "similarity to the layer before", "entropy (nats)", "relative entropy", "diagonality"]
    note = f"Mean over heads (minimum to maximum), over {analysis.similarity.num_queries} queries."
    tables = [Table("Layers", header, rows, [note])]
    matches = []
    for pair in _neighbours(analysis):
        values, heads = pair.max(dim=0)
        matches.append([f"{head}: {value:.2f}" for value, head in zip(values, heads.tolist(), strict=True)])
    if matches:
        tables += _head_tables("Most similar head of the layer before, and its similarity", matches, first=1)
    for shown in _heat_maps(analysis):
        if (shown.rows, shown.columns) == ("layer", "head"):
            cells = [[f"{value:.2f}" for value in values] for values in shown.panels[""].tolist()]
            tables += _head_tables(shown.title, cells, first=0, note=shown.note)
    return tables


def write_analysis(analysis: Analysis, directory: str | Path, *, model: str, calibration: str, command: str) -> None:
    """Write `analysis.json` and the page `index.html`.

    The heat maps of the page need `pip install 'mapreuse[plots]'`. Without it, a warning is logged and the page has
    tables only.

    Keys of `analysis.json`, numbers rounded to 4 decimals: `schema` (1), `command`, `model`, `calibration` and
    `machine`; `num_queries`, the number of queries that the means are taken over; `similarity` with
    `layers[computing][reusing]` and `heads[layer][head][layer][head]`; `entropy` with `heads` (nats) and `relative`;
    `diagonality` with `heads`, and `curve[layer][head]` at `ranges`. `heads` and `relative` are `[layer][head]`;
    layers and heads count from 0.

    Args:
        analysis: from `analyze`.
        directory: where to write; it is made.
        model: name of the model, for the page and the JSON file.
        calibration: name of the calibration data.
        command: the command that made the analysis.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = {"schema": 1, "command": command, "model": model, "calibration": calibration, "machine": machine()}
    text = json.dumps(data | _data(analysis), indent=1)
    innermost = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    text = innermost.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    (directory / "analysis.json").write_text(text + "\n", encoding="utf-8")

    with_figures = find_spec("plotly") is not None
    if not with_figures:
        _log.warning("plotly is not installed: index.html has tables only; pip install 'mapreuse[plots]'")
    sections = _sections(analysis, calibration, command, with_figures=with_figures)
    write_page(directory / "index.html", f"Attention maps of {model}", sections)


def _data(analysis: Analysis) -> dict[str, Any]:
    def rounded(values: Tensor) -> Any:
        return values.double().mul(10**_DIGITS).round().div(10**_DIGITS).tolist()

    return {
        "num_queries": analysis.similarity.num_queries,
        "similarity": {"layers": rounded(analysis.similarity.layers), "heads": rounded(analysis.similarity.heads)},
        "entropy": {"heads": rounded(analysis.entropy), "relative": rounded(analysis.relative_entropy)},
        "diagonality": {
            "heads": rounded(analysis.diagonality),
            "ranges": rounded(_RANGES),
            "curve": rounded(analysis.diagonality_curve),
        },
    }


def _sections(analysis: Analysis, calibration: str, command: str, *, with_figures: bool) -> list[Section]:
    num_layers, num_heads = analysis.entropy.shape
    introduction = (
        f"Layers: {num_layers}; heads in each: {num_heads}; both count from 0. Measured over "
        f"{analysis.similarity.num_queries} queries of {calibration}, without padding."
    )
    layers, *heads = analysis_tables(analysis)
    sections = [Section("", [introduction, f"Made by: {command}"]), Section("Layers", [layers])]
    if not with_figures:
        return [*sections, Section("Heads", heads)]
    sections += [Section(shown.title, [shown.note, *_heat_map_figures(shown)]) for shown in _heat_maps(analysis)]
    note = (
        "Share of attention within a distance of the diagonal, averaged over heads. The distance is relative to the "
        "length of the sequence; diagonality is the area under the curve."
    )
    return [*sections, Section("Attention near the diagonal", [note, _diagonality_figure(analysis)])]


def _heat_map_figures(shown: _HeatMap) -> list[Block]:
    from plotly.graph_objects import Figure, Heatmap

    figures: list[Block] = []
    colours = {"zmin": shown.first_colour, "zmax": 1, "colorscale": "Viridis"}
    for title, values in shown.panels.items():
        num_rows, num_columns = values.shape
        size = {"width": 250 + 42 * num_columns, "height": 180 + 30 * num_rows}
        figure = Figure(Heatmap(z=values.tolist(), texttemplate="%{z:.2f}", xgap=1, ygap=1, **colours))
        figure.update_layout(title=title, xaxis_title=shown.columns, yaxis_title=shown.rows, **size)
        figure.update_xaxes(dtick=1)
        figure.update_yaxes(dtick=1, autorange="reversed")
        figures.append(figure)
    return figures


def _diagonality_figure(analysis: Analysis) -> Block:
    from plotly.colors import sample_colorscale
    from plotly.graph_objects import Figure, Scatter

    curves = analysis.diagonality_curve.mean(1).tolist()
    colours = sample_colorscale("Viridis", [layer / max(len(curves) - 1, 1) for layer in range(len(curves))])
    lines = [
        Scatter(x=_RANGES.tolist(), y=curve, name=f"layer {layer}", mode="lines", line_color=colour)
        for layer, (curve, colour) in enumerate(zip(curves, colours, strict=True))
    ]
    return Figure(lines, {"xaxis": {"title": "distance ÷ length"}, "yaxis": {"title": "share of attention"}})


def _neighbours(analysis: Analysis) -> list[Float[Tensor, "heads heads"]]:
    """Similarity of each layer's heads (rows) to the next layer's heads (columns)."""
    heads = analysis.similarity.heads
    return [heads[layer, :, layer + 1] for layer in range(len(heads) - 1)]


def _head_tables(title: str, cells: list[list[str]], *, first: int, note: str = "") -> list[Table]:
    """Layers by heads, from layer `first` on, split into tables that fit a terminal."""
    tables = []
    for start in range(0, len(cells[0]), _MAX_HEADS):
        header = ["layer", *(f"head {head}" for head in range(start, min(start + _MAX_HEADS, len(cells[0]))))]
        rows = [[str(layer), *row[start : start + _MAX_HEADS]] for layer, row in enumerate(cells, start=first)]
        notes = [note] if note and start + _MAX_HEADS >= len(cells[0]) else []
        tables.append(Table(title, header, rows, notes))
    return tables
