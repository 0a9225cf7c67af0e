"""A whole conversion, as the command line asks for it: search, align, refit, distil."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoTokenizer

from mapreuse.conversion._align import align
from mapreuse.conversion._distill import DistillConfig, distill
from mapreuse.conversion._refit import refit
from mapreuse.conversion._search import FEWEST, calibrating_and_judging, relative_latencies, search
from mapreuse.conversion._states import hidden_state_error
from mapreuse.conversion._validation import calibration_batches, check_precision, digest
from mapreuse.models import apply, copy_with_same_weights, transformer_directory
from mapreuse.plan import ReusePlan

_BUDGET = re.compile(r"\s*(latency|error)\s*(?:<=|≤|=)\s*([0-9.]+(?:e-?[0-9]+)?)\s*[x×]?\s*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")
_NOT_COPIED = (*_WEIGHTS, "config.json", "onnx", "openvino")
_OF_NO_MODEL = (".git*", "__pycache__")

_SEARCHED, _REFITTED, _DISTILLED, _WRITTEN = _PARTS = ("search.jsonl", "refitted", "distill", "written")
"""What a directory of work holds."""

_FEWEST_TO_DISTIL = 8
"""Batches: `distill` keeps every eighth apart."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did to a model.

    Attributes:
        plan: the plan in force, heads assigned.
        errors: the error (`hidden_state_error` on calibration batches kept apart) after each step: `aligned`,
            `refitted` and, where it was asked for, `distilled`.
        latency: time of a forward pass on the calibration batch of median size, by the original's in the same run.
        exact_latency: the same of the model under a plan that reuses nothing.
        parameters: of the original and of the converted model.
    """

    plan: ReusePlan
    errors: dict[str, float]
    latency: float
    exact_latency: float
    parameters: tuple[int, int]


def parse_budget(text: str) -> dict[str, float]:
    """`{"latency": 0.7}` from "latency<=0.7" or "latency ≤ 0.7×", `{"error": 0.02}` from "error<=0.02"."""
    match = _BUDGET.fullmatch(text)
    try:
        if match is not None:
            return {match[1]: float(match[2])}
    except ValueError:
        pass
    raise ValueError(f"budget {text!r}: expected latency<=0.7 (of the original's time) or error<=0.02")


def convert_whole(
    original: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    budget: Mapping[str, float] | None = None,
    plan: ReusePlan | None = None,
    distill_seconds: float | None = None,
    work_dir: str | Path | None = None,
) -> tuple[nn.Module, Converted]:
    """A converted copy of `original`, by the best plan that `search` finds within the budget, or by the plan given.

    Of the plans within a budget of latency, the one with the least error is taken; within one of error, the fastest.
    Heads of a plan given are assigned by `align`. The copy is refitted, and distilled where `distill_seconds` says
    how long and some head reuses. With a `work_dir`, what was found before a stop is not sought again: judged plans,
    the plan chosen, the refitted copy, and how far its distillation is.

    Raises:
        ValueError: where not exactly one of budget and plan is given, no plan is within the budget, or `search`,
            `refit` or `distill` raises.
    """
    if (budget is None) == (plan is None):
        raise ValueError("give a budget, such as latency<=0.7, or a plan, such as 2x3; one of the two")
    check_precision(original)
    given = calibration_batches(batches, FEWEST, "convert")
    calibration, judging = calibrating_and_judging(given)
    training = None if distill_seconds is None else DistillConfig(seconds=distill_seconds)
    if training is not None:
        calibration_batches(calibration, _FEWEST_TO_DISTIL, "distilling, beside those that judge,")
    cache, checkpoints = (None if work_dir is None else Path(work_dir) / name for name in (_SEARCHED, _DISTILLED))
    judge = hidden_state_error(original, judging)
    asked = {"budget": None if budget is None else dict(budget), "plan": None if plan is None else plan.to_json()}
    asked["of"] = digest([original.state_dict(), *given])
    refitted = None if work_dir is None else Path(work_dir) / _REFITTED
    if refitted is not None and (found := _refitted(refitted, original, asked)) is not None:
        model, plan, errors, latencies = found
    else:
        latencies = None
        if budget is not None:
            plan, model, latencies = _best_within(budget, original, given, cache)
            errors = {"aligned": judge(apply(copy_with_same_weights(original), plan))}
        else:
            assert plan is not None
            plan = align(original, plan, calibration)
            model = apply(copy.deepcopy(original), plan)
            errors = {"aligned": judge(model)}
            refit(model, original, calibration)
        errors["refitted"] = judge(model)
        if refitted is not None:
            described = {"asked": asked, "plan": plan.to_json(), "errors": errors, "latencies": latencies}
            _keep_refitted(refitted, model, described)
    if training is not None and not plan.is_full:  # which says what the original says
        teaching = random.Random(0).sample(calibration, len(calibration))  # not from short to long
        distill(model, original, teaching, training, out_dir=checkpoints)
        errors["distilled"] = judge(model)
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (original, model)]
    if latencies is None:
        exact = apply(copy_with_same_weights(original), ReusePlan.full(plan.num_layers))
        measured = relative_latencies(original, {"converted": model, "exact": exact}, given)
        latencies = measured["converted"], measured["exact"]
    return model, Converted(plan, errors, *latencies, (numbers[0], numbers[1]))


def copy_companions(source: str | Path, out: str | Path, *, work_dir: str | Path) -> None:
    """Copies what lies beside a model's weights: tokenizer, feature extractor, model card; and whole, the modules
    of a sentence-transformers model that are not its transformer.

    Other folders that hold weights are not of this model: a trainer's checkpoints, or what it was converted to.
    `out` lies in `work_dir`, which is not copied where it lies in `source`.
    """
    of_model, of_none = shutil.ignore_patterns(*_NOT_COPIED), shutil.ignore_patterns(*_OF_NO_MODEL)
    models_own, work = transformer_directory(source).resolve(), Path(work_dir).resolve()
    listed = Path(source) / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    parts = {(Path(source) / str(module.get("path", ""))).resolve() for module in modules}

    def ignored(directory: str, names: list[str]) -> set[str]:
        here = Path(directory).resolve()
        left_out = of_none(directory, names)
        left_out |= {name for name in names if here / name == work or _is_another_model(here / name, parts)}
        return left_out | of_model(directory, names) if here == models_own else left_out

    shutil.copytree(
        source, out, ignore=ignored, copy_function=shutil.copyfile, ignore_dangling_symlinks=True, dirs_exist_ok=True
    )
    for folder in (Path(out), *(path for path in Path(out).rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)  # also where the original's may not be written to
    if (models_own / "vocab.txt").is_file() and not (models_own / "tokenizer_config.json").is_file():
        # Of what class it is, only the original's config.json says.
        AutoTokenizer.from_pretrained(models_own).save_pretrained(
            Path(out) / models_own.relative_to(Path(source).resolve())
        )


def _is_another_model(path: Path, parts: Set[Path]) -> bool:
    return path.is_dir() and path not in parts and any(next(path.glob(kind), None) for kind in _WEIGHTS)


def _keep_refitted(directory: Path, model: nn.Module, described: dict[str, Any]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_model(model, str(directory / "model.safetensors"))
    (directory / "found.json").write_text(json.dumps(described))


def _refitted(
    directory: Path, original: nn.Module, asked: Mapping[str, Any]
) -> tuple[nn.Module, ReusePlan, dict[str, float], tuple[float, float] | None] | None:
    """The refitted copy that is kept there, its plan, errors, and latencies where they were measured, if the same was
    asked for; None if damaged."""
    try:
        described = json.loads((directory / "found.json").read_text())  # written last
        if described["asked"] != asked:
            return None
        plan = ReusePlan.from_json(described["plan"])
        model = apply(copy.deepcopy(original), plan)
        load_model(model, directory / "model.safetensors")
        latencies = described["latencies"]
        if latencies is not None:
            converted, exact = map(float, latencies)
            latencies = converted, exact
        return model, plan, dict(described["errors"]), latencies
    except (OSError, LookupError, ValueError, RuntimeError, SafetensorError):
        return None


@contextmanager
def written_whole(out: str | Path, work_dir: str | Path) -> Iterator[Path]:
    """A new directory in `work_dir`, which becomes `out` when all is written; then what was kept there is deleted."""
    out, work = Path(out), Path(work_dir)
    check_work(work)
    shutil.rmtree(work / _WRITTEN, ignore_errors=True)
    (work / _WRITTEN).mkdir(parents=True)
    yield work / _WRITTEN
    check_new(out)
    if out.exists():
        out.rmdir()
    (work / _WRITTEN).rename(out)
    for part in (_SEARCHED, _REFITTED, _DISTILLED):
        shutil.rmtree(work / part) if (work / part).is_dir() else (work / part).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def check_work(work_dir: str | Path) -> None:
    """Raises `ValueError` where a directory of work holds what no conversion left."""
    work = Path(work_dir)
    if not work.exists():
        return
    if not work.is_dir() or (others := sorted(one.name for one in work.iterdir() if one.name not in _PARTS)):
        what = "is a file" if not work.is_dir() else f"holds {others[0]}, which is not of a conversion"
        raise ValueError(f"{work}, where what is done so far would be kept, {what}: move it, or choose another --out")


def check_new(out: str | Path) -> None:
    """Raises `ValueError` where `out` exists and is not an empty directory, or cannot be made."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another directory or delete it")
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; choose a new directory in it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out} cannot be made: {above} is no directory that you may write to")


def _best_within(
    budget: Mapping[str, float], original: nn.Module, batches: Sequence[Mapping[str, Any]], cache: Path | None
) -> tuple[ReusePlan, nn.Module, tuple[float, float]]:
    """The most exact plan of a latency within the budget, or the fastest of an error within it; a refitted copy by
    it; and the latencies of that and of a plan without reuse."""
    latency = budget.get("latency")
    found = search(original, batches, latency=latency, error=budget.get("error"), cache=cache)
    if latency is None:
        best = min(found, key=lambda candidate: candidate.latency)
    else:
        within = (candidate for candidate in found if candidate.latency <= latency)
        best = min(within, key=lambda candidate: candidate.error)
    return best.plan, found.converted(best), (best.latency, found.exact_latency)
