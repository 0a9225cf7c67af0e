"""Everything to measure on a GPU, in groups that fit a short lease, and the page of the results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapreuse.console import Table, command_line, console, write_json
from mapreuse.maps import STORAGES
from mapreuse.measure import (
    Contestant,
    bench,
    breakdown,
    breakdown_tables,
    contestant_memory,
    latency_text,
    machine,
)
from mapreuse_lab.benchmarks._encoder_bench import ATTENTIONS, open_encoder

PLANS = {"conformer-m": "full,4x4,16x1", "minilm": "full,2x3,6x1"}
"""Plans of each encoder: nothing shared, small groups, and one map for all layers."""
LENGTHS = ((1000, 4000), (250, 8000), (500, 2000))
"""Lengths, the most telling ones first. Those of a set are measured together."""
COMPILED_LENGTHS = (1000, 4000)
"""Lengths for contestants that are compiled, which takes half a minute each."""
TEST_SECONDS = 150
"""Maximum duration of the tests."""
RESERVE = 1.5
"""A group begins if this multiple of the longest one so far fits into the time."""


@dataclass(frozen=True)
class Group:
    """Measurements that are made, and saved, together.

    Attributes:
        kind: "attention", "compiled" or "breakdown".
        encoder: name of the encoder.
        dtype: type of weights and inputs.
        batch_size: sequences in a batch.
        lengths: numbers of positions.
    """

    kind: str
    encoder: str
    dtype: str
    batch_size: int
    lengths: tuple[int, ...]


def groups() -> Iterator[Group]:
    """All groups, the most telling ones first."""
    encoders, dtypes = tuple(PLANS), ("bfloat16", "float32")
    for batch_size in (1, 8):
        for lengths in LENGTHS:
            for encoder in encoders:
                for dtype in dtypes:
                    yield Group("attention", encoder, dtype, batch_size, lengths)
        if batch_size == 1:
            for encoder in encoders:
                for dtype in dtypes:
                    yield Group("breakdown", encoder, dtype, 1, COMPILED_LENGTHS)
            for encoder in encoders:
                yield Group("compiled", encoder, "bfloat16", 1, COMPILED_LENGTHS)
    for encoder in encoders:
        yield Group("compiled", encoder, "float32", 1, COMPILED_LENGTHS)


def run_gpu(
    out: Path, *, seconds: float, device: str = "cuda", chosen: tuple[Group, ...] | None = None, repeats: int = 5
) -> dict[str, Any]:
    """Run the tests that need a GPU, then measure every group that `out/gpu.json` does not contain yet.

    The file and the page are written after each group, so that a lease that ends costs one group.

    Args:
        out: directory of the results.
        seconds: end after this time: a group begins only if it will probably end before.
        device: "cuda"; "cpu" to try the code.
        chosen: the groups; None for all.
        repeats: timed passes of each contestant.

    Returns:
        The contents of `gpu.json`: `machine`, `tests` (the last line of pytest), and `groups`. Each group has its
        fields and `results`, as `measure.bench` or `measure.breakdown` returns them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA GPU; run make gpu where there is one")
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    measured: list[dict[str, Any]] = earlier.get("groups", [])
    done = [{name: one[name] for name in Group.__annotations__} for one in measured]
    missing = [one for one in groups() if _data(one) not in done] if chosen is None else list(chosen)
    results = {"schema": 1, "command": command_line("mapreuse-lab"), "machine": machine()}
    results |= {"tests": earlier.get("tests") or _tested(device), "groups": measured}
    write_json(file, results)
    longest = 0.0
    for group in missing:
        if time.monotonic() - started + RESERVE * longest > seconds:
            console.print("Time is up; run the same command again to continue", highlight=False)
            break
        began = time.monotonic()
        measured.append(_data(group) | {"results": _measured(group, device, repeats)})
        longest = max(longest, time.monotonic() - began)
        write_json(file, results)
        write_gpu_page(results, out)
        console.print(
            f"{group.kind}, {group.encoder}, {group.dtype}, batch {group.batch_size}, T = "
            f"{', '.join(map(str, group.lengths))}: {time.monotonic() - began:.0f} s",
            highlight=False,
        )
    return results


def _data(group: Group) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(group)))


