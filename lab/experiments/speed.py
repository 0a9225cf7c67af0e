"""Write lab/results/speed/README.md from the measurements beside it, or with --check fail when it differs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mapreuse as mr
from mapreuse.measure import conformer_m
from mapreuse.measure._flops import encoder_work

SPEED = Path(__file__).parent.parent / "lab/results/speed"

Results = dict[str, Any]

_AROUND_ATTENTION = ("feed_forward", "convolution", "norms", "rest")
"""Parts of a layer, as `mapreuse breakdown` has them, that attention is not."""


def main() -> int:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(SPEED.glob("*.json"))}
    maps = files.pop("concentration", None)
    if not files:
        print("lab/results/speed holds no results")
        return 1
    text = "\n".join([*report(files), *(concentrated(maps) if maps else [])]) + "\n"
    target = SPEED / "README.md"
    if "--check" not in sys.argv:
        target.write_text(text)
    elif not target.is_file() or target.read_text() != text:
        print("lab/results/speed/README.md does not show the figures beside it; run make readme")
        return 1
    return 0


def report(files: dict[str, Results]) -> list[str]:
    """The page: figures beside their goals, then memory, storages, and the command of every file."""
    machine = next(iter(files.values()))["machine"]
    lines = [
        "# Speed",
        "",
        "Written by `make readme` from the JSON files in this directory, which `make speed` makes, alone on the",
        "machine. Ratios are medians over rounds in which all contestants took turns, each turn one call that is not",
        "timed and one that is; those of what would be if something took no time divide times of two runs. Batch 1,",
        "float32, 2 CPU threads, random weights, inputs like speech (or text). Bold: short of the goal.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['instructions']}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}.",
        *(
            f"`{name}` alone is of another: {own['processor']}, {own['cores']} cores, {own['instructions']}."
            for name, own in ((name, file["machine"]) for name, file in files.items())
            if any(own[key] != machine[key] for key in ("processor", "instructions"))
        ),
        "",
        "| figure | T | measured | goal |",
        "|---|---|---|---|",
    ]
    for figure, name, values, goals in FIGURES:
        if name not in files:
            continue
        measured = values(files[name])
        shown = ", ".join(_marked(value, limit) for value, limit in _with_limits(measured, goals))
        lines.append(f"| {figure} | {', '.join(measured)} | {shown} | {goals} |")
    lines += reasons(files)
    for name, title in TABLES.items():
        if name in files:
            lines += ["", f"## {title}", "", *_costs(files[name])]
    lines += ["", "## Commands", ""]
    for name, results in files.items():
        command = results["command"].partition(" --json")[0]  # `breakdown` names its file itself
        lines.append(f"- `{name}.json`: `{command} --json lab/results/speed/{name}.json`")
    return lines


def _with_limits(measured: dict[str, float], goals: str) -> list[tuple[float, tuple[float, float] | None]]:
    """Every figure with the least and the most that its goal allows, if it has one; one goal is for all of them."""
    if "–" in goals:
        low, high = map(float, goals.split("–"))
        return [(value, (low, high)) for value in measured.values()]
    sign, numbers = goals[0], goals[1:].split(",")
    if sign not in "≥≤":
        return [(value, None) for value in measured.values()]
    ends = [None if number.strip() == "—" else float(number) for number in numbers]
    limits = [None if end is None else (end, math.inf) if sign == "≥" else (0.0, end) for end in ends]
    limits = limits * len(measured) if len(limits) == 1 else limits
    return list(zip(measured.values(), limits, strict=True))


def _marked(value: float, limit: tuple[float, float] | None) -> str:
    missed = limit is not None and not limit[0] <= round(value, 2) <= limit[1]
    return f"**{value:.2f}**" if missed else f"{value:.2f}"


def reasons(files: dict[str, Results]) -> list[str]:
    """Where the time goes now, and what stands in the way of the goals that are out of reach."""
    lines = [
        "",
        "## What is left, and why",
        "",
        "- PyTorch's own products (`torch.matmul`) are MKL's. Where oneDNN's are faster, cores that are compared",
        "  with MKL's look better than beside the faster library: see the ratios in which ours is compared with",
        "  `sdpa` whose linear layers run as ours do.",
    ]
    for one in files["breakdown"]["breakdowns"]:
        if one["name"] != "ours 4x4" or str(one["frames"]) not in files["two"]["lengths"]:
            continue
        whole = sum(part["seconds"] for part in one["parts"].values())
        ranked = sorted(one["parts"].items(), key=lambda item: -item[1]["seconds"])[:5]
        shares = ", ".join(f"{name.replace('_', '-')} {part['seconds'] / whole:.0%}" for name, part in ranked)
        lines.append(f"- Of a pass with groups of 4 at T = {one['frames']}, front end included: {shares}.")
    cores = files["cores"]["lengths"]
    parts = {one["frames"]: one["parts"] for one in files["breakdown"]["breakdowns"] if one["name"] == "ours full"}
    for length, at in files["two"]["lengths"].items():
        if length in cores and int(length) in parts:
            product = cores[length]["ratios"]["reusing core ÷ map × values"]["median"]
            full = at["contestants"]["ours full"]["median"]
            around = sum(parts[int(length)][part]["seconds"] for part in _AROUND_ATTENTION)
            lines += [
                f"- Groups of 8, T = {length}: a reusing core takes {product:.2f} of PyTorch's float32 product,",
                f"  and what is not attention {around / full:.0%} of the full model's time, which no plan shares.",
                f"  By FLOPs alone the ratio would be {_arithmetic('8x2')(files['two'])[length]:.2f}.",
            ]
    for length, at in files["memory"]["lengths"].items():
        memory = {name: cell["memory_bytes"] / 1e6 for name, cell in at["contestants"].items()}
        quarter, one_map = min(memory["eager"], memory["sdpa"]) / 4, 4 * int(length) ** 2 * 4 / 1e6
        lines += [
            f"- Memory, T = {length}: a quarter of `transformers`' least is {quarter:.0f} MB. One float32 map of",
            f"  four heads takes {one_map:.0f} MB, in 16 bits {one_map / 2:.0f} MB, and beside its map a pass takes",
            f"  {memory['ours 4x4'] - one_map:.0f} MB. Maps in 8 bits and recomputed maps reach the goal.",
        ]
    return lines


def concentrated(results: Results) -> list[str]:
    """How much of its maps a model needs, and what that means for carrying them sparse."""
    lines = [
        "",
        "## How concentrated maps are",
        "",
        f"`{results['command']}`: the share of keys in the interval that is left when, of every row",
        "of 64 neighbouring queries, at most ε/2 of the mass is cut off at either end. Products with maps so",
        "restricted would cost that share of the whole ones.",
        "",
        "| model | ε | mean | by layer | least of any head |",
        "|---|---|---|---|---|",
    ]
    for name, model in results["models"].items():
        for epsilon, found in model.items():
            layers = ", ".join(f"{share:.0%}" for share in found["layers"])
            least = found["least of any head"]
            lines.append(f"| {name} | {epsilon} | {found['mean']:.0%} | {layers} | {least:.0%} |")
    least_mean = min(found["mean"] for model in results["models"].values() for found in model.values())
    lines += [
        "",
        f"The least of the means is {least_mean:.0%}: of the products with these maps, no more than "
        f"{1 - least_mean:.0%} could be saved, for an error of the same size as ε, before what it costs to find the",
        "intervals. So maps are not carried sparse.",
    ]
    return lines


def _ratio(ours: str, other: str) -> Callable[[Results], dict[str, float]]:
    def values(results: Results) -> dict[str, float]:
        found = {}
        for length, at in results["lengths"].items():
            if other in at["ratios"].get(ours, {}):
                found[length] = at["ratios"][ours][other]["median"]
        return found

    return values


def _best_ratio(ours: tuple[str, ...], other: str) -> Callable[[Results], dict[str, float]]:
    """The fastest of several of ours, length by length."""

    def values(results: Results) -> dict[str, float]:
        ratios = [_ratio(one, other)(results) for one in ours]
        return {length: max(r[length] for r in ratios if length in r) for length in results["lengths"]}

    return values


def _memory(ours: str) -> Callable[[Results], dict[str, float]]:
    """Peak memory over the weights: the least of `transformers`' contestants ÷ ours."""

    def values(results: Results) -> dict[str, float]:
        found = {}
        for length, at in results["lengths"].items():
            memory = {name: cell["memory_bytes"] for name, cell in at["contestants"].items()}
            found[length] = min(memory[name] for name in ("eager", "sdpa")) / memory[ours]
        return found

    return values


