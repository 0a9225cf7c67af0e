"""The `mapreuse` command: thin, no logic."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from mapreuse.console import (
    check_device,
    check_writable_directory,
    check_writable_file,
    comma_separated,
    comma_separated_integers,
    command_app,
    command_line,
    console,
    continuing_from,
    run_command,
    show_tables,
    write_json,
)
from mapreuse.options import (
    BatchSize,
    Budget,
    CalibrationData,
    Contestants,
    Device,
    DistillSeconds,
    ExportsDirectory,
    Float32,
    JsonFile,
    MaxBatches,
    MaxSeconds,
    Memory,
    ModelName,
    Plan,
    Plans,
    PngFile,
    ProfiledCalls,
    ProfiledContestants,
    Stack,
    Storage,
    Threads,
    TimedBatches,
    Training,
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

app = command_app(
    "mapreuse",
    "Make Transformers faster by sharing attention maps between layers: convert a trained model, and measure its "
    "speed and its attention maps. MODEL is a directory that save_pretrained wrote.",
)


def main() -> None:
    """Entry point of the `mapreuse` command."""
    run_command(app, "mapreuse", resumable=("convert",))


@app.command()
def bench(
    model: ModelName,
    calibration: CalibrationData,
    plans: Plans = "",
    contestants: Contestants = "",
    lengths: Annotated[
        str, typer.Option(help="lengths of the inputs to time, such as 20,128,512; default: quantiles of the data's")
    ] = "",
    storage: Storage = "dense",
    stack: Stack = "",
    float32: Float32 = False,
    batch_size: BatchSize = 8,
    max_batches: TimedBatches = 3,
    threads: Threads = None,
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option(help="number of timed calls")] = 7,
    max_seconds: MaxSeconds = 30.0,
    memory: Memory = False,
    training: Training = False,
    exports: ExportsDirectory = None,
    png_file: PngFile = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how much faster a model becomes: shared maps, torch.compile, OpenVINO, ONNX Runtime, int8.

    Everything runs on your data, in turns, and each contestant is checked against a reference first. Quality is not
    measured: advise and convert report it.
    """
    from mapreuse import measure

    for file in (json_file, png_file):
        check_writable_file(file)
    opening: dict[str, Any] = {"model": model, "stack": stack, "float32": float32, "device": device}
    opening |= {"calibration": calibration, "batch_size": batch_size, "max_batches": max_batches}
    opening |= {"lengths": comma_separated_integers("--lengths", lengths)}
    part, batches, samples = _benched(**opening)
    with exports_directory(exports) as directory:

        def measured(contestant: measure.Contestant, name: str) -> int:
            request: dict[str, Any] = {"name": name, "contestant": asdict(contestant), "opening": opening}
            request |= {"threads": threads, "exports": str(directory)}
            return measure.memory_in_fresh_process(_peak_memory, request)

        results = measure.bench(
            part,
            batches,
            plans=plans,
            kinds=comma_separated(contestants) or None,
            storages=comma_separated(storage),
            repeats=repeats,
            threads=threads,
            training=training,
            memory=measured if memory else None,
            calibration=samples,
            exports=directory,
            max_seconds=max_seconds,
        )
    results |= {"command": command_line("mapreuse"), "model": model, "calibration": calibration}
    write_json(json_file, results)
    show_tables(measure.bench_tables(results))
    if png_file is not None:
        measure.plot_bench(results, png_file)


@app.command()
def breakdown(
    model: ModelName,
    calibration: CalibrationData,
    plans: Plans = "",
    contestants: ProfiledContestants = "sdpa,mapreuse",
    stack: Stack = "",
    float32: Float32 = False,
    batch_size: BatchSize = 8,
    max_batches: TimedBatches = 1,
    threads: Threads = None,
    device: Device = "cpu",
    repeats: ProfiledCalls = 5,
    json_file: JsonFile = None,
) -> None:
    """Show which parts of a model take the time and the FLOPs: projections, attention, feed-forward, and so on."""
    from mapreuse import measure

    check_writable_file(json_file)
    part, batches, _ = _benched(model, stack, float32, device, calibration, batch_size, max_batches)
    kinds = comma_separated(contestants)
    results = measure.breakdown(part, batches, plans=plans, kinds=kinds, repeats=repeats, threads=threads)
    write_json(json_file, results | {"command": command_line("mapreuse"), "model": model})
    show_tables(measure.breakdown_tables(results))


@app.command()
def analyze(
    model: ModelName,
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="directory for the page and the results as JSON")],
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 64,
) -> None:
    """Measure a model's attention maps: similarity of layers, entropy and diagonality.

    Layers with similar maps can share one. The heat maps of the page need the extra plots of mapreuse.
    """
    opened, batches = _calibrated(model, calibration, max_batches, stack, float32=float32)
    analyze_model(opened.part, batches, out, model=model, calibration=calibration, program="mapreuse")