def _tested(device: str) -> str:
    """The last line of the tests that need a GPU."""
    if device == "cpu":
        return "not run"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-o", "filterwarnings="]
    try:
        ran = subprocess.run([*command, "tests"], capture_output=True, text=True, timeout=TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished within {TEST_SECONDS} s"
    print(ran.stdout[-4000:])
    return (ran.stdout.strip().splitlines() or ran.stderr.strip().splitlines() or ["no output"])[-1]


def _measured(group: Group, device: str, repeats: int) -> dict[str, Any]:
    model, batches = open_encoder(
        group.encoder, group.lengths, batch_size=group.batch_size, dtype=group.dtype, device=device
    )
    plans = PLANS[group.encoder]
    if group.kind == "breakdown":
        return breakdown(model, batches, plans=",".join(plans.split(",")[:2]), repeats=repeats)
    kinds: tuple[str, ...] = ("eager", "sdpa", "mapreuse")
    storages: tuple[str, ...] = STORAGES
    if group.kind == "compiled":
        kinds, storages = ("sdpa", "flex", "sdpa+compile", "mapreuse", "mapreuse+compile"), ("dense",)
        plans = ",".join(plans.split(",")[:2])

    def memory(contestant: Contestant, length: str) -> int:
        return contestant_memory(model, {length: batches[length]}, length, contestant, attentions=ATTENTIONS)

    try:
        return bench(
            model,
            batches,
            plans=plans,
            kinds=kinds,
            storages=storages,
            attentions=ATTENTIONS,
            repeats=repeats,
            memory=memory if device == "cuda" else None,
        )
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def write_gpu_page(results: dict[str, Any], out: Path) -> None:
    """Write `README.md` beside `gpu.json`."""
    found = results["machine"]
    lines = [
        "# On a GPU",
        "",
        "Layers with random weights: Conformer-M (16 layers of width 256, relative positions) and MiniLM's size (6",
        "layers of width 384). Latency by CUDA events: medians over turns, ± half the interquartile range. × is the",
        "speed-up over `sdpa`. Memory is the peak of a forward pass in addition to weights and inputs.",
        "Products in float32 do not use TF32.",
        "",
        f"Machine: {found['gpu']}; torch {found['torch']}, transformers {found['transformers']}, mapreuse",
        f"{found['mapreuse']}, commit {found['commit']}. Command: `make gpu`. Tests: {results['tests']}.",
    ]
    for kind, title in (("attention", "Attention and storages"), ("compiled", "Compiled")):
        for (encoder, dtype, batch_size), batches in _by_setting(results, kind).items():
            lines += ["", f"## {title}: {encoder}, {dtype}, batch {batch_size}", ""]
            lines += [_bench_table(batches).markdown()]
            lines += ["", *_notes(batches)] if _notes(batches) else []
    for group in results["groups"]:
        if group["kind"] == "breakdown":
            for table in breakdown_tables(group["results"]):
                lines += ["", f"## {group['encoder']}, {group['dtype']}, T = {table.title}", "", table.markdown()]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def _by_setting(results: dict[str, Any], kind: str) -> dict[tuple[str, str, int], dict[int, Any]]:
    """The batches of `bench` by length, for each encoder, type and batch size."""
    found: dict[tuple[str, str, int], dict[int, Any]] = {}
    for group in results["groups"]:
        if group["kind"] == kind:
            setting = group["encoder"], group["dtype"], group["batch_size"]
            batches = {int(length): at for length, at in group["results"]["batches"].items()}
            found[setting] = dict(sorted((found.get(setting, {}) | batches).items()))
    return found


def _bench_table(batches: dict[int, Any]) -> Table:
    """Latency, speed-up over sdpa and peak memory, by contestant and length."""
    names = dict.fromkeys(name for at in batches.values() for name in at["contestants"])
    rows = [[name, *(_cell(at, name) for at in batches.values())] for name in names]
    return Table("", ["", *(f"T = {length:,}" for length in batches)], rows)


def _cell(at: dict[str, Any], name: str) -> str:
    cell = at["contestants"].get(name, {"not_measured": ""})
    if "not_measured" in cell:
        return "–"
    ratio = at["ratios"].get(name, {}).get("sdpa")
    faster = "" if ratio is None else f", {ratio['median']:.2f}×"
    memory = f", {cell['memory_bytes'] / 1e6:,.0f} MB" if "memory_bytes" in cell else ""
    return latency_text(cell) + faster + memory


def _notes(batches: dict[int, Any]) -> list[str]:
    return [
        f"- {name}, T = {length:,}: not measured: {cell['not_measured']}"
        for length, at in batches.items()
        for name, cell in at["contestants"].items()
        if "not_measured" in cell
    ]
