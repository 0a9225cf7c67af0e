"""The `mapreuse` command: thin, no logic."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from mapreuse import measure
    from mapreuse.convert import OpenedModel

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a warning for each image processor without torchvision
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # two lines on standard error for each pass that is profiled

_INTERRUPTED = 130
_GO_ON = ("convert", "study", "train")  # commands that keep what is done
_FEWEST_BATCHES = 16  # of which four judge, and the others teach as long as they last
_FEWEST_TO_CONVERT, _FEWEST_TO_DISTIL = 8, 11  # samples, and batches: three of four batches calibrate, or teach

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

ModelName = Annotated[str, typer.Argument(help="recogniser (the shipped one), or a directory of a model")]
CalibrationData = Annotated[
    str,
    typer.Option(help="text file, folder of wav, flac, png or jpg, datasets directory; or a recogniser's corpus"),
]
Stack = Annotated[str, typer.Option(help="of a model with several stacks of layers: path of one, model.encoder")]
Float32 = Annotated[bool, typer.Option("--float32", help="read a model that is stored in half precision in float32")]
MaxBatches = Annotated[int, typer.Option(help="read no more than 8 sequences for each")]
CorpusName = Annotated[str, typer.Option(help="prompts:en, synthetic:fr, librispeech:DIR, cuts:FILE or kaldi:DIR")]
Model = Annotated[Path | None, typer.Option("--model", help="directory of a recogniser; the shipped one if left out")]
Decoder = Annotated[str, typer.Option(help="greedy, beam or beam+lm")]


def main() -> None:
    """Entry point: bad input is one line on standard error and exit status 2, never a traceback."""
    try:
        status = app(standalone_mode=False) or 0
        if status == _INTERRUPTED:  # which typer returns, and says nothing
            raise KeyboardInterrupt
        sys.exit(status)
    except (typer.Abort, KeyboardInterrupt):
        goes_on = any(command in _GO_ON for command in sys.argv[1:2])
        _fail("interrupted; the same command goes on from here" if goes_on else "interrupted", _INTERRUPTED)
    except typer.TyperException as error:
        _fail(f"{error.format_message().rstrip('.')}; see mapreuse --help")
    except ModuleNotFoundError as error:
        _fail(f"{error}; pip install 'mapreuse[speech,study]' brings what corpora, plots and reports need")
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str, status: int = 2) -> None:
    print(f"mapreuse: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.command()
def study(
    preset: Annotated[str, typer.Option(help="quick, or full: every technique, trained from scratch")] = "quick",
    corpus: CorpusName = "prompts:en",
    baseline: Model = None,
    other_corpus: Annotated[str | None, typer.Option(help="full: a second language; prompts:es if left out")] = None,
    steps: Annotated[int | None, typer.Option(help="full: training steps of every run")] = None,
    workers: Annotated[int | None, typer.Option(help="full: training processes at a time; 1 if left out")] = None,
    training_only: Annotated[bool, typer.Option("--training-only", help="full: time and analyze nothing")] = False,
    out: Annotated[Path | None, typer.Option(help="directory of the report; results/PRESET if left out")] = None,
    work: Annotated[Path | None, typer.Option(help="of finished steps and checkpoints; or runs/PRESET")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Judge reuse: quick converts the recogniser, full trains every technique from scratch; a report for each."""
    from mapreuse import study as rooms

    if preset not in ("quick", "full"):
        raise ValueError(f"--preset must be quick or full, got {preset!r}")
    out, work = out or Path("results") / preset, work or Path("runs") / preset
    _check_directory("--out", out)
    _check_directory("--work", work)
    if preset == "full":
        if baseline is not None:
            raise ValueError("--model belongs to --preset quick: the full study trains its own models")
        recipe = rooms.Recipe() if steps is None else rooms.Recipe(steps=steps)
        full = rooms.FullConfig(corpus=corpus, device=device, recipe=recipe)
        if other_corpus is not None:
            full = dataclasses.replace(full, other_corpus=other_corpus)
        found = rooms.run_full(
            full, out, work, console, workers=1 if workers is None else workers, training_only=training_only
        )
        console.print("\n".join(found["verdict"]), markup=False, highlight=False)
    else:
        if training_only or (other_corpus, steps, workers) != (None, None, None):
            raise ValueError("--other-corpus, --steps, --workers and --training-only belong to --preset full")
        quick = rooms.QuickConfig(corpus=corpus, device=device)
        if baseline is not None:
            quick = dataclasses.replace(quick, baseline=str(baseline))
        results = rooms.run_quick(quick, out, work, console)
        console.print(Markdown("\n".join(rooms.error_table(results))))
        for name, measured in (*results["latency"].items(), ("one layer's attention", results["attention"])):
            console.print(f"\n[bold]{name}[/]: how many times as fast as transformers (sdpa)")
            console.print(Markdown("\n".join(rooms.latency_table(measured))))
    console.print(f"\nReport: {out / 'report.html'}", highlight=False)


