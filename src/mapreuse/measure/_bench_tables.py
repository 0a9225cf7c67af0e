"""Results of `bench` as tables: speed-ups first."""

from __future__ import annotations

from typing import Any

from mapreuse.console import Table


def bench_tables(results: dict[str, Any]) -> list[Table]:
    """For each batch: latency, speed-up over the attention implementations that share no maps, and memory."""
    config = results["config"]
    measured = "training step" if config["training"] else "forward pass"
    place = (
        results["machine"]["gpu"] if config["device"] == "cuda" else f"{results['machine']['threads']} CPU threads"
    )
    setting = f"{measured}, {config['dtype']}, {place}"
    return [
        _table(f"{results['model']}, {name} {results.get('unit', '')}".rstrip() + f": {setting}", found)
        for name, found in results["batches"].items()
    ]


def _table(title: str, measured: dict[str, Any]) -> Table:
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