def _free_reuse(ours: str, full: str, reusing: int) -> Callable[[Results], dict[str, float]]:
    """What bounds the ratio: the time of full over that of ours less what its reusing cores take (`cores.json`)."""

    def values(results: Results) -> dict[str, float]:
        cores = json.loads((SPEED / "cores.json").read_text())["lengths"]
        found = {}
        for length, at in results["lengths"].items():
            if length in cores:
                core = cores[length]["cores"]["reusing core"]["median"]
                times = {name: cell["median"] for name, cell in at["contestants"].items()}
                found[length] = times[full] / (times[ours] - reusing * core)
        return found

    return values


def _arithmetic(notation: str) -> Callable[[Results], dict[str, float]]:
    """FLOPs of the layers of full over those of a plan: the ratio of two models that both run at the same rate."""

    def values(results: Results) -> dict[str, float]:
        found = {}
        for length in results["lengths"]:
            full, ours = (_flops(plan, int(length)) for plan in ("1x16", notation))
            found[length] = full / ours
        return found

    return values


def _flops(notation: str, frames: int) -> int:
    _, layers = encoder_work(mr.apply(conformer_m(), mr.ReusePlan.parse(notation)), frames)
    return sum(work.flops for layer in layers for work in layer.values())


def _free_attention(results: Results) -> dict[str, float]:
    """What bounds the ratio: the time of sdpa over that of what is not attention in ours (`breakdown.json`)."""
    taken_apart = json.loads((SPEED / "breakdown.json").read_text())["breakdowns"]
    around = {
        str(one["frames"]): sum(one["parts"][part]["seconds"] for part in _AROUND_ATTENTION)
        for one in taken_apart
        if one["name"] == "ours 4x4"
    }
    times = {length: at["contestants"]["sdpa"]["median"] for length, at in results["lengths"].items()}
    return {length: time / around[length] for length, time in times.items() if length in around}


