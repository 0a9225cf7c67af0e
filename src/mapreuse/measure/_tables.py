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
    """Speed-up over the baseline and latency of each contestant, by batch; errors of int8; peak memory.

    The baseline is "sdpa", or else the first contestant that shares no maps.
    """
    config, batches = results["config"], results["batches"]
    base = baseline_of(results)
    cells = {
        name: [at["contestants"][name] for at in batches.values()]
        for name in next(iter(batches.values()))["contestants"]
    }
    columns = [*batches]
    rows = [
        [
            name,
            *(_speed_cell(at["contestants"][name], at["ratios"].get(name, {}).get(base)) for at in batches.values()),
        ]
        for name in cells
    ]
    for title, key, shown in (
        ("error of int8", "int8_error", "{:.3f}".format),
        ("peak memory", "memory_bytes", _mebibytes),
    ):
        found = {name: [cell[key] for cell in row if key in cell] for name, row in cells.items()}
        if any(found.values()):
            columns.append(title)
            for row in rows:
                row.append(shown(max(found[row[0]])) if found[row[0]] else "")
    measured = "training step" if config["training"] else "forward pass"
    place = results["machine"]["gpu"] if config["device"] == "cuda" else _threads(config, results["machine"])
    unit = f", columns: {results['unit']}" if "unit" in results else ""
    title = f"{results['model']}: speed-up over {base} and latency of a {measured}, {config['dtype']}, {place}{unit}"
    return [Table(title, ["", *columns], rows, [*_fastest(batches), *_notes(batches)])]


def baseline_of(results: dict[str, Any]) -> str:
    """The contestant that speed-ups in tables refer to."""
    names = [
        name
        for at in results["batches"].values()
        for name, cell in at["contestants"].items()
        if cell["plan"] == "full"
    ]
    return "sdpa" if "sdpa" in names else next(iter(names), "")


def _threads(config: dict[str, Any], machine: dict[str, Any]) -> str:
    number = config["threads"] or machine["threads"]
    text = f"{number} CPU thread" + "s" * (number > 1)
    other = {name: one for name, one in config.get("thread_seconds", {}).items() if name != str(number)}
    return text + "".join(
        f" (with {name}, this model takes {one / config['thread_seconds'][str(number)]:.2f} times as long)"
        for name, one in other.items()
    )


def _speed_cell(cell: dict[str, Any], ratio: dict[str, float] | None) -> str:
    if "median" not in cell:
        return "not measured"
    return f"{ratio['median']:.2f}×, {latency_text(cell)}" if ratio else latency_text(cell)


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"


def _fastest(batches: dict[str, Any]) -> list[str]:
    """For each batch, the fastest contestant without mapreuse and the fastest with it, also without int8."""
    lines = []
    for batch, at in batches.items():
        timed = {name: cell for name, cell in at["contestants"].items() if "median" in cell}
        for precision, allowed in (
            ("", timed),
            ("without int8, ", {n: c for n, c in timed.items() if not c.get("int8")}),
        ):
            rivals = [name for name, cell in allowed.items() if cell["kind"] != "mapreuse"]
            sharing = [name for name, cell in allowed.items() if cell["kind"] == "mapreuse"]
            if not rivals or not sharing or (precision and len(allowed) == len(timed)):
                continue
            rival, best = (min(names, key=lambda name: allowed[name]["median"]) for names in (rivals, sharing))
            speed_up = allowed[rival]["median"] / allowed[best]["median"]
            lines.append(f"{batch}: {precision}{best} over {rival}, the fastest without mapreuse: {speed_up:.2f}×")
    return lines


def _notes(batches: dict[str, Any]) -> list[str]:
    """Why something was not measured: one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for batch, at in batches.items():
        for name, cell in at["contestants"].items():
            for key, text in (("not_measured", "not measured"), ("memory_not_measured", "memory not measured")):
                if key in cell:
                    reasons.setdefault(f"{text}: {cell[key]}", []).append(name)
            if cell.get("graph_breaks"):
                text = f"{cell['graph_breaks']} graph breaks; code between graphs ran uncompiled"
                reasons.setdefault(text, []).append(name)
        if at["compiled_while_timed"]:
            text = f"{at['compiled_while_timed']} graphs were compiled during the timing"
            reasons.setdefault(text, []).append(batch)
    return [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]


def ratio_text(ratio: dict[str, float] | None) -> str:
    """A speed-up with its spread, such as "1.35 ± 2%"."""
    return "" if ratio is None else f"{ratio['median']:.2f} ± {ratio['spread']:.0%}"


def latency_text(cell: dict[str, Any]) -> str:
    """A latency with its spread, such as "12.5 ms ± 1%"."""
    if "not_measured" in cell:
        return "not measured"
    seconds = cell["median"]
    return (f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms") + f" ± {cell['spread']:.0%}"


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
