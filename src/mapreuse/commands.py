"""Steps that several commands take, also those of the study."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mapreuse.console import (
    check_device,
    check_writable_directory,
    command_line,
    console,
    continuing_from,
    show_tables,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Module

    from mapreuse.data import OpenedModel

    Batches: TypeAlias = list[dict[str, Tensor]]
    Opened: TypeAlias = tuple[Module, Batches, Callable[[Module, Path], object]]

_MAX_BATCHES = 64
_MIN_BATCHES = 16  # with little data, batches hold fewer than 8 samples instead


def write_option(
    opened: OpenedModel,
    part: Module,
    out: Path,
    batches: Batches,
    *,
    model: str,
    runtime: str,
    int8: bool | Literal["weights"],
    kernels: bool = False,
) -> dict[str, Any]:
    """Write a model, or export it, with the files that belong to it. Returns the description of the export."""
    from mapreuse import export
    from mapreuse.conversion import copy_companions

    folder, found = opened.directory.relative_to(model), {}
    if runtime:
        example = max(batches, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
        bits = batches if int8 is True else int8 or None
        found = export(part, out / folder, example, runtime=runtime, int8=bits, kernels=kernels)
    else:
        opened.with_part(part).save_pretrained(out / folder)
    copy_companions(model, out)
    return found


def analyze_model(part: Module, batches: Batches, out: Path, *, model: str, calibration: str, program: str) -> None:
    """The command `analyze` of both programs, for an opened model."""
    from mapreuse import measure

    check_writable_directory("--out", out)
    found = measure.analyze(part, batches)
    measure.write_analysis(found, out, model=model, calibration=calibration, command=command_line(program))
    show_tables(measure.analysis_tables(found))
    console.print(f"Page: {out / 'index.html'}", markup=False, highlight=False)


def convert_model(
    opening: Callable[[int], Opened],
    out: Path,
    budget: str | None,
    plan: str | None,
    distill_seconds: float | None,
    *,
    share: tuple[str, ...] = ("map",),
    metric: str = "cosine",
    **settings: int | None,
) -> None:
    """The command `convert` of both programs.

    `opening` gives the model, batches of at least so many samples in all, and the function that saves the model.
    `settings` are those of the share modes.
    """
    from mapreuse import ReusePlan
    from mapreuse.conversion import (
        METRICS,
        MIN_CONVERSION_BATCHES,
        MIN_DISTILLATION_BATCHES,
        check_output,
        convert_to_directory,
        parse_budget,
    )
    from mapreuse.models import find_stack

    check_output(out)
    limits = None if budget is None else parse_budget(budget)
    if metric not in METRICS:
        raise ValueError(f"--metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if plan is not None and len(share) != 1:
        raise ValueError(f"--plan takes one share mode, got {', '.join(share)}; a search, by --budget, takes several")
    choices = None if budget is None else {"share": list(share), **settings}
    reuse = None if plan is None or plan == "full" else ReusePlan.parse(plan, share=share[0], **settings)
    minimum = MIN_CONVERSION_BATCHES if distill_seconds is None else MIN_DISTILLATION_BATCHES
    part, batches, write = opening(minimum)
    if plan == "full":
        reuse = ReusePlan.full(len(find_stack(part).layers))
    with continuing_from(f"{out}.work"):
        report = convert_to_directory(
            part,
            batches,
            out,
            write,
            budget=limits,
            plan=reuse,
            distill_seconds=distill_seconds,
            metric=metric,
            choices=choices,
        )
    for line in report.lines():
        console.print(line, markup=False, highlight=False)


@contextmanager
def exports_directory(given: Path | None) -> Iterator[Path]:
    """The directory of exported models, or a temporary one."""
    if given is not None:
        check_writable_directory("--exports", given)
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def open_benched(
    model: str,
    stack: str,
    float32: bool,
    device: str,
    calibration: str,
    batch_size: int,
    max_batches: int,
    lengths: Sequence[int] = (),
) -> tuple[Module, Batches, Batches]:
    """A model, or the part of it that holds the stack, batches to time, and batches for int8, on a device."""
    from mapreuse.data import batches_by_quantile, batches_of_lengths, open_batches, open_model

    check_device(device)
    opened = open_model(model, stack, float32=float32)
    found = open_batches(opened, calibration, batch_size=batch_size, max_batches=_MAX_BATCHES, min_samples=1)
    timed = batches_of_lengths(found, lengths, batch_size) if lengths else batches_by_quantile(found, max_batches)
    opened.model.to(device)
    moved = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in timed]
    return opened.part, moved, batches_by_quantile(found, _MIN_BATCHES)


def peak_memory_of(
    name: str, contestant: dict[str, Any], threads: int | None, exports: str, opening: dict[str, Any]
) -> int:
    """Peak memory of one contestant, in bytes; for `memory_in_fresh_process`."""
    from mapreuse import measure

    part, batches, _ = open_benched(**opening)
    described = measure.Contestant(**contestant)
    return measure.contestant_memory(part, batches, name, described, threads=threads, exports=exports)


def open_calibrated(
    model: str,
    calibration: str,
    max_batches: int,
    stack: str,
    *,
    min_samples: int = 4,
    float32: bool = False,
    window: int | None = None,
) -> tuple[OpenedModel, Batches]:
    """The model that the command line names, and batches for it."""
    from mapreuse.data import open_batches, open_model

    opened = open_model(model, stack, float32=float32)
    batches = open_batches(
        opened,
        calibration,
        max_batches=max_batches,
        min_batches=_MIN_BATCHES,
        min_samples=min_samples,
        window=window,
    )
    return opened, batches