def _core(ratio: str) -> Callable[[Results], dict[str, float]]:
    return lambda results: {length: at["ratios"][ratio]["median"] for length, at in results["lengths"].items()}


def _growth(core: str) -> Callable[[Results], dict[str, float]]:
    return lambda results: {span: grown[core] / grown["map × values"] for span, grown in results["growth"].items()}


FIGURES: list[tuple[str, str, Callable[[Results], dict[str, float]], str]] = [
    ("reusing core ÷ one product", "cores", _core("reusing core ÷ map × values"), "≤ —, 1.05, 1.05, 1.05, —"),
    (
        "computing core ÷ sum of its products",
        "cores",
        _core("computing core ÷ sum of its products"),
        "≤ —, 1.25, 1.25, 1.25, —",
    ),
    (
        "computing core that keeps its map ÷ sum of its products",
        "cores",
        _core("computing core, map kept ÷ sum of its products"),
        "≤ —, 1.25, 1.25, 1.25, —",
    ),
    (
        "growth of the reusing core, time(2T) ÷ time(T), ÷ that of the product",
        "cores",
        _growth("reusing core"),
        "0.9–1.1",
    ),
    ("Conformer-M layers: sdpa ÷ ours full", "encoder", _ratio("ours full", "sdpa"), "≥ 1.6, 2.4, 3.0"),
    ("… sdpa ÷ ours with groups of 4", "encoder", _ratio("ours 4x4", "sdpa"), "≥ 2.2, 3.8, 5.0"),
    (
        "… sdpa with its convolutions and linear layers run as ours do ÷ ours full",
        "encoder",
        _ratio("ours full", "sdpa+optimize"),
        "—",
    ),
    ("… the same ÷ ours with groups of 4", "encoder", _ratio("ours 4x4", "sdpa+optimize"), "—"),
    ("… if attention took no time at all", "encoder", _free_attention, "—"),
    (
        "… sdpa compiled ÷ ours with groups of 4, the faster of compiled and not",
        "compiled",
        _best_ratio(("ours 4x4", "ours 4x4+compile"), "sdpa+compile"),
        "≥ 1.6, 2.6, 3.4",
    ),
    (
        "Conformer-M layers: ours full ÷ ours with groups of 8",
        "two",
        _ratio("ours 8x2", "ours full"),
        "≥ 1.6, 1.8, 1.9",
    ),
    (
        "… if a reusing core took no time at all",
        "two",
        _free_reuse("ours 8x2", "ours full", reusing=14),
        "—",
    ),
    ("… ratio of their layers' FLOPs", "two", _arithmetic("8x2"), "—"),
    (
        "the same without relative positions: fused sdpa ÷ ours with groups of 4",
        "plain",
        _ratio("ours 4x4", "sdpa"),
        "≥ 1.2, 1.2",
    ),
    ("BERT-base, sdpa ÷ ours with groups of 4", "bert", _ratio("ours 4x3", "sdpa"), "≥ 1.15"),
    ("Conformer-M with its front end, sdpa ÷ ours with groups of 4", "whole", _ratio("ours 4x4", "sdpa"), "—"),
    (
        "peak memory over the weights, `transformers`' least (eager, sdpa) ÷ ours with groups of 4",
        "memory",
        _memory("ours 4x4"),
        "≥ 4",
    ),
    ("… with maps in 16 bits", "memory", _memory("ours 4x4 dense16"), "≥ 4"),
    ("… with maps in 8 bits", "memory", _memory("ours 4x4 dense8"), "≥ 4"),
    ("… with maps recomputed", "memory", _memory("ours 4x4 recompute"), "≥ 4"),
    (
        "a training step of Conformer-M, ours full ÷ groups of 4",
        "training",
        _ratio("ours 4x4", "ours full"),
        "≥ 1.35",
    ),
    ("a training step of Conformer-M, sdpa ÷ ours full", "training", _ratio("ours full", "sdpa"), "—"),
    ("… sdpa ÷ ours with groups of 4", "training", _ratio("ours 4x4", "sdpa"), "—"),
    (
        "Conformer-M layers in bfloat16, where it is multiplied fast: sdpa ÷ ours full",
        "bfloat16",
        _ratio("ours full", "sdpa"),
        "—",
    ),
    ("… sdpa ÷ ours with groups of 4", "bfloat16", _ratio("ours 4x4", "sdpa"), "—"),
    ("… ours full ÷ ours with groups of 8", "bfloat16", _ratio("ours 8x2", "ours full"), "—"),
]

TABLES = {
    "storages": "How shared maps are carried, groups of 4",
    "long": "A 20-minute recording, T = 30,000",
}


def _costs(results: Results) -> list[str]:
    """Time, peak memory where it was measured, and agreement with the definition, of every contestant."""
    lines = ["| T | | time | peak memory | off the definition by, at T ≤ 1000 |", "|---|---|---|---|---|"]
    for length, at in results["lengths"].items():
        for name, cell in at["contestants"].items():
            if "median" not in cell:
                lines.append(f"| {length} | {name} | {cell['not_measured']} | | |")
                continue
            memory = f"{cell['memory_bytes'] / 1e9:.2f} GB" if "memory_bytes" in cell else ""
            name += f": {cell['carried']}" if "carried" in cell else ""
            known = cell["storage"] != "auto" or "carried" in cell  # else another storage may have been compared
            agreement = f"{cell['agreement']:.0e}" if known else "not measured"
            lines.append(f"| {length} | {name} | {cell['median']:.2f} s | {memory} | {agreement} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
