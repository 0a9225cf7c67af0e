"""The study's report as one page of HTML that needs nothing else: no network, from a file path, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from mapreuse_lab.study._page_html import absent, definitions, figure, picker, same, select, slider, table
from mapreuse_lab.study._page_tables import (
    GROUPING,
    LONGER,
    NOT_MEASURED,
    Results,
    all_runs,
    breakdown_grid,
    clean,
    corpora,
    corpus_grid,
    front,
    full_technique,
    grouping,
    lengths,
    longer_grid,
    paper_grid,
    part_family,
    part_label,
    run_grid,
    speed_grid,
    technique_grid,
)

TITLE = "Attention map reuse in a speech recogniser"
KINDS = {
    "full": "full",
    "reuse": "reuse",
    "composed": "reuse with another technique",
    "other": "other techniques",
}

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
"""Nothing is loaded, and nothing sent: the browser refuses it."""


def page(results: Results) -> str:
    """The study's report as one self-contained page of HTML; `docs/results_format.md` documents `results`.

    Every part of `results` is optional: a section whose part is absent says "not measured".
    """
    results = clean(results)
    sections = [_section(*section, results) for section in _SECTIONS]
    links = "".join(f'<a href="#{name}">{name}</a>' for name, *_ in _SECTIONS)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(TITLE)}</title>",
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
            f"<header>\n<h1>{escape(TITLE)}</h1>\n{_verdict(results)}\n{_setting(results)}\n</header>",
            f'<nav aria-label="Sections">{links}</nav>\n<main>',
            "<noscript><p class=note>The plots need JavaScript; the tables do not.</p></noscript>",
            *sections,
            "</main>",
            f'<script type="application/json" id="data">{embedded(plot_data(results))}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{_asset('page.js')}</script>",
            "</body>\n</html>\n",
        ]
    )


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plot_data(results: Results) -> dict[str, Any]:
    """What the page's script draws from: the parts of `results` that are plotted, with the fronts found."""
    names = corpora(results)
    techniques = [
        {key: one.get(key) for key in ("name", "source", "positions", "kind", "parameters")}
        | {"title": one.get("title", one["name"]), "scores": one.get("scores", {}), "latency": one.get("latency", {})}
        | {"grouping": grouping(one) if one.get("kind") == "reuse" else None}
        for one in results.get("techniques", [])
    ]
    curves = [
        {key: run.get(key) for key in ("technique", "corpus", "seed", "learning_curve")}
        for run in results.get("runs", [])
        if run.get("learning_curve")
    ]
    breakdown = results.get("breakdown", {})
    measured = [by for group in breakdown.values() for entry in group.values() for by in entry.values()]
    parts = dict.fromkeys(part for one in measured for part in one)
    return {
        "full": full_technique(results).get("name"),
        "kinds": KINDS,
        "techniques": techniques,
        "reference": results.get("reference"),
        "corpora": names,
        "lengths": lengths(results),
        "fronts": {
            metric: {
                corpus: {length: front(results, length, corpus, metric) for length in lengths(results)}
                for corpus in names
            }
            for metric in ("cer", "wer")
        },
        "curves": curves,
        "breakdown": breakdown,
        "parts": [{"name": part, "label": part_label(part), "family": part_family(part)} for part in parts],
        "similarity": results.get("similarity"),
        "phonemes": results.get("phonemes"),
        "maps": results.get("maps"),
    }


def _verdict(results: Results) -> str:
    first, *rest = results.get("verdict") or [f"Verdict: {NOT_MEASURED}."]
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in rest)
    size = " long" if len(first) > 150 else ""
    return f'<p class="verdict{size}">{escape(first)}</p>' + (f'<ul class="said">{said}</ul>' if said else "")


def _setting(results: Results) -> str:
    machine, count = results.get("machine", {}), len(results.get("techniques", []))
    said = [f"{count} techniques", *(f"corpus {name}" for name in corpora(results))]
    said += [f"preset {results['preset']}"] if "preset" in results else []
    said += [str(machine[key]) for key in ("processor", "gpu") if machine.get(key) not in (None, "none")]
    said += [f"{key} {machine[key]}" for key in ("threads", "torch", "transformers", "commit") if key in machine]
    return '<p class="setting">' + " · ".join(escape(one) for one in said) + "</p>"


def _section(name: str, title: str, note: str, body: Callable[[Results], str], results: Results) -> str:
    shown = body(results)
    note = f'<p class="note">{escape(note)}</p>\n' if note and shown else ""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{note}{shown or absent()}\n</section>'


