"""The `mapreuse` command: thin, no logic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mapreuse.commands import (
    analyze_model,
    convert_model,
    exports_directory,
    open_benched,
    open_calibrated,
    peak_memory_of,
    write_option,
)
from mapreuse.console import (
    check_new_directory,
    check_writable_file,
    comma_separated,
    comma_separated_integers,
    command_app,
    command_line,
    console,
    run_command,
    show_tables,
    write_json,
)
from mapreuse.options import (
    BatchSize,
    Block,
    Budget,
    CalibrationData,
    Contestants,
    Device,
    DistillSeconds,
    ExportsDirectory,
    Float32,
    JsonFile,
    Keys,
    KeyWindow,
    MaxBatches,
    MaxSeconds,
    Memory,
    Metric,
    ModelName,
    Plan,
    Plans,
    PngFile,
    ProfiledCalls,
    ProfiledContestants,
    Rank,
    Share,
    Stack,
    Storage,
    Threads,
    TimedBatches,
    Training,
    Window,
)

if TYPE_CHECKING:
    from torch.nn import Module

    from mapreuse.commands import Opened

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
    part, batches, samples = open_benched(**opening)
    with exports_directory(exports) as directory:

        def measured(contestant: measure.Contestant, name: str) -> int:
            request: dict[str, Any] = {"name": name, "contestant": asdict(contestant), "opening": opening}
            request |= {"threads": threads, "exports": str(directory)}
            return measure.memory_in_fresh_process(peak_memory_of, request)

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
    part, batches, _ = open_benched(model, stack, float32, device, calibration, batch_size, max_batches)
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
    window: Window = None,
) -> None:
    """Measure a model's attention maps: similarity of layers, entropy and diagonality.

    Layers with similar maps can share one. The heat maps of the page need the extra plots of mapreuse.
    """
    opened, batches = open_calibrated(model, calibration, max_batches, stack, float32=float32, window=window)
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
    window: Window = None,
    share: Share = "map",
    keys: Keys = None,
    key_window: KeyWindow = None,
    block: Block = None,
    rank: Rank = None,
    metric: Metric = "cosine",
) -> None:
    """Convert a model to one whose layers share attention maps.

    Give --budget to search for a plan, or --plan. The same command continues
    after an interrupt; until it ends, its work is kept in OUT.work.
    """
    from mapreuse import save
    from mapreuse.conversion import copy_companions

    def opening(min_samples: int) -> Opened:
        opened, batches = open_calibrated(
            model, calibration, max_batches, stack, min_samples=min_samples, float32=float32, window=window
        )

        def write(part: Module, directory: Path) -> None:
            save(opened.with_part(part), directory / opened.directory.relative_to(model))
            copy_companions(model, directory)

        return opened.part, batches, write

    settings = {"keys": keys, "window": key_window, "block": block, "rank": rank}
    modes = tuple(comma_separated(share))
    convert_model(opening, out, budget, plan, distill_seconds, share=modes, metric=metric, **settings)
    console.print(f"{out}: open it with mapreuse.load", markup=False, highlight=False)


@app.command()
def drop(
    model: ModelName,
    layers: Annotated[str, typer.Option(help="indices of the layers to remove, from 0, such as 3,4")],
    out: Annotated[Path, typer.Option(help="new directory for the smaller model")],
    stack: Stack = "",
) -> None:
    """Write a model without some of its layers. advise and conversion.hidden_state_error measure what that costs."""
    from mapreuse import drop_layers
    from mapreuse.conversion import copy_companions
    from mapreuse.data import open_model

    chosen = comma_separated_integers("--layers", layers)
    check_new_directory(out)
    opened = open_model(model, stack)
    opened.with_part(drop_layers(opened.part, chosen)).save_pretrained(out / opened.directory.relative_to(model))
    copy_companions(model, out)
    console.print(f"{out}: {len(chosen)} layers fewer", markup=False, highlight=False)


@app.command(name="advise")
def advise_(
    model: ModelName,
    calibration: CalibrationData,
    max_error: Annotated[float, typer.Option(help="maximum error of the recommended option")] = 0.03,
    metric: Annotated[
        str,
        typer.Option(help="cosine: 1 − mean cosine to the original's outputs; or relative: norm of the difference"),
    ] = "cosine",
    out: Annotated[Path | None, typer.Option(help="new directory: write the recommended model there")] = None,
    batch_size: BatchSize = 8,
    threads: Threads = None,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 32,
    json_file: JsonFile = None,
) -> None:
    """Measure the options that need no training on this machine, and recommend one, with its commands.

    Options: mapreuse.optimize, OpenVINO and ONNX Runtime, int8, layers dropped, and shared maps. An interrupt prints
    what was measured until then.
    """
    from mapreuse import advise
    from mapreuse.data import with_batch_size

    check_writable_file(json_file)
    if out is not None:
        check_new_directory(out)
    opened, batches = open_calibrated(model, calibration, max_batches, stack, min_samples=8, float32=float32)
    timed = with_batch_size(batches[len(batches) // 2], batch_size)
    found = advise(opened.part, batches, metric=metric, max_error=max_error, timed=timed, threads=threads)
    write_json(json_file, found.data() | {"command": command_line("mapreuse"), "model": model})
    show_tables([found.table()])
    for line in found.lines(model, calibration, "OUT" if out is None else str(out)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.interrupted:
        raise KeyboardInterrupt
    if out is not None:
        option, part = found.recommended.option, found.recommended.model
        write_option(opened, part, out, batches, model=model, runtime=option.runtime, int8=option.int8)
        console.print(f"{out}: {option.name}", markup=False, highlight=False)


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
    int8_weights: Annotated[
        bool,
        typer.Option("--int8-weights", help="store weights in 8 bits and compute in float32: for language models"),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="attention by mapreuse's kernels, in a library beside the model (OpenVINO)"),
    ] = False,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 16,
    window: Window = None,
) -> None:
    """Write an encoder or a language model for OpenVINO or ONNX Runtime, and check it against PyTorch.

    MODEL may be converted or not. Running the exported model needs neither PyTorch nor mapreuse.
    """
    if int8 and int8_weights:
        raise ValueError("--int8 and --int8-weights exclude each other; choose one")
    opened, batches = open_calibrated(model, calibration, max_batches, stack, float32=float32, window=window)
    chosen: bool | Literal["weights"] = "weights" if int8_weights else int8
    found = write_option(
        opened, opened.part, out, batches, model=model, runtime=runtime, int8=chosen, kernels=kernels
    )
    console.print(f"{out}: {found['runtime']}, {found['precision']}", markup=False, highlight=False)
    console.print(f"Maximum difference to PyTorch at other shapes: {found['difference']:.1e}", highlight=False)
    for name, error in found.get("int8_error", {}).items():
        console.print(f"Relative error of {name} on the calibration data: {error:.3f}", highlight=False)


if __name__ == "__main__":
    main()