@app.command()
def bench(
    encoder: Annotated[str, typer.Option(help="conformer-m, plain-conformer-m or bert-base")] = "conformer-m",
    lengths: Annotated[str | None, typer.Option(help="frames or tokens: 1000,2000,3000")] = None,
    plans: Annotated[str | None, typer.Option(help="plans of ours: full,4x4,1x4,4x3,16x1")] = None,
    contestants: Annotated[
        str | None,
        typer.Option(help="eager,sdpa,sdpa-tuned,flex,ours, or eager+compile etc.; all if left out"),
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="how ours carry shared maps: dense,dense16,dense8,recompute,auto")
    ] = "dense",
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice if left out")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int | None, typer.Option(help="rounds that count: 7, or 15 for --cores")] = None,
    part: Annotated[str, typer.Option(help="layers, or whole with the front end")] = "layers",
    memory: Annotated[bool, typer.Option("--memory", help="also peak memory, in fresh processes")] = False,
    training: Annotated[bool, typer.Option("--training", help="time forward and backward")] = False,
    cores: Annotated[bool, typer.Option("--cores", help="time single attention cores instead")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="file to write all results to")] = None,
) -> None:
    """Time an encoder under transformers' attentions, FlexAttention and ours, interleaved; ratios first."""
    from mapreuse import measure

    _check_writable(json_file)
    settings: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": device}
    if repeats is not None:
        settings["repeats"] = repeats
    if lengths is not None:
        settings["lengths"] = _numbers("--lengths", lengths)
    if cores:
        given = (encoder, batch, part, memory or training, plans or contestants, strategies)
        if given != ("conformer-m", 1, "layers", False, None, "dense"):
            raise ValueError("--cores takes --lengths, --threads, --dtype, --device, --repeats and --json only")
        cores_config = measure.CoresConfig(**settings)
        with _progress() as progress:
            results = measure.bench_cores(cores_config, progress)
        tables = measure.cores_tables(results)
    else:
        settings |= {"encoder": encoder, "batch": batch, "part": part, "memory": memory, "training": training}
        settings |= {"contestants": _words(contestants), "strategies": _words(strategies)}
        config = measure.BenchConfig(plans=measure.plans_for(encoder, plans or ""), **settings)
        with _progress() as progress:
            results = measure.bench(config, progress)
        tables = measure.bench_tables(results)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    _show(tables)
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

    _check_writable(json_file)
    _check_writable(plot)
    config = measure.BreakdownConfig(_numbers("--lengths", lengths), batch, threads, device, repeats)
    if plot is not None and len(set(config.lengths)) < 2:
        raise ValueError("--plot draws time by length and needs at least two lengths")
    opened = measure.conformer_m() if model is None else load(model)
    encoders = measure.encoders_to_compare(opened, _words(contestants), plans)
    with _progress() as progress:
        found = measure.breakdown(encoders, config, progress)
    if json_file is not None:
        results = measure.breakdown_data(found, config, shlex.join(["mapreuse", *sys.argv[1:]]))
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if plot is not None:
        measure.breakdown_plot(found).savefig(plot, dpi=110, format="png")
    _show(measure.breakdown_tables(found))


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

    opened, batches = _calibrated(model, calibration, max_batches, stack, split="dev", float32=float32)
    _check_directory("--out", out)
    with _progress() as progress:
        found = measure.analyze(opened.part, batches, epsilon=epsilon, progress=progress)
    command = shlex.join(["mapreuse", *sys.argv[1:]])
    measure.write_analysis(found, out, model=model, calibration=calibration, command=command)
    _show(measure.analysis_tables(found))
    console.print(f"Page: {out / 'index.html'}", markup=False, highlight=False)