def _front_plot(results: Results) -> str:
    if not any(one.get("latency") and one.get("scores") for one in results.get("techniques", [])):
        return ""
    chosen = "1000" if "1000" in lengths(results) else lengths(results)[-1]
    return figure(
        "pareto",
        select("length", "length", {length: f"T = {length}" for length in lengths(results)}, chosen),
        select("corpus", "corpus", same(corpora(results))),
        select("metric", "error", {"cer": "CER", "wer": "WER"}),
        select("range", "range", {"all": "all techniques", "near": "up to 1.5 times full's error"}),
    )


def _technique_table(results: Results) -> str:
    if not results.get("techniques"):
        return ""
    choices = {"": "all corpora"} | same(corpora(results))
    first = next(iter(corpora(results)), "")
    controls = (
        '<label>rows that contain <input type="search" id="filter" placeholder="reuse, window, dropped …"></label>'
        + select("table-corpus", "error rates on", choices, first)
        + '<span class="count" id="count" role="status"></span>'
    )
    return f'<div class="controls">{controls}</div>' + table(
        "techniques-table", technique_grid(results), "Techniques"
    )


def _grouping_plot(results: Results) -> str:
    if not any(one.get("kind") == "reuse" and one.get("scores") for one in results.get("techniques", [])):
        return ""
    return figure(
        "grouping",
        select("corpus", "corpus", same(corpora(results))),
        select("metric", "error", {"wer": "WER", "cer": "CER"}),
    )


def _longer(results: Results) -> str:
    grid = longer_grid(results)
    return table("longer-table", grid, "Trained for longer") if grid.rows else ""


def _speed_plot(results: Results) -> str:
    if not full_technique(results).get("latency"):
        return ""
    shown = [one["name"] for one in results["techniques"] if one.get("latency")]
    first = [one["name"] for one in results["techniques"] if one.get("kind") in ("full", "reuse")][:6]
    if "reference" in results:
        shown.append("transformers")
        first.append("transformers")
    figures = table("speed-table", speed_grid(results), "Speed-up")
    return (
        figure("speed", above=picker("techniques", shown, first))
        + f"<details><summary>As a table</summary>{figures}</details>"
    )


def _breakdown_plots(results: Results) -> str:
    parts = []
    titles = {"contestants": "The whole forward pass", "layer": "One layer's attention"}
    for group, entries in results.get("breakdown", {}).items():
        if not entries:
            continue
        parts.append(f"<h3>{escape(titles.get(group, group))}</h3>")
        scale = {"ratio": f"ratio to {next(iter(entries))}", "ms": "milliseconds", "share": "share of the pass"}
        parts.append(figure(f"breakdown-{group}", select("scale", "show", scale), plot="breakdown", part=group))
        tables = (f"<h4>{escape(name)}</h4>{table('', breakdown_grid(one), name)}" for name, one in entries.items())
        parts.append(f"<details><summary>As tables</summary>{''.join(tables)}</details>")
    return "".join(parts)


def _similarity_plots(results: Results) -> str:
    similarity = results.get("similarity") or {}
    titles = {
        "layers": "Similarity of layers",
        "diagonality": "Diagonality of heads",
        "entropy": "Entropy of heads, of an even map's",
        "concentration": "Concentration of heads",
    }
    if "concentration" not in similarity:
        del titles["concentration"]
    figures = (
        f'<figure class="plot" data-plot="similarity" data-part="{key}"><figcaption>{title}</figcaption>'
        + (f'<div class="area" id="similarity-{key}"></div>' if similarity.get(key) else absent())
        + "</figure>"
        for key, title in titles.items()
    )
    return f'<div class="panels">{"".join(figures)}</div>' if similarity else ""


def _phoneme_plot(results: Results) -> str:
    phonemes = results.get("phonemes") or {}
    matrices = phonemes.get("matrices") or {}
    if not matrices:
        return ""
    most = max(len(layers) for layers in matrices.values())
    return figure("phonemes", select("technique", "technique", same(matrices)), slider("layer", most))


def _map_viewer(results: Results) -> str:
    maps = results.get("maps") or {}
    shown = maps.get("techniques") or {}
    if not shown:
        return ""
    layers = max(len(one["layers"]) for one in shown.values())
    heads = max((len(layer or []) for one in shown.values() for layer in one["layers"]), default=1)
    names = list(shown)
    sources = (list(enumerate(one.get("source_layers") or [])) for one in shown.values())
    first = next((layer for pairs in sources for layer, source in pairs if source not in (None, layer)), 0)
    panels = "".join(
        '<div class="map">'
        + select("technique", "technique", same(names), names[min(side, len(names) - 1)])
        + '<p class="said-map"></p><div class="frame"><canvas role="img"></canvas></div>'
        '<p class="readout" role="status"></p><p class="hypothesis"></p></div>'
        for side in range(2)
    )
    said = (
        f'<p class="transcript"><b>transcript</b> {escape(str(maps.get("transcript", NOT_MEASURED)))}'
        f" <small>utterance {escape(str(maps.get('utterance', '')))}</small></p>"
    )
    scale = select("scale", "shade", {"root": "square root of the weight", "linear": "weight"})
    return (
        f'<figure data-plot="maps">{said}<div class="controls">{slider("layer", layers, first)}'
        f'{slider("head", heads)}{scale}</div><div class="panels">{panels}</div></figure>'
    )


