"""The `mapreuse-lab` command: thin, no logic."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from mapreuse.console import check_writable_directory, console, run_command

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a warning for each image processor without torchvision
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # two lines on standard error for each pass that is profiled

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CorpusName = Annotated[str, typer.Option(help="prompts:en, synthetic:fr, librispeech:DIR, cuts:FILE or kaldi:DIR")]
Model = Annotated[Path | None, typer.Option("--model", help="directory of a recogniser; the shipped one if left out")]


def main() -> None:
    """Entry point of the `mapreuse-lab` command."""
    run_command(app, "mapreuse-lab", resumable=("study", "train"))


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
    from mapreuse_lab import study as rooms

    if preset not in ("quick", "full"):
        raise ValueError(f"--preset must be quick or full, got {preset!r}")
    out, work = out or Path("results") / preset, work or Path("runs") / preset
    check_writable_directory("--out", out)
    check_writable_directory("--work", work)
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
def corpus(name: Annotated[str, typer.Argument(help="as for --corpus")]) -> None:
    """Fetch or make a corpus and say what is in it."""
    from mapreuse_lab.training import open_corpus

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
    model: Annotated[Path | None, typer.Option(help="directory of a recogniser to start from")] = None,
    plan: Annotated[str | None, typer.Option(help="reuse plan, such as 2x4 or 1x4,4x1")] = None,
    steps: Annotated[int | None, typer.Option(help="budget in steps")] = None,
    seconds: Annotated[float | None, typer.Option(help="budget in seconds")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    seed: Annotated[int, typer.Option(help="of weights, batches and augmentation")] = 0,
) -> None:
    """Train a recogniser, from scratch or from another; the same command again goes on where it stopped."""
    from mapreuse import ReusePlan, apply
    from mapreuse_lab.training import Recogniser, TrainConfig, alphabet, open_corpus
    from mapreuse_lab.training import train as run

    if (steps is None) == (seconds is None):
        raise ValueError("give the budget as --steps or as --seconds: exactly one of the two")
    reuse = None if plan is None else ReusePlan.parse(plan)
    config = TrainConfig(steps=steps, seconds=seconds)
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
    split: Annotated[str, typer.Option(help="test, dev, or all utterances, of a test set")] = "test",
) -> None:
    """Error rates of a recogniser on a corpus, with bootstrap intervals."""
    from mapreuse_lab.training import BASELINE, Recogniser, open_corpus
    from mapreuse_lab.training import evaluate as run

    if split not in ("test", "dev", "all"):
        raise ValueError(f"--split must be test, dev or all, got {split!r}")
    recogniser = Recogniser.load(model or BASELINE)
    opened = open_corpus(corpus)
    cuts = [*opened.train, *opened.dev, *opened.test] if split == "all" else getattr(opened, split)
    if not len(cuts):
        raise ValueError(f"{corpus}: its {split} split is empty; give --split all")
    console.print(f"{split} {run(recogniser, cuts)}")


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="wav or flac files")],
    model: Model = None,
) -> None:
    """Write down what is said in wav or flac files, one line for each."""
    from mapreuse_lab.training import BASELINE, Recogniser

    recogniser = Recogniser.load(model or BASELINE)
    for file in files:
        print(f"{file}: {recogniser.transcribe(file)}" if len(files) > 1 else recogniser.transcribe(file))


if __name__ == "__main__":
    main()