@app.command()
def convert(
    model: ModelName,
    calibration: CalibrationData,
    out: Annotated[Path, typer.Option(help="a new directory for the converted model")],
    budget: Annotated[str | None, typer.Option(help="latency<=0.7 (of the original's time) or error<=0.02")] = None,
    plan: Annotated[str | None, typer.Option(help="a reuse plan instead, such as 2x3 or [0,1,1,3]")] = None,
    distill_seconds: Annotated[float | None, typer.Option(help="distil from the original this long")] = None,
    stack: Stack = "",
    float32: Float32 = False,
    max_batches: MaxBatches = 64,
) -> None:
    """Convert a model to one that reuses maps: search, align, refit, and distil where asked to."""
    from mapreuse import ReusePlan, save
    from mapreuse.convert import (
        check_new,
        check_work,
        convert_whole,
        copy_companions,
        parse_budget,
        written_whole,
    )

    named, out = out, out.resolve()
    check_new(out)
    work = out.with_name(f"{out.name}.work")
    check_work(work)
    limits = None if budget is None else parse_budget(budget)
    reuse = None if plan is None else ReusePlan.parse(plan)
    fewest = _FEWEST_TO_CONVERT if distill_seconds is None else _FEWEST_TO_DISTIL
    opened, batches = _calibrated(
        model, calibration, max_batches, stack, split="train", fewest=fewest, float32=float32
    )
    part, report = convert_whole(
        opened.part, batches, budget=limits, plan=reuse, distill_seconds=distill_seconds, work_dir=work
    )
    converted = opened.with_part(part)
    with written_whole(out, work) as written:
        if _is_recogniser(model):
            from mapreuse import speech

            recogniser = speech.Recogniser.load(opened.directory)
            recogniser.model = converted
            recogniser.save(written)
        else:
            save(converted, written / opened.directory.relative_to(model))
            copy_companions(model, written, work_dir=work)
    console.print(str(report.plan), markup=False, highlight=False)
    if report.plan.is_full:
        met = (
            "No layer shares a map." if limits is None else "The budget is met without reuse: no layer shares a map."
        )
        learnt = "" if distill_seconds is None else " There is nothing to distil."
        console.print(f"{met}{learnt}{'' if limits is None else ' A lower latency would need it.'}")
    for step, error in report.errors.items():
        console.print(f"error, {step}: {error:.4f}", highlight=False)
    before, after = report.parameters
    of_part = f" of {stack}" if stack else ""
    console.print(
        f"latency{of_part}: {report.latency:.2f}× of the original's; without reuse {report.exact_latency:.2f}×",
        highlight=False,
    )
    console.print(
        f"parameters{of_part}: {before:,} before, {after:,} after ({1 - after / before:.1%} less)", highlight=False
    )
    console.print(f"{named}: open it with mapreuse.load", markup=False, highlight=False)


def _calibrated(
    model: str,
    calibration: str,
    max_batches: int,
    stack: str,
    *,
    split: str,
    fewest: int = 4,
    float32: bool = False,
) -> tuple[OpenedModel, list[dict[str, Tensor]]]:
    """The model that the command line names, and batches for it: of a corpus, from this split. At least `fewest`."""
    from transformers.utils.logging import disable_progress_bar

    from mapreuse.convert import OpenedModel, open_batches, open_model

    disable_progress_bar()
    wanted: dict[str, int] = {"max_batches": max_batches, "fewest_batches": _FEWEST_BATCHES, "fewest": fewest}
    if _is_recogniser(model):
        from mapreuse import speech

        if stack:
            raise ValueError("--stack is for models with several stacks of layers; a recogniser has one")
        directory = speech.BASELINE if model == "recogniser" else Path(model)
        recogniser = speech.Recogniser.load(directory)
        batches = speech.calibration_batches(recogniser, calibration, split=split, **wanted)
        return OpenedModel(recogniser.model, directory), batches
    opened = open_model(model, stack, float32=float32)
    return opened, open_batches(opened, calibration, **wanted)


def _is_recogniser(model: str) -> bool:
    """Whether it is the shipped recogniser, or a directory of one; where speech is not installed, none is."""
    if model != "recogniser" and importlib.util.find_spec("lhotse") is None:
        return False
    from mapreuse import speech

    return model == "recogniser" or speech.Recogniser.is_saved_in(model)


def _show(tables: list[measure.Table]) -> None:
    for table in tables:
        shown = Table(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float, float], object]]:
    """A bar with the time left, on standard error; gives the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("building", total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


def _check_writable(file: Path | None) -> None:
    """What takes minutes to measure must have somewhere to go."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: give a file in a directory of yours")


