"""`bench` as a PNG image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapreuse.measure._tables import baseline_of


def plot_bench(results: dict[str, Any], path: str | Path) -> None:
    """Write a bar chart of the speed-ups of `bench` to a PNG file: contestants by batch.

    It needs matplotlib, which `pip install 'mapreuse[plots]'` installs.
    """
    from matplotlib.figure import Figure

    batches, base = results["batches"], baseline_of(results)
    names = list(next(iter(batches.values()))["contestants"])
    figure = Figure(figsize=(8, 1 + 0.16 * len(names) * len(batches)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(batches)
    for number, (batch, at) in enumerate(batches.items()):
        speeds = [
            1.0 if name == base else at["ratios"].get(name, {}).get(base, {}).get("median", 0.0) for name in names
        ]
        places = [row + number * height for row in range(len(names))]
        axes.barh(places, speeds, height, label=batch)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xlabel(f"speed-up over {base}")
    axes.set_title(results["model"])
    axes.legend()
    figure.savefig(path, dpi=120)
