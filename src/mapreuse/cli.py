"""The `mapreuse` command: thin, no logic."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mapreuse.console import (
    check_writable_directory,
    check_writable_file,
    comma_separated,
    comma_separated_integers,
    console,
    progress_bar,
    run_command,
    show_tables,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from mapreuse.data import OpenedModel

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a warning for each image processor without torchvision
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # two lines on standard error for each pass that is profiled

_MIN_BATCHES = 16  # batches are made smaller than 8 samples rather than fewer than this

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

ModelName = Annotated[str, typer.Argument(help="directory of a model")]
CalibrationData = Annotated[
    str,
    typer.Option(
        help="data like the model's inputs in use: a text file with one sentence per line, a folder of wav, flac, png or "
        "jpg files, or a datasets directory"
    ),
]
Stack = Annotated[
    str, typer.Option(help="which stack of layers, in a model with several: its path, such as model.encoder")
]
Float32 = Annotated[
    bool, typer.Option("--float32", help="load the weights in float32; needed if they are stored in half precision")
]
MaxBatches = Annotated[
    int, typer.Option(help="use at most this many batches of calibration data, with 8 samples each")
]


def main() -> None:
    """Entry point of the `mapreuse` command."""
    run_command(app, "mapreuse", resumable=("convert",))


@app.command()
def bench(
    encoder: Annotated[str, typer.Option(help="conformer-m, plain-conformer-m or bert-base")] = "conformer-m",
    lengths: Annotated[str | None, typer.Option(help="frames or tokens: 1000,2000,3000")] = None,
    plans: Annotated[str | None, typer.Option(help="plans of ours: full,4x4,1x4,4x3,16x1")] = None,
    contestants: Annotated[
        str | None,
        typer.Option(help="eager,sdpa,sdpa+optimize,flex,ours, or eager+compile etc.; all if left out"),
    ] = None,
    storages: Annotated[
        str, typer.Option(help="how ours carry shared maps: dense,dense16,dense8,recompute,auto")
    ] = "dense",
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice if left out")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int | None, typer.Option(help="rounds that count: 7, or 15 for --kernels")] = None,
    part: Annotated[str, typer.Option(help="layers, or whole with the front end")] = "layers",
    memory: Annotated[bool, typer.Option("--memory", help="also peak memory, in fresh processes")] = False,
    training: Annotated[bool, typer.Option("--training", help="time forward and backward")] = False,
    cores: Annotated[bool, typer.Option("--kernels", help="time single attention cores instead")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="file to write all results to")] = None,
) -> None:
    """Time an encoder under transformers' attentions, FlexAttention and ours, interleaved; ratios first."""
    from mapreuse import measure

    check_writable_file(json_file)
    settings: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": device}
    if repeats is not None:
        settings["repeats"] = repeats
    if lengths is not None:
        settings["lengths"] = comma_separated_integers("--lengths", lengths)
    if cores:
        given = (encoder, batch, part, memory or training, plans or contestants, storages)
        if given != ("conformer-m", 1, "layers", False, None, "dense"):
            raise ValueError("--kernels takes --lengths, --threads, --dtype, --device, --repeats and --json only")
        cores_config = measure.KernelsConfig(**settings)
        with progress_bar("building") as progress:
            results = measure.bench_kernels(cores_config, progress)
        tables = measure.kernel_tables(results)
    else:
        settings |= {"encoder": encoder, "batch": batch, "part": part, "memory": memory, "training": training}
        settings |= {"contestants": comma_separated(contestants), "storages": comma_separated(storages)}
        config = measure.BenchConfig(plans=measure.plans_for(encoder, plans or ""), **settings)
        with progress_bar("building") as progress:
            results = measure.bench(config, progress)
        tables = measure.bench_tables(results)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    show_tables(tables)
    console.print(f"Inputs: {results['signal']}.", highlight=False)


