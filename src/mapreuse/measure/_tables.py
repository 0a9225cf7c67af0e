"""What `bench` and `bench_kernels` found, as tables of text: ratios first."""

from __future__ import annotations

from typing import Any

from mapreuse.console import Table


def bench_tables(results: dict[str, Any]) -> list[Table]:
    """One table for each length: ours as × times as fast as the others, then times, memory and agreement."""
    config = results["config"]
    what = "training step" if config["training"] else "forward pass"
    part = "encoder layers" if config["part"] == "layers" else "whole encoder"
    setting = f"batch {config['batch']}, {config['dtype']}, {_place(results)}"
    tables = []
    for length, measured in results["lengths"].items():
        title = f"{config['encoder']}, {part}, {what}, T = {length} {results['unit']}, {setting}"
        tables.append(_bench_table(title, measured))
    return tables


def kernel_tables(results: dict[str, Any]) -> list[Table]:
    """Ratios of cores to the products they cannot avoid, growth with length, and the times behind them."""
    lengths = results["lengths"]
    header = ["", *(f"T = {length}" for length in lengths)]
    first = next(iter(lengths.values()))
    ratios = [
        [name, *(_ratio(measured["ratios"][name]) for measured in lengths.values())] for name in first["ratios"]
    ]
    growth = results["growth"]
    growth_rows = [
        [name, *(f"{cell[name]:.2f}" for cell in growth.values())] for name in next(iter(growth.values()), {})
    ]
    names = dict.fromkeys(name for measured in lengths.values() for name in measured["cores"])
    times = [[name, *(_time(measured["cores"].get(name)) for measured in lengths.values())] for name in names]
    times.append(["sum of products", *(_time(measured["sum of products"]) for measured in lengths.values())])
    where = f"one layer, 4 heads × 64, batch 1, {results['config']['dtype']}, {_place(results)}"
    note = f"cores agree with transformers' attention to {results['agreement']:.0e}"
    tables = [
        Table(f"Cores over their matrix products, {where}", header, ratios, [note]),
        Table("Times of one call", header, times, []),
    ]
    if growth:
        tables.insert(1, Table("Growth: time(2T) ÷ time(T)", ["", *growth], growth_rows, []))
    return tables


def _bench_table(title: str, measured: dict[str, Any]) -> Table:
    cells, ratios = measured["contestants"], measured["ratios"]
    others = [name for name in cells if any(name in row for row in ratios.values())]
    with_memory = any("memory_bytes" in cell or "memory_not_measured" in cell for cell in cells.values())
    header = ["", *(f"× {name}" for name in others), "time"]
    header += ["memory", "of transformers'"] if with_memory else []
    rows = []
    for name, cell in sorted(cells.items(), key=lambda item: item[1]["kind"] != "ours"):
        row = [name, *(_ratio(ratios.get(name, {}).get(other)) for other in others), _time(cell)]
        if with_memory:
            row += [_mebibytes(cell), _memory_share(cell, cells)]
        rows.append(row)
    notes = [
        "eager and sdpa are transformers' own attentions, flex is FlexAttention; sdpa+optimize has its convolutions and "
        "linear layers run as ours do; × is how many times as fast."
    ]
    notes += [
        f"{name}: not measured: {cell['not_measured']}" for name, cell in cells.items() if "not_measured" in cell
    ]
    notes += [
        f"{name}: memory not measured: {cell['memory_not_measured']}"
        for name, cell in cells.items()
        if "memory_not_measured" in cell
    ]
    notes += [
        f"{name}: {cell['graph_breaks']} graph breaks: what lies between the graphs ran uncompiled"
        for name, cell in cells.items()
        if cell.get("graph_breaks")
    ]
    if measured["compiled_while_timed"]:
        notes.append(f"{measured['compiled_while_timed']} graphs were compiled while contestants were being timed")
    if "front" in measured:
        notes.append(f"{measured['front']['name']} by itself: {_time(measured['front'])}")
    return Table(title, header, rows, notes)


def _place(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return machine["gpu"] if results["config"]["device"] == "cuda" else f"{machine['threads']} CPU threads"


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ± {ratio['spread']:.0%}"


def _time(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "not_measured" in cell:
        return "not measured"
    seconds = cell["median"]
    return (f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms") + f" ± {cell['spread']:.0%}"


def _mebibytes(cell: dict[str, Any]) -> str:
    return f"{cell['memory_bytes'] / 2**20:.0f} MiB" if "memory_bytes" in cell else "not measured"


def _memory_share(cell: dict[str, Any], cells: dict[str, Any]) -> str:
    """1/n of the memory of `transformers`' least hungry contestant."""
    library = [c["memory_bytes"] for c in cells.values() if c["kind"] in ("eager", "sdpa") and "memory_bytes" in c]
    if cell["kind"] != "ours" or "memory_bytes" not in cell or not library:
        return ""
    return f"1/{min(library) / max(cell['memory_bytes'], 1):.1f}"
