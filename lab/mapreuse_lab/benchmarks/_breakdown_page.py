"""The page and the plot of a breakdown by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mapreuse.console import Table
from mapreuse_lab.benchmarks._breakdown import CONTESTANTS, ENCODERS, encoder_costs, pieces

_GROUPS = {
    "positional scores": ("positions", "positional_scores"),
    "content scores, softmax": ("scores", "softmax"),
    "fused attention": ("fused",),
    "map × values": ("context",),
    "projections of attention": ("query", "key", "value", "projections", "output"),
    "feed-forward": ("feed_forward",),
    "convolution": ("convolution",),
    "subsampling": ("subsampling", "embeddings"),
    "norms and rest": ("norms", "rest"),
}
"""What the plot shows as one area; together, these are all parts."""

ATTENTION = tuple(part for group in list(_GROUPS)[:5] for part in _GROUPS[group])
"""The parts of self-attention."""

_Piece = dict[str, Any]


def write_breakdown_page(results: dict[str, Any], out: Path) -> None:
    """Write `README.md` and `breakdown.png` beside `breakdown.json`."""
    out.mkdir(parents=True, exist_ok=True)
    plot_shares(results).savefig(out / "breakdown.png", dpi=110)
    (out / "README.md").write_text("\n".join(_page(results)) + "\n")


def plot_shares(results: dict[str, Any]) -> Figure:
    """Share of the time of each group of parts against the length, a panel for each encoder and contestant."""
    lengths = sorted({one["length"] for one in results["pieces"]})
    figure = Figure(figsize=(3.2 * len(CONTESTANTS), 3.2 * len(ENCODERS)), layout="constrained")
    panels = figure.subplots(len(ENCODERS), len(CONTESTANTS), sharex=True, sharey=True, squeeze=False)
    for row, encoder in zip(panels, ENCODERS, strict=True):
        for axes, contestant in zip(row, CONTESTANTS, strict=True):
            found = [one for one in _best(results, encoder, contestant).values() if "seconds" in one]
            shares = [[100 * _share(one, parts) for one in found] for parts in _GROUPS.values()]
            axes.stackplot([one["length"] for one in found], shares, labels=list(_GROUPS))
            axes.set_title(f"{encoder}, {contestant}", fontsize=9)
            axes.set_xscale("log")
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, fontsize=8)
            axes.minorticks_off()
            axes.set_ylim(0, 100)
    for axes in panels[-1]:
        axes.set_xlabel("encoder frames")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the time, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _best(results: dict[str, Any], encoder: str, contestant: str) -> dict[int, _Piece]:
    """The piece of each length: the whole encoder if it was measured, else its layers."""
    found: dict[int, _Piece] = {}
    for one in sorted(results["pieces"], key=lambda one: (one["length"], one["whole"])):
        if (one["encoder"], one["contestant"]) == (encoder, contestant):
            found[one["length"]] = one
    return found


def _share(piece: _Piece, parts: tuple[str, ...]) -> float:
    costs = encoder_costs(piece)
    return sum(costs[part]["seconds"] for part in parts if part in costs) / _total(piece)


def _total(piece: _Piece) -> float:
    return sum(cost["seconds"] for cost in encoder_costs(piece).values())


def _page(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    lines = [
        "# Where the time goes, by length",
        "",
        "Conformer-M (16 layers of width 256, 4 heads, relative positions, front end included) and the same layers",
        "without relative positions, with random weights; batch 1, float32, one CPU thread. `sdpa` is the encoder of",
        "transformers. `4x4` shares a map in groups of 4 layers, `full` shares nothing.",
        "",
        "![Share of each part of the encoder against length](breakdown.png)",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB,",
        f"{machine['instructions']}; torch {machine['torch']}, transformers {machine['transformers']}.",
        f"Command: `{results['command']}`,",
        "which continues where it stopped (`make breakdown`). Notes name what did not fit into memory.",
        *_missing(results),
        "",
        "## The whole encoder",
        "",
        "Up to 2,000 frames, all 16 layers ran. Cells with Σ are sums: one layer of each kind ran, and the cell",
        "shows everything outside the layers, plus 16 computing layers, or plus 4 computing and 12 reusing ones.",
        "Passes over long inputs were timed once. The shares are those of self-attention.",
        "",
    ]
    notes: dict[str, None] = {}
    for encoder in ENCODERS:
        lines += [f"### {encoder}", "", _encoder_table(results, encoder, notes).markdown(), ""]
    checks = _check_table(results)
    if checks.rows:
        lines += ["At 2,000 frames both were measured. Sum of layers ÷ whole encoder:", "", checks.markdown(), ""]
    lines += [*(f"- {note}" for note in notes), ""]
    lines += [
        "## One layer",
        "",
        "Milliseconds · GFLOPs · GB of one layer. Bytes are the sizes of the inputs and outputs of every operator,",
        "each once: what a cache keeps between operators, or a kernel reads again, is not known. OpenVINO fuses more",
        "operators than PyTorch, so it has fewer bytes. Up to 2,000 frames, they are means over a kind of layer.",
        "",
    ]
    for encoder in ENCODERS:
        for contestant in CONTESTANTS:
            for kind in ("computing", "reusing"):
                table = _layer_table(results, encoder, contestant, kind)
                if table.rows:
                    lines += [f"### {encoder}, {contestant}: a {kind} layer", "", table.markdown(), ""]
    return lines[:-1]


def _missing(results: dict[str, Any]) -> list[str]:
    """A sentence about the lengths at which something is not measured yet."""
    done = {(one["encoder"], one["contestant"], one["length"], one["whole"]) for one in results["pieces"]}
    open_lengths = [
        one.length for one in pieces() if (one.encoder, one.contestant, one.length, one.whole) not in done
    ]
    lengths = ", ".join(f"{length:,}" for length in dict.fromkeys(open_lengths))
    return [f"Not measured yet, or not all of it: T = {lengths}."] if lengths else []


def _encoder_table(results: dict[str, Any], encoder: str, notes: dict[str, None]) -> Table:
    """Milliseconds of the encoder, and the share of self-attention in them."""
    found = {contestant: _best(results, encoder, contestant) for contestant in CONTESTANTS}
    rows = []
    for length in sorted({length for by_length in found.values() for length in by_length}):
        row = [f"{length:,}"]
        for contestant, by_length in found.items():
            piece = by_length.get(length)
            if piece is None or "not_measured" in piece:
                row.append("–")
                if piece is not None:
                    notes[f"{encoder}, {contestant}, {length:,}: not measured, {piece['not_measured']}."] = None
                continue
            mark, stored = (
                "" if piece["whole"] else "Σ ",
                "" if piece["storage"] == "dense" else f", {piece['storage']}",
            )
            seconds = piece["seconds"] if piece["whole"] else _total(piece)
            row.append(f"{mark}{_milliseconds(seconds)} ms ({_share(piece, ATTENTION):.0%}{stored})")
        rows.append(row)
    return Table("", ["T", *(f"{contestant} (attention)" for contestant in CONTESTANTS)], rows)


def _check_table(results: dict[str, Any]) -> Table:
    """Sums of layers relative to the whole encoder, where both were measured."""
    rows = []
    for encoder in ENCODERS:
        row = [encoder]
        for contestant in CONTESTANTS:
            pieces = {
                (one["length"], one["whole"]): one
                for one in results["pieces"]
                if (one["encoder"], one["contestant"]) == (encoder, contestant) and "seconds" in one
            }
            both = [length for length, whole in pieces if whole and (length, False) in pieces]
            row.append(", ".join(f"{_total(pieces[n, False]) / pieces[n, True]['seconds']:.2f}" for n in both))
        if any(row[1:]):
            rows.append(row)
    return Table("", ["", *CONTESTANTS], rows)


def _layer_table(results: dict[str, Any], encoder: str, contestant: str, kind: str) -> Table:
    found = {length: one[kind] for length, one in _best(results, encoder, contestant).items() if kind in one}
    rows = []
    for part, title in results["parts"].items():
        cells = [_cell(parts[part]) if part in parts else "" for parts in found.values()]
        if any(cells):
            rows.append([title, *cells])
    if rows:
        totals = (
            {name: sum(cost[name] for cost in parts.values()) for name in ("seconds", "flops", "bytes")}
            for parts in found.values()
        )
        rows.append(["layer", *map(_cell, totals)])
    return Table("", ["", *(f"T = {length:,}" for length in found)], rows)


def _cell(cost: dict[str, float]) -> str:
    return f"{_milliseconds(cost['seconds'])} · {cost['flops'] / 1e9:.3g} · {cost['bytes'] / 1e9:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