@app.command()
def breakdown(
    model: Annotated[
        Path | None, typer.Option(help="saved model with a Parakeet encoder; else Conformer-M, random weights")
    ] = None,
    lengths: Annotated[str, typer.Option(help="encoder frames")] = "500,1000,2000,3000",
    plans: Annotated[str, typer.Option(help="plans of ours; full and groups of 4 if left out")] = "",
    contestants: Annotated[str, typer.Option(help="some of sdpa,eager,ours")] = "sdpa,eager,ours",
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice if left out")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(help="rounds that count")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="file to write all results to")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file: time of every part by length")] = None,
) -> None:
    """Say where an encoder's forward pass spends its time, FLOPs and bytes, part by part."""
    from mapreuse import load, measure

    check_writable_file(json_file)
    check_writable_file(plot)
    config = measure.BreakdownConfig(comma_separated_integers("--lengths", lengths), batch, threads, device, repeats)
    if plot is not None and len(set(config.lengths)) < 2:
        raise ValueError("--plot draws time by length and needs at least two lengths")
    opened = measure.conformer_m() if model is None else load(model)
    encoders = measure.encoders_to_compare(opened, comma_separated(contestants), plans)
    with progress_bar("building") as progress:
        found = measure.breakdown(encoders, config, progress)
    if json_file is not None:
        results = measure.breakdown_data(found, config, shlex.join(["mapreuse", *sys.argv[1:]]))
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if plot is not None:
        measure.breakdown_plot(found).savefig(plot, dpi=110, format="png")
    show_tables(measure.breakdown_tables(found))


@app.command()
def analyze(
    model: ModelName,
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="directory of tables, heat maps and the page")],
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 64,
    epsilon: Annotated[float, typer.Option(help="mass of a row that concentration leaves out")] = 0.02,
) -> None:
    """Say what a model's attention maps are like: similarity, entropy, diagonality, concentration."""
    from mapreuse import measure

    opened, batches = _calibrated(model, calibration, max_batches, stack, float32=float32)
    check_writable_directory("--out", out)
    with progress_bar("building") as progress:
        found = measure.analyze(opened.part, batches, epsilon=epsilon, progress=progress)
    command = shlex.join(["mapreuse", *sys.argv[1:]])
    measure.write_analysis(found, out, model=model, calibration=calibration, command=command)
    show_tables(measure.analysis_tables(found))
    console.print(f"Page: {out / 'index.html'}", markup=False, highlight=False)


@app.command()
def convert(
    model: ModelName,
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="new directory for the converted model")],
    budget: Annotated[
        str | None,
        typer.Option(
            help="search for the best plan: 'latency<=0.7' for 70 % of the original's latency (both without "
            "mapreuse.optimize), or 'error<=0.02' for a maximum error, 1 − cosine of the last hidden states"
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="use this plan instead of a search: 2x3 for two groups of three layers, or [0,1,1,3]"),
    ] = None,
    distill_seconds: Annotated[
        float | None, typer.Option(help="then train the converted model to match the original for this long")
    ] = None,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 64,
) -> None:
    """Convert a model to one whose layers share attention maps.

    Give --budget to search for a plan, or --plan. The same command continues
    after an interrupt; until it ends, its work is kept in OUT.work.
    """
    from mapreuse import ReusePlan, save
    from mapreuse.conversion import (
        MIN_CONVERSION_BATCHES,
        MIN_DISTILLATION_BATCHES,
        check_output,
        convert_to_directory,
        copy_companions,
        parse_budget,
    )

    check_output(out)
    limits = None if budget is None else parse_budget(budget)
    reuse = None if plan is None else ReusePlan.parse(plan)
    minimum = MIN_CONVERSION_BATCHES if distill_seconds is None else MIN_DISTILLATION_BATCHES
    opened, batches = _calibrated(model, calibration, max_batches, stack, min_samples=minimum, float32=float32)

    def write(part: Module, directory: Path) -> None:
        save(opened.with_part(part), directory / opened.directory.relative_to(model))
        copy_companions(model, directory)

    report = convert_to_directory(
        opened.part, batches, out, write, budget=limits, plan=reuse, distill_seconds=distill_seconds
    )
    for line in report.lines():
        console.print(line, markup=False, highlight=False)
    console.print(f"{out}: open it with mapreuse.load", markup=False, highlight=False)


def _calibrated(
    model: str,
    calibration: str,
    max_batches: int,
    stack: str,
    *,
    min_samples: int = 4,
    float32: bool = False,
) -> tuple[OpenedModel, list[dict[str, Tensor]]]:
    """The model that the command line names, and batches for it."""
    from transformers.utils.logging import disable_progress_bar

    from mapreuse.data import open_batches, open_model

    disable_progress_bar()
    opened = open_model(model, stack, float32=float32)
    batches = open_batches(
        opened, calibration, max_batches=max_batches, min_batches=_MIN_BATCHES, min_samples=min_samples
    )
    return opened, batches
