"""The `mapreuse` command: thin, no logic."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a warning for each image processor without torchvision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

CorpusName = Annotated[str, typer.Option(help="prompts:en, synthetic:fr, librispeech:DIR, cuts:FILE or kaldi:DIR")]
Model = Annotated[Path | None, typer.Option("--model", help="directory of a recogniser; the shipped one if left out")]
Decoder = Annotated[str, typer.Option(help="greedy, beam or beam+lm")]


def main() -> None:
    """Entry point: bad input is one line on standard error and exit status 2, never a traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command goes on from here", 130)
    except typer.TyperException as error:
        _fail(f"{error}; see mapreuse --help")
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str, status: int = 2) -> None:
    print(f"mapreuse: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.command()
def study(
    preset: Annotated[str, typer.Option(help="quick")] = "quick",
    corpus: CorpusName = "prompts:en",
    baseline: Model = None,
    out: Annotated[Path, typer.Option(help="directory of the report")] = Path("results/quick"),
    work: Annotated[Path, typer.Option(help="directory of finished steps and checkpoints")] = Path("runs/quick"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Convert the recogniser to several plans, recover each, and report error rates and latency."""
    from mapreuse.study import QuickConfig, error_table, latency_table, run_quick

    if preset != "quick":
        raise ValueError(f"--preset must be quick, got {preset!r}")
    config = QuickConfig(corpus=corpus, device=device)
    if baseline is not None:
        config = dataclasses.replace(config, baseline=str(baseline))
    results = run_quick(config, out, work, console)
    console.print(Markdown("\n".join(error_table(results))))
    for name, measured in (*results["latency"].items(), ("one layer's attention", results["attention"])):
        console.print(f"\n[bold]{name}[/]: how many times as fast as transformers (sdpa)")
        console.print(Markdown("\n".join(latency_table(measured))))
    console.print(f"\nReport: {out / 'report.md'}")


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
    preset: Annotated[str | None, typer.Option(help="baseline: the run that made the shipped recogniser")] = None,
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

    if preset not in (None, "baseline"):
        raise ValueError(f"--preset must be baseline, got {preset!r}")
    if preset is None and (steps is None) == (seconds is None):
        raise ValueError("give the budget as --steps or as --seconds, or choose --preset baseline")
    reuse = None if plan is None else ReusePlan.parse(plan)
    opened = open_corpus(corpus)
    recogniser = Recogniser.load(model) if model else Recogniser.create(alphabet(opened.language), seed=seed)
    if reuse is not None:
        apply(recogniser.model, reuse)
    config = TrainConfig.baseline() if preset else TrainConfig(steps=steps, seconds=seconds)
    rate = config.learning_rate if learning_rate is None else learning_rate
    scores = run(recogniser, opened, dataclasses.replace(config, seed=seed, learning_rate=rate), out)
    console.print(f"{out / 'best'}" if scores is None else f"{out / 'best'}: dev {scores}")


@app.command()
def evaluate(
    corpus: CorpusName = "prompts:en",
    model: Model = None,
    decoder: Decoder = "greedy",
    split: Annotated[str, typer.Option(help="test or dev")] = "test",
) -> None:
    """Error rates of a recogniser on a corpus, with bootstrap intervals."""
    from mapreuse.speech import BASELINE, Recogniser, open_corpus
    from mapreuse.speech import evaluate as run

    if split not in ("test", "dev"):
        raise ValueError(f"--split must be test or dev, got {split!r}")
    cuts = getattr(open_corpus(corpus), split)
    console.print(f"{split} {run(Recogniser.load(model or BASELINE), cuts, decoder=decoder)}")


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
