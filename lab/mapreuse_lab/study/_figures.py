"""Interactive figures of the study's reports, made with plotly."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from plotly.graph_objects import Bar, Figure, Heatmap, Scatter
from plotly.subplots import make_subplots

from mapreuse.measure import PARTS
from mapreuse_lab.study._tables import Results, lengths, main_corpus, pareto_front, scored, speedup

KINDS = {"full": "full", "reuse": "reuse", "composed": "reuse with another technique", "other": "other techniques"}
"""Titles of the kinds of techniques."""

_Group = tuple[str, range, dict[str, str]]  # label in the menu, indices of the traces, layout
_HEIGHT = 480
_CELL = 300  # pixels of one panel of heat maps


def error_against_speed(results: Results) -> Figure:
    """CER against speed-up of every technique, with the Pareto front; the menu selects the length."""
    figure, corpus = Figure(), main_corpus(results)
    groups: list[_Group] = []
    for length in lengths(results):
        first = len(figure.data)
        for kind, title in KINDS.items():
            own = [t for t in scored(results) if t["kind"] == kind]
            scores = [t["scores"][corpus] for t in own]
            figure.add_trace(
                Scatter(
                    x=[speedup(results, t, length) for t in own],
                    y=[one["cer"] for one in scores],
                    error_y=_error_bars(scores),
                    text=[t["title"] for t in own],
                    mode="markers",
                    name=title,
                    hovertemplate="%{text}<br>speed-up %{x:.2f}×, CER %{y:.1%}",
                )
            )
        front = pareto_front(results, length)
        figure.add_trace(
            Scatter(
                x=[speedup(results, t, length) for t in front],
                y=[t["scores"][corpus]["cer"] for t in front],
                mode="lines",
                name="Pareto front",
                hoverinfo="skip",
            )
        )
        groups.append((f"T = {length}", range(first, len(figure.data)), {}))
    _add_menu(figure, groups, active=lengths(results).index("1000") if "1000" in lengths(results) else 0)
    figure.update_layout(xaxis_title="speed-up over full attention", yaxis_title=f"CER on {corpus}")
    return figure.update_layout(yaxis_tickformat=".0%", height=_HEIGHT)


def speedup_by_length(
    measured: Mapping[str, Mapping[str, Any]], baseline: str, shown: Sequence[str] | None = None
) -> Figure:
    """Speed-up over the baseline by length; only the lines of `shown` are visible at first (None for all)."""
    figure = Figure()
    for name in dict.fromkeys(name for one in measured.values() for name in one):
        ratios = [one[baseline]["median"] / one[name]["median"] for one in measured.values()]
        visible = True if shown is None or name in shown else "legendonly"
        figure.add_trace(Scatter(x=[int(length) for length in measured], y=ratios, name=name, visible=visible))
    figure.update_layout(xaxis_title="encoder frames T", yaxis_title=f"speed-up over {baseline}", height=_HEIGHT)
    return figure.update_xaxes(type="log", tickvals=[int(length) for length in measured])


def breakdown_bars(entries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Time of each part by length and contestant, relative to the first contestant. `entries` are in seconds."""
    first = next(iter(entries.values()))
    timed = sorted(first, key=int)
    sums = {length: sum(first[length].values()) for length in timed}
    places = [(length, name) for length in timed for name in entries]
    figure = Figure()
    for part, title in PARTS.items():
        shares = [entries[name][length].get(part, 0.0) / sums[length] for length, name in places]
        if any(shares):
            axis = [[f"T = {length}" for length, _ in places], [name for _, name in places]]
            figure.add_trace(Bar(x=axis, y=shares, name=title))
    return figure.update_layout(
        barmode="stack", yaxis_title=f"time relative to {next(iter(entries))}", height=_HEIGHT
    )


def heat_maps(panels: Mapping[str, tuple[Sequence[Sequence[float | None]], str, str]]) -> Figure:
    """Matrices of values from 0 to 1, side by side. A panel is a matrix, and the names of its rows and columns."""
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.08)
    for place, (matrix, rows, columns) in enumerate(panels.values(), 1):
        figure.add_trace(Heatmap(z=matrix, zmin=0, zmax=1, colorscale="Viridis", showscale=place == 1), 1, place)
        figure.update_xaxes(title=columns, dtick=1, row=1, col=place)
        figure.update_yaxes(title=rows, dtick=1, autorange="reversed", row=1, col=place)
    return figure.update_layout(height=_CELL + 80, width=max(2, len(panels)) * _CELL)


