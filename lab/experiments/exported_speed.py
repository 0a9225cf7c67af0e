"""Latency of Conformer-M in OpenVINO: plans, float32 and int8, with and without mapreuse's kernels.

    python lab/experiments/exported_speed.py build/exported lab/results/speed/exported.json [LENGTHS]

Exports that exist in the directory are kept. All contestants run in turns on one thread; figures are medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import conformer_m, speech_like_features

import mapreuse as mr
from mapreuse.exporting import open_exported

EXPORTS = {
    f"{plan} {precision}{' kernels' if kernels else ''}": (plan, precision, kernels)
    for precision in ("float32", "int8")
    for plan, kernels in (("full", False), ("full", True), ("4x4", False), ("4x4", True))
}
CALIBRATION_LENGTHS = (150, 250, 400)


def model(plan: str) -> torch.nn.Module:
    return mr.apply(conformer_m(), mr.ReusePlan.full(16) if plan == "full" else mr.ReusePlan.parse(plan))


def features(length: int) -> dict[str, torch.Tensor]:
    return {"input_features": speech_like_features(length, 1)}


def contestants(directory: Path) -> tuple[dict[str, Callable[[dict[str, torch.Tensor]], Any]], dict[str, float]]:
    original = conformer_m()
    found: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "transformers sdpa": lambda batch: original(**batch)
    }
    for plan in ("full", "4x4"):
        converted = mr.optimize(model(plan))
        found[f"mapreuse {plan} + optimize"] = lambda batch, converted=converted: converted(**batch)
    errors = {}
    for name, (plan, precision, kernels) in EXPORTS.items():
        path = directory / name.replace(" ", "-")
        if not path.exists():
            int8 = [features(length) for length in CALIBRATION_LENGTHS] if precision == "int8" else None
            mr.export(model(plan), path, features(200), int8=int8, kernels=kernels)
        found[f"OpenVINO {name}"] = open_exported(path, threads=1)
        description = json.loads((path / "mapreuse_export.json").read_text())
        errors[f"OpenVINO {name}"] = description.get("int8_error", {}).get("last_hidden_state", 0.0)
    return found, errors


def medians(found: dict[str, Callable[[dict[str, torch.Tensor]], Any]], length: int) -> dict[str, float]:
    batch = features(length)
    for run in found.values():
        run(batch)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(9 if length < 500 else 3):
        for name, run in found.items():
            started = time.perf_counter()
            run(batch)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    directory, out = map(Path, sys.argv[1:3])
    lengths = [int(length) for length in (sys.argv[3] if len(sys.argv) > 3 else "250,1000,2000").split(",")]
    torch.set_num_threads(1)
    with torch.inference_mode():
        found, errors = contestants(directory)
        times = {length: medians(found, length) for length in lengths}
    for name in found:
        print(
            f"{name:32}", *(f"{times[length][name]:8.1f}" for length in lengths), f"  error {errors.get(name, 0):.3f}"
        )
    out.write_text(json.dumps({"milliseconds": times, "int8_error": errors}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
