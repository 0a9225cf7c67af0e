"""What `analyze` found, as one page of HTML that needs nothing else, in light and dark."""

from __future__ import annotations

from html import escape

from jaxtyping import Float
from torch import Tensor

from mapreuse.console import Table
from mapreuse.measure._analysis import Analysis
from mapreuse.measure._analysis_report import HeatMap, analysis_tables, heat_maps

Colour = tuple[int, int, int]

_LEVELS = 20
_SCALES: dict[str, tuple[Colour, ...]] = {
    "light": ((247, 251, 255), (107, 174, 214), (8, 48, 107)),
    "dark": ((20, 32, 48), (46, 120, 176), (222, 240, 255)),
}
"""Least, middle and greatest value: away from the page's own background as values grow."""

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#57606a;--line:#d0d7de}
body{margin:2rem auto;max-width:70rem;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif;background:var(--page);
color:var(--text)}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem}p{max-width:45rem}code{overflow-wrap:anywhere}
.note{color:var(--soft)}.scroll{overflow-x:auto}.panels{display:flex;flex-wrap:wrap;gap:1.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.85rem}
caption{text-align:left;padding:.3rem 0;font-weight:600}
th,td{padding:.2rem .45rem;text-align:right}th{font-weight:500;color:var(--soft)}
.text td,.text th{border-bottom:1px solid var(--line)}
.legend{display:inline-flex;align-items:center;gap:.4rem;font-size:.85rem}
.legend span{display:inline-block;width:.6rem;height:1rem}
svg{max-width:100%;height:auto}svg text{fill:var(--text);font:12px system-ui,sans-serif}
svg .axis{stroke:var(--soft);fill:none}svg polyline{fill:none;stroke-width:2}
"""


def analysis_page(analysis: Analysis, *, model: str, calibration: str, command: str) -> str:
    """The page: a table of the layers, every heat map as a coloured table, and the curves of diagonality."""
    layers, *_ = analysis_tables(analysis)
    num_layers, num_heads = analysis.entropy.heads.shape
    title = f"Attention maps of {escape(model)}"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}{_colours()}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>",
        f"<p>Layers: {num_layers}; heads in each: {num_heads}; both count from 0. Measured over "
        f"{analysis.similarity.num_queries} queries of {escape(calibration)}, padding left out.</p>",
        f"<p>Made by <code>{escape(command)}</code></p>",
        f"<h2>Layers</h2>\n{_text_table(layers)}",
        *(_section(shown) for shown in heat_maps(analysis)),
        "<h2>Attention near the diagonal</h2>",
        '<p class="note">Share of attention within a distance of the diagonal, as a share of the sequence, of each '
        "layer, averaged over heads; diagonality is the area under the curve.</p>",
        _curves(analysis.diagonality.ranges, analysis.diagonality.curve.mean(1)),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def level_colours(scheme: str) -> list[tuple[Colour, Colour]]:
    """Background and text of every level of a scheme, "light" or "dark"; of black and white, what is read better."""
    least, middle, greatest = _SCALES[scheme]
    found = []
    for level in range(_LEVELS + 1):
        share = 2 * level / _LEVELS
        low, high = (least, middle) if share < 1 else (middle, greatest)
        share = share if share < 1 else share - 1
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
        background = (red, green, blue)
        text = max(((0, 0, 0), (255, 255, 255)), key=lambda text: contrast(text, background))
        found.append((background, text))
    return found


def contrast(one: Colour, other: Colour) -> float:
    """The contrast ratio of two colours, from 1 to 21 (Web Content Accessibility Guidelines 2.2)."""

    def luminance(colour: Colour) -> float:
        shares = (part / 255 for part in colour)
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _colours() -> str:
    def rules(scheme: str) -> str:
        return "\n".join(
            f".c{level}{{background:{_hex(background)};color:{_hex(text)}}}.s{level}{{stroke:{_hex(background)}}}"
            for level, (background, text) in enumerate(level_colours(scheme))
        )

    dark = ":root{--page:#0d1117;--text:#e6edf3;--soft:#9da7b3;--line:#30363d}"
    return f"{rules('light')}\n@media (prefers-color-scheme:dark){{{dark}\n{rules('dark')}}}\n"


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _section(shown: HeatMap) -> str:
    low, high = shown.span
    swatches = "".join(f'<span class="c{level}"></span>' for level in range(0, _LEVELS + 1, 2))
    panels = "\n".join(_heat_table(shown, title, values) for title, values in shown.panels.items())
    return (
        f'<h2>{escape(shown.title)}</h2>\n<p class="note">{escape(shown.note)}</p>\n'
        f'<p class="legend" aria-hidden="true">{low:g} {swatches} {high:g}</p>\n'
        f'<div class="panels">\n{panels}\n</div>'
    )


def _heat_table(shown: HeatMap, title: str, values: Float[Tensor, "rows columns"]) -> str:
    low, high = shown.span
    caption = f"{title}: {shown.rows} ↓, {shown.columns} →".removeprefix(": ")
    head = "".join(f'<th scope="col">{column}' for column in range(values.shape[1]))
    rows = []
    for row, cells in enumerate(values.tolist()):
        shares = [min(max((value - low) / (high - low), 0), 1) for value in cells]
        columns = "".join(
            f"<td class=c{round(_LEVELS * share)}>{value:.2f}" for value, share in zip(cells, shares, strict=True)
        )
        rows.append(f'<tr><th scope="row">{row}{columns}')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr><td>{head}</thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _text_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}' for cell in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}' + "".join(f"<td>{escape(cell)}" for cell in rest)
        for first, *rest in table.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table class="text">'
        f"<thead><tr>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>{notes}"
    )


def _curves(ranges: Float[Tensor, " points"], curves: Float[Tensor, "layers points"]) -> str:
    """Lines from the left (r = 0) to the right (r = 1), later layers in stronger colours."""
    left, top, width, height = 50, 10, 520, 260

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x, top + height * (1 - y)

    lines = []
    for layer, curve in enumerate(curves.tolist()):
        # The weakest quarter of the colours would be lost against the page.
        level = round(_LEVELS * (0.25 + 0.75 * layer / max(len(curves) - 1, 1)))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, ranges.tolist(), curve))
        lines.append(f'<polyline class="s{level}" points="{points}"><title>layer {layer}</title></polyline>')
    ticks = "".join(
        f'<text x="{at(share, 0.0)[0]:.0f}" y="{top + height + 18}" text-anchor="middle">{share:g}</text>'
        f'<text x="{left - 6}" y="{at(0.0, share)[1] + 4:.0f}" text-anchor="end">{share:g}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    said = ", ".join(f"layer {layer}: {curve[5]:.2f}" for layer, curve in enumerate(curves.tolist()))
    return (
        f'<svg viewBox="0 0 {left + width + 20} {top + height + 45}" role="img" width="590" '
        f'aria-label="Share of attention within a quarter of the sequence: {said}">'
        f'<path class="axis" d="M{left},{top}V{top + height}H{left + width}"/>{ticks}'
        f'<text x="{left + width / 2:.0f}" y="{top + height + 38}" text-anchor="middle">distance ÷ length; '
        "paler lines are earlier layers</text>" + "".join(lines) + "</svg>"
    )