def _check_directory(option: str, directory: Path) -> None:
    """What takes hours must have a directory to go to, there already or to be made when it is needed."""
    there = next(one for one in (directory, *directory.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{option} {directory} cannot be written: {there} is no directory of yours")


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in _words(text)))
    except ValueError:
        raise ValueError(
            f"{option} must be whole numbers parted by commas, such as 1000,2000, got {text!r}"
        ) from None


@app.command()
def corpus(name: Annotated[str, typer.Argument(help="as for --corpus")]) -> None:
    """Fetch or make a corpus and say what is in it."""
    from mapreuse.speech import open_corpus

    opened = open_corpus(name)
    console.print(f"{opened.name}: {opened.language}, {opened.sampling_rate} Hz")
    for split in ("train", "dev", "test"):
        cuts = list(getattr(opened, split))
        minutes = sum(cut.duration for cut in cuts) / 60
        console.print(f"{split:>5}: {len(cuts)} utterances, {minutes:.1f} minutes")
    console.print(opened.attribution)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="directory of checkpoints, log and the best recogniser")],
    corpus: CorpusName = "prompts:en",
    preset: Annotated[str | None, typer.Option(help="of the shipped recogniser: baseline, then refinement")] = None,
    model: Annotated[Path | None, typer.Option(help="directory of a recogniser to start from")] = None,
    plan: Annotated[str | None, typer.Option(help="reuse plan, such as 2x4 or 1x4,4x1")] = None,
    steps: Annotated[int | None, typer.Option(help="budget in steps")] = None,
    seconds: Annotated[float | None, typer.Option(help="budget in seconds")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    seed: Annotated[int, typer.Option(help="of weights, batches and augmentation")] = 0,
) -> None:
    """Train a recogniser, from scratch or from another; the same command again goes on where it stopped."""
    from mapreuse import ReusePlan, apply
    from mapreuse.speech import Recogniser, TrainConfig, alphabet, open_corpus
    from mapreuse.speech import train as run

    presets = {"baseline": TrainConfig.baseline, "refinement": TrainConfig.refinement}
    if preset not in (None, *presets):
        raise ValueError(f"--preset must be one of {', '.join(presets)}, got {preset!r}")
    if sum(budget is not None for budget in (preset, steps, seconds)) != 1:
        raise ValueError("give the budget as --steps or as --seconds, or choose a --preset: exactly one of the three")
    if preset not in (None, "baseline") and model is None:
        raise ValueError(f"--preset {preset} needs the recogniser that the preset before it made: give it as --model")
    reuse = None if plan is None else ReusePlan.parse(plan)
    config = presets[preset]() if preset else TrainConfig(steps=steps, seconds=seconds)
    config = dataclasses.replace(
        config,
        seed=seed,
        learning_rate=config.learning_rate if learning_rate is None else learning_rate,
    )
    loaded = Recogniser.load(model) if model else None
    opened = open_corpus(corpus)
    recogniser = loaded or Recogniser.create(alphabet(opened.language), seed=config.seed)
    if reuse is not None:
        apply(recogniser.model, reuse)
    scores = run(recogniser, opened, config, out)
    console.print(f"{out / 'best'}" if scores is None else f"{out / 'best'}: dev {scores}")


@app.command()
def evaluate(
    corpus: CorpusName = "prompts:en",
    model: Model = None,
    decoder: Decoder = "greedy",
    split: Annotated[str, typer.Option(help="test, dev, or all utterances, of a test set")] = "test",
) -> None:
    """Error rates of a recogniser on a corpus, with bootstrap intervals."""
    from mapreuse.speech import BASELINE, Recogniser, open_corpus
    from mapreuse.speech import evaluate as run

    if split not in ("test", "dev", "all"):
        raise ValueError(f"--split must be test, dev or all, got {split!r}")
    recogniser = Recogniser.load(model or BASELINE)
    opened = open_corpus(corpus)
    cuts = [*opened.train, *opened.dev, *opened.test] if split == "all" else getattr(opened, split)
    if not len(cuts):
        raise ValueError(f"{corpus}: its {split} split is empty; give --split all")
    console.print(f"{split} {run(recogniser, cuts, decoder=decoder)}")


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="wav or flac files")],
    model: Model = None,
    decoder: Decoder = "greedy",
) -> None:
    """Write down what is said in wav or flac files, one line for each."""
    from mapreuse.speech import BASELINE, Recogniser

    recogniser = Recogniser.load(model or BASELINE)
    for file in files:
        print(
            f"{file}: {recogniser.transcribe(file, decoder=decoder)}"
            if len(files) > 1
            else recogniser.transcribe(file, decoder=decoder)
        )


if __name__ == "__main__":
    main()