def _curve_plot(results: Results) -> str:
    curves = [run for run in results.get("runs", []) if run.get("learning_curve")]
    if not curves:
        return ""
    names = list(dict.fromkeys(run["technique"] for run in curves))
    kinds = {one["name"]: one.get("kind") for one in results.get("techniques", [])}
    first = [name for name in names if kinds.get(name) in ("full", "reuse")][:4] or names[:4]
    metrics = {"dev_wer": "WER of the development set", "dev_cer": "CER of the development set", "loss": "loss"}
    return figure(
        "curves",
        select("corpus", "corpus", same(run["corpus"] for run in curves)),
        select("metric", "show", metrics),
        above=picker("techniques", names, first),
    )


def _papers(results: Results) -> str:
    return table("papers-table", paper_grid(results), "Published claims", prose=True) if results.get("papers") else ""


def _corpora(results: Results) -> str:
    return table("corpora-table", corpus_grid(results), "Corpora", prose=True) if results.get("corpora") else ""


def _runs(results: Results) -> str:
    runs = all_runs(results)
    if not runs:
        return ""
    states = [run.get("state") for run in runs]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(["finished", *states]))
    wrong = [run for run in runs if run.get("state") != "finished"]
    shown = table("", run_grid(wrong), "Runs that did not finish", prose=True) if wrong else ""
    every = table("runs-table", run_grid(runs), "Runs")
    return f"<p>{escape(counted)}.</p>{shown}<details><summary>All {len(runs)} runs</summary>{every}</details>"


def _repeat(results: Results) -> str:
    commands = results.get("commands") or ([results["command"]] if "command" in results else [])
    lines = "\n".join(escape(command) for command in commands)
    return f'<pre tabindex="0"><code>{lines}</code></pre>' if commands else ""


def _machine(results: Results) -> str:
    return definitions(results.get("machine"))


def _config(results: Results) -> str:
    return definitions(results.get("config"))


_SECTIONS: list[tuple[str, str, str, Callable[[Results], str]]] = [
    (
        "front",
        "Accuracy against latency",
        "Each point is a technique, trained in the same recogniser on the same speech. Left is faster, down is more "
        "accurate; the line joins the techniques that no other beats in both. Bars are 95 % intervals. Latency is a "
        "ratio to full attention at the same length T, in encoder frames.",
        _front_plot,
    ),
    (
        "techniques",
        "All techniques",
        "Ratios to full attention, measured figures in small print. Press a column's head to sort by it.",
        _technique_table,
    ),
    (
        "grouping",
        "Error against grouping",
        f"{GROUPING} Bars are 95 % intervals; the dotted line is full attention.",
        _grouping_plot,
    ),
    ("longer", "Trained for longer", LONGER, _longer),
    (
        "speed-up",
        "Speed-up by length",
        "How many times as fast as full attention; transformers is the library's own fused attention (sdpa).",
        _speed_plot,
    ),
    (
        "breakdown",
        "Where the time goes",
        "Warm colours make an attention map, which a reusing layer leaves out; blues apply it to values; greys are "
        "the rest of the pass.",
        _breakdown_plots,
    ),
    (
        "similarity",
        "Likeness of attention maps",
        "How alike the maps of two layers are, and how near each head's attention lies to the diagonal; layers and "
        "heads count from 0.",
        _similarity_plots,
    ),
    (
        "phonemes",
        "Phoneme attention relationship",
        "How strongly frames of one phoneme attend to frames of another, averaged over the heads of a layer.",
        _phoneme_plot,
    ),
    (
        "maps",
        "Attention maps of one utterance",
        "Queries run down, keys run to the right, both in time. Point at a map to read a weight.",
        _map_viewer,
    ),
    ("learning", "Learning curves", "One line for each seed.", _curve_plot),
    ("papers", "Published claims", "", _papers),
    ("corpora", "Corpora", "", _corpora),
    ("runs", "Runs", "", _runs),
    ("commands", "Commands", "Exact commands that repeat it.", _repeat),
    ("machine", "Machine and versions", "", _machine),
    ("settings", "Settings and seeds", "", _config),
]


def _asset(name: str) -> str:
    return files("mapreuse_lab.study").joinpath(name).read_text(encoding="utf-8")
