"""Results of `bench` and `breakdown` as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mapreuse.console import Table

_TOLERANCE = 0.05
"""Maximum relative difference of the sum of the parts and the whole pass without a note."""

_Measured = dict[str, Any]
"""An entry of `breakdowns` in the results of `breakdown`."""


def bench_tables(results: dict[str, Any]) -> list[Table]:
    """For each batch: latency, speed-up over the attention implementations that share no maps, and memory."""
    config = results["config"]
    measured = "training step" if config["training"] else "forward pass"
    place = (
        results["machine"]["gpu"] if config["device"] == "cuda" else f"{results['machine']['threads']} CPU threads"
    )
    setting = f"{measured}, {config['dtype']}, {place}"
    return [
        _bench_table(f"{results['model']}, {name} {results.get('unit', '')}".rstrip() + f": {setting}", found)
        for name, found in results["batches"].items()
    ]


def _bench_table(title: str, measured: dict[str, Any]) -> Table:
    cells, ratios = measured["contestants"], measured["ratios"]
    compared = [name for name in cells if any(name in row for row in ratios.values())]
    others = [name for name in compared if cells[name]["kind"] != "mapreuse"] or compared
    with_memory = any("memory_bytes" in cell or "memory_not_measured" in cell for cell in cells.values())
    header = ["", "latency", *(f"speed-up over {name}" for name in others), *(["peak memory"] if with_memory else [])]
    rows = [
        [
            name,
            latency_text(cell),
            *(ratio_text(ratios.get(name, {}).get(other)) for other in others),
            *([_memory(cell)] if with_memory else []),
        ]
        for name, cell in cells.items()
    ]
    notes = [
        "eager and sdpa are the attention implementations of transformers. +optimize is mapreuse.optimize: faster "
        "convolutions and linear layers, independent of shared maps. ± is half the interquartile range."
    ]
    for name, cell in cells.items():
        if "not_measured" in cell:
            notes.append(f"{name}: not measured: {cell['not_measured']}")
        if "memory_not_measured" in cell:
            notes.append(f"{name}: memory not measured: {cell['memory_not_measured']}")
        if cell.get("graph_breaks"):
            notes.append(f"{name}: {cell['graph_breaks']} graph breaks; code between graphs ran uncompiled")
    if measured["compiled_while_timed"]:
        notes.append(f"{measured['compiled_while_timed']} graphs were compiled during the timing")
    return Table(title, header, rows, notes)


def ratio_text(ratio: dict[str, float] | None) -> str:
    """A speed-up with its spread, such as "1.35 ± 2%"."""
    return "" if ratio is None else f"{ratio['median']:.2f} ± {ratio['spread']:.0%}"


def latency_text(cell: dict[str, Any]) -> str:
    """A latency with its spread, such as "12.5 ms ± 1%"."""
    if "not_measured" in cell:
        return "not measured"
    seconds = cell["median"]
    return (f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms") + f" ± {cell['spread']:.0%}"


def _memory(cell: dict[str, Any]) -> str:
    return f"{cell['memory_bytes'] / 2**20:.0f} MiB" if "memory_bytes" in cell else "not measured"


def breakdown_tables(results: dict[str, Any]) -> list[Table]:
    """For each batch: the time of each part, the time of one layer of each kind, FLOPs and bytes."""
    tables, titles = [], results["parts"]
    for batch in dict.fromkeys(one["batch"] for one in results["breakdowns"]):
        here = [one for one in results["breakdowns"] if one["batch"] == batch]
        tables += [_time_table(here, titles), _layer_table(here, titles)]
        tables += [_count_table(here, titles, "flops", "GFLOPs"), _count_table(here, titles, "bytes", "GB")]
    return tables


def _time_table(measured: Sequence[_Measured], titles: dict[str, str]) -> Table:
    def cell(one: _Measured, seconds: float) -> tuple[float, str]:
        return seconds, f"{1000 * seconds:.1f} ({seconds / one['attributed']:.0%})"

    rows = _rows(titles, lambda part: (cell(one, one["parts"][part]["seconds"]) for one in measured))
    wholes = (one["whole"] for one in measured)
    rows.append(["sum of the parts", *(f"{1000 * one['attributed']:.1f}" for one in measured)])
    rows.append(["whole pass", *(f"{1000 * whole['seconds']:.1f} ± {whole['spread']:.0%}" for whole in wholes)])
    rows.append(["sum ÷ whole", *(f"{one['coverage']:.1%}" for one in measured)])
    notes = [
        f"{one['name']}: the parts add up to {one['coverage']:.1%} of the pass. The machine was busy, or the pass is "
        "too short for the profiler: use more repeats or longer inputs."
        for one in measured
        if abs(one["coverage"] - 1) > _TOLERANCE
    ]
    return Table(f"{measured[0]['batch']}: milliseconds", ["", *(one["name"] for one in measured)], rows, notes)


def _layer_table(measured: Sequence[_Measured], titles: dict[str, str]) -> Table:
    columns = {f"{one['name']}, {layer['kind']}": layer["parts"] for one in measured for layer in one["layers"]}
    times = [{part: cost["seconds"] for part, cost in parts.items()} for parts in columns.values()]
    rows = _rows(titles, lambda part: ((one[part], f"{1000 * one[part]:.2f}") for one in times))
    rows.append(["layer", *(f"{1000 * sum(one.values()):.2f}" for one in times)])
    return Table(f"{measured[0]['batch']}: milliseconds per layer", ["", *columns], rows)


def _count_table(measured: Sequence[_Measured], titles: dict[str, str], count: str, unit: str) -> Table:
    counts = [{part: cost[count] for part, cost in one["parts"].items()} for one in measured]
    rows = _rows(titles, lambda part: ((one[part], f"{one[part] / 1e9:.3g}") for one in counts))
    rows.append(["sum", *(f"{sum(one.values()) / 1e9:.3g}" for one in counts)])
    return Table(f"{measured[0]['batch']}: {unit}", ["", *(one["name"] for one in measured)], rows)


def _rows(titles: dict[str, str], cells: Callable[[str], Iterable[tuple[float, str]]]) -> list[list[str]]:
    """A row for each part: its cost in each column, and the text of the cell. Costs of 0 stay empty."""
    rows = [[title, *(text if cost else "" for cost, text in cells(part))] for part, title in titles.items()]
    return [row for row in rows if any(row[1:])]