@app.command()
def convert(
    model: ModelName,
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="new directory for the converted model")],
    budget: Budget = None,
    plan: Plan = None,
    distill_seconds: DistillSeconds = None,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 64,
    window: Annotated[
        int | None,
        typer.Option(help="for language models: take the text as a whole, cut into windows of so many tokens"),
    ] = None,
) -> None:
    """Convert a model to one whose layers share attention maps.

    Give --budget to search for a plan, or --plan. The same command continues
    after an interrupt; until it ends, its work is kept in OUT.work.
    """
    from mapreuse import save
    from mapreuse.conversion import copy_companions

    def opening(min_samples: int) -> Opened:
        opened, batches = _calibrated(
            model, calibration, max_batches, stack, min_samples=min_samples, float32=float32, window=window
        )

        def write(part: Module, directory: Path) -> None:
            save(opened.with_part(part), directory / opened.directory.relative_to(model))
            copy_companions(model, directory)

        return opened.part, batches, write

    convert_model(opening, out, budget, plan, distill_seconds)
    console.print(f"{out}: open it with mapreuse.load", markup=False, highlight=False)


@app.command(name="export")
def export_(
    model: Annotated[
        str, typer.Argument(help="directory of a model, as save_pretrained or mapreuse convert wrote it")
    ],
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="new directory for the exported model")],
    runtime: Annotated[str, typer.Option(help="openvino or onnx")] = "openvino",
    int8: Annotated[
        bool, typer.Option("--int8", help="quantise weights and activations to 8 bits with the calibration data")
    ] = False,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 16,
) -> None:
    """Write an encoder for OpenVINO or ONNX Runtime, with any batch size and length, checked against PyTorch.

    MODEL may be converted or not. Running the exported model needs neither PyTorch nor mapreuse.
    """
    from mapreuse import export
    from mapreuse.conversion import copy_companions

    opened, batches = _calibrated(model, calibration, max_batches, stack, float32=float32)
    folder = opened.directory.relative_to(model)
    example = max(batches, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
    found = export(opened.part, out / folder, example, runtime=runtime, int8=batches if int8 else None)
    copy_companions(model, out)
    console.print(f"{out}: {found['runtime']}, {found['precision']}", markup=False, highlight=False)
    console.print(f"Maximum difference to PyTorch at other shapes: {found['difference']:.1e}", highlight=False)
    for name, error in found.get("int8_error", {}).items():
        console.print(f"Relative error of {name} on the calibration data: {error:.3f}", highlight=False)


def analyze_model(part: Module, batches: Batches, out: Path, *, model: str, calibration: str, program: str) -> None:
    """The command `analyze` of both programs, for an opened model."""
    from mapreuse import measure

    check_writable_directory("--out", out)
    found = measure.analyze(part, batches)
    measure.write_analysis(found, out, model=model, calibration=calibration, command=command_line(program))
    show_tables(measure.analysis_tables(found))
    console.print(f"Page: {out / 'index.html'}", markup=False, highlight=False)


def convert_model(
    opening: Callable[[int], Opened], out: Path, budget: str | None, plan: str | None, distill_seconds: float | None
) -> None:
    """The command `convert` of both programs.

    `opening` gives the model, batches of at least so many samples in all, and the function that saves the model.
    """
    from mapreuse import ReusePlan
    from mapreuse.conversion import (
        MIN_CONVERSION_BATCHES,
        MIN_DISTILLATION_BATCHES,
        check_output,
        convert_to_directory,
        parse_budget,
    )
    from mapreuse.models import find_stack

    check_output(out)
    limits = None if budget is None else parse_budget(budget)
    reuse = None if plan is None or plan == "full" else ReusePlan.parse(plan)
    minimum = MIN_CONVERSION_BATCHES if distill_seconds is None else MIN_DISTILLATION_BATCHES
    part, batches, write = opening(minimum)
    if plan == "full":
        reuse = ReusePlan.full(len(find_stack(part).layers))
    with continuing_from(f"{out}.work"):
        report = convert_to_directory(
            part, batches, out, write, budget=limits, plan=reuse, distill_seconds=distill_seconds
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


def _benched(
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


def _peak_memory(
    name: str, contestant: dict[str, Any], threads: int | None, exports: str, opening: dict[str, Any]
) -> int:
    """Peak memory of one contestant, in bytes; for `memory_in_fresh_process`."""
    from mapreuse import measure

    part, batches, _ = _benched(**opening)
    described = measure.Contestant(**contestant)
    return measure.contestant_memory(part, batches, name, described, threads=threads, exports=exports)


def _calibrated(
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


if __name__ == "__main__":
    main()