def phoneme_maps(phonemes: Mapping[str, Any]) -> Figure:
    """Attention between phonemes, relative to uniform attention; the menu selects the layer."""
    names, matrices = phonemes["phonemes"], phonemes["matrices"]
    figure = make_subplots(1, len(matrices), subplot_titles=list(matrices))
    groups: list[_Group] = []
    for layer in range(len(next(iter(matrices.values())))):
        first = len(figure.data)
        for place, layers in enumerate(matrices.values(), 1):
            trace = Heatmap(z=layers[layer], x=names, y=names, zmin=0, zmax=3, colorscale="Viridis")
            figure.add_trace(trace.update(showscale=place == 1), 1, place)
        groups.append((f"layer {layer}", range(first, len(figure.data)), {}))
    figure.update_yaxes(autorange="reversed")
    _add_menu(figure, groups)
    return figure.update_layout(height=600, width=len(matrices) * 560)


def map_viewer(maps: Mapping[str, Any]) -> Figure:
    """Attention maps of one utterance; the menu selects layer and head. Colours are square roots of the weights."""
    techniques = maps["techniques"]
    figure = make_subplots(1, len(techniques), subplot_titles=list(techniques))
    first_technique = next(iter(techniques.values()))
    groups: list[_Group] = []
    for layer, heads in enumerate(first_technique["layers"]):
        for head in range(len(heads)):
            first, sources = len(figure.data), []
            for place, (name, one) in enumerate(techniques.items(), 1):
                if head < len(one["layers"][layer]):
                    weights = np.frombuffer(base64.b64decode(one["layers"][layer][head]), np.uint8)
                    colours = np.sqrt(weights / 255).astype(np.float16).reshape(one["frames"], one["frames"])
                    trace = Heatmap(z=(255 * colours).astype(np.uint8), zmin=0, zmax=255, colorscale="Viridis")
                    figure.add_trace(trace.update(showscale=False), 1, place)
                source = one["source_layers"][layer]
                sources.append(f"{name} {'computes this map' if source == layer else f'applies the map of {source}'}")
            title = f"Layer {layer}, head {head}: {', '.join(sources)}"
            groups.append((f"layer {layer}, head {head}", range(first, len(figure.data)), {"title.text": title}))
    figure.update_xaxes(title="key frame").update_yaxes(title="query frame", autorange="reversed")
    figure.update_layout(title_text=groups[0][2]["title.text"])
    _add_menu(figure, groups)
    return figure.update_layout(height=560, width=len(techniques) * 520)


def learning_curves(results: Results) -> Figure:
    """CER on the development set by training step, one line for each run; full attention and reuse are visible."""
    figure = Figure()
    titles = {t["name"]: t for t in results["techniques"]}
    for run in results["runs"]:
        if run["corpus"] != main_corpus(results) or run["state"] != "finished":
            continue
        curve = [one for one in run["learning_curve"] if one.get("dev_cer") is not None]
        technique = titles[run["technique"]]
        visible = True if technique["kind"] in ("full", "reuse") and run["seed"] == 0 else "legendonly"
        name = f"{technique['title']}, seed {run['seed']}"
        steps = [one["step"] for one in curve]
        figure.add_trace(Scatter(x=steps, y=[one["dev_cer"] for one in curve], name=name, visible=visible))
    figure.update_layout(xaxis_title="step", yaxis_title="CER of the development set", yaxis_tickformat=".0%")
    return figure.update_layout(height=_HEIGHT)


def _error_bars(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    above = [one["cer_interval"][1] - one["cer"] for one in scores]
    below = [one["cer"] - one["cer_interval"][0] for one in scores]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def _add_menu(figure: Figure, groups: Sequence[_Group], active: int = 0) -> None:
    """A menu that shows one group of traces at a time, and sets the layout that goes with it."""
    buttons = []
    for label, traces, layout in groups:
        visible = [index in traces for index in range(len(figure.data))]
        buttons.append({"label": label, "method": "update", "args": [{"visible": visible}, layout]})
    for index, trace in enumerate(figure.data):
        trace.visible = index in groups[active][1]
    menu = {"buttons": buttons, "active": active, "x": 1, "xanchor": "right", "y": 1.16, "yanchor": "top"}
    menu["bgcolor"] = "white"  # its text is dark, also on a dark page
    figure.update_layout(updatemenus=[menu])
