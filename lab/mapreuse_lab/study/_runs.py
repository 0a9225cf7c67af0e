"""Training runs of the full study: each is done once, by whichever worker claims it first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mapreuse.conversion import checkpoints
from mapreuse.measure import machine
from mapreuse_lab.techniques import parse
from mapreuse_lab.training import Recogniser, TrainConfig, alphabet, evaluate, open_corpus, train, write_whole


@dataclass(frozen=True)
class Recipe:
    """Size of the recogniser and settings of its training from scratch, the same for all techniques.

    Training uses recorded speech only, so that the recipe works in every language. Augmentation is light and there is
    no dropout, because nothing overfits within this budget.

    Attributes:
        num_layers, hidden_size, intermediate_size, subsampling_channels: arguments of `Recogniser.create`.
        steps, learning_rate, batch_seconds, evaluate_every: fields of `TrainConfig`.

    Raises:
        ValueError: if `TrainConfig` refuses a value.
    """

    num_layers: int = 6
    hidden_size: int = 96
    intermediate_size: int = 288
    subsampling_channels: int = 32
    steps: int = 1200
    learning_rate: float = 2e-3
    batch_seconds: float = 28.0
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        self.training(seed=0)

    def training(self, seed: int) -> TrainConfig:
        """Training settings of one run."""
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_seconds=self.batch_seconds,
            evaluate_every=self.evaluate_every,
            warmup=0.1,
            noise_probability=0.0,
            mask_bands=1,
            mask_spans_per_second=0.35,
            seed=seed,
        )

    def create(self, language: str, technique: str | None, seed: int) -> Recogniser:
        """An untrained recogniser with a technique; None for the model of `transformers`."""
        recogniser = Recogniser.create(
            alphabet(language),
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            subsampling_channels=self.subsampling_channels,
            dropout=0.0,
            seed=seed,
        )
        if technique is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                recogniser.compress(parse(technique))
        return recogniser


@dataclass(frozen=True)
class LongRecipe(Recipe):
    """The same recogniser, trained longer, on recordings and synthetic speech. Fields are those of `TrainConfig`."""

    steps: int = 4000
    evaluate_every: int = 500
    synthetic_utterances: int = 16_000
    real_share: tuple[float, float] = (0.1, 0.25)

    @property
    def description(self) -> str:
        """The training, in a sentence for reports."""
        sentences = f"{self.synthetic_utterances:,} synthetic sentences"
        return f"Some techniques, trained for {self.steps:,} steps on the recordings and {sentences}."

    def training(self, seed: int) -> TrainConfig:
        """Training settings of one run; the seed also selects the synthetic sentences."""
        return replace(
            super().training(seed), synthetic_utterances=self.synthetic_utterances, real_share=self.real_share
        )


@dataclass(frozen=True)
class Run:
    """One training run: a technique, trained from scratch on a corpus.

    Attributes:
        technique: name of the technique, as `techniques.parse` reads it.
        corpus: name of the corpus.
        seed: seed of weights, batches and augmentation.
        recipe: model size and training.
    """

    technique: str
    corpus: str
    seed: int
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def key(self) -> str:
        """File name of the run: readable, with a digest of all its settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        parts = [re.sub(r"[^a-z0-9]+", "-", part.lower())[:50].strip("-") for part in (self.technique, self.corpus)]
        return f"{'_'.join(parts)}_{self.seed}_{digest}"


class RunDirectory:
    """Results of finished runs, one small JSON file each, and a lock for each run in progress.

    Several workers, on one machine or on several with a shared file system, may use one directory. A run belongs to
    the worker that holds its lock. The operating system releases the lock when the worker ends or is killed.

    Args:
        results: directory of the result files; keep it under version control.
        work: directory of this machine's checkpoints and weights.
    """

    def __init__(self, results: Path, work: Path) -> None:
        self.results, self.work = results, work
        results.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def finished(self, run: Run) -> dict[str, Any] | None:
        """The result of a run; None if it has not finished."""
        return _read(self.results / f"{run.key}.json")

    def failed(self, run: Run) -> dict[str, Any] | None:
        """The error of a run's last attempt; None if it did not fail."""
        return None if self.finished(run) else _read(self.results / f"{run.key}.failed.json")

    def forget_failures(self, runs: Sequence[Run]) -> None:
        """Let failed runs be tried again."""
        for run in runs:
            (self.results / f"{run.key}.failed.json").unlink(missing_ok=True)

    def weights(self, run: Run) -> Path | None:
        """Directory of the trained recogniser, if it is on this machine."""
        best = self.work / run.key / "best"
        return best if self.finished(run) and Recogniser.is_saved_in(best) else None

    def original(self, run: Run) -> Recogniser | None:
        """The recogniser of a run of full attention, as a model of `transformers`, if it is on this machine."""
        weights = self.weights(run)
        if weights is None:
            return None
        trained = Recogniser.load(weights)
        original = run.recipe.create(open_corpus(run.corpus).language, None, run.seed)
        original.model.load_state_dict(trained.model.state_dict())
        return original

    def progress(self, run: Run) -> float:
        """Finished fraction of a run, according to its log."""
        if self.finished(run) or self.failed(run):
            return 1.0
        log = self.work / run.key / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        whole = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
        return json.loads(whole[-1])["step"] / run.recipe.steps if whole else 0.0

    def lock(self, name: str) -> FileLock:
        """A lock that one worker at a time can hold."""
        locks = self.results / ".locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / name)

    def perform(self, run: Run) -> None:
        """Train and evaluate, from the last checkpoint if there is one, and write the result, or the error."""
        file, failure = (self.results / f"{run.key}{ending}" for ending in (".json", ".failed.json"))
        try:
            result = _result(run, self.work / run.key)
        except (ValueError, RuntimeError, OSError) as error:  # the other runs continue
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _write(failure, {"run": asdict(run), "error": reason})
            return
        _write(file, result)
        failure.unlink(missing_ok=True)
        for checkpoint in checkpoints(self.work / run.key):
            shutil.rmtree(checkpoint)


def perform_all(runs: Sequence[Run], directory: RunDirectory) -> None:
    """Perform, in order, each run that is neither finished nor locked by another worker."""
    for run in runs:
        with suppress(Timeout), directory.lock(run.key).acquire(timeout=0):
            if directory.finished(run) is None:
                print(f"{datetime.now(UTC):%H:%M:%S} {run.key}", flush=True)
                directory.perform(run)


def worker(runs: Sequence[Run], directory: RunDirectory, threads: int, log: Path) -> None:
    """Main function of a worker process: `perform_all`, with all output in a log file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    perform_all(runs, directory)


def _result(run: Run, out_dir: Path) -> dict[str, Any]:
    corpus = open_corpus(run.corpus)
    recogniser = run.recipe.create(corpus.language, run.technique, run.seed)
    train(recogniser, corpus, run.recipe.training(run.seed), out_dir)
    scores = evaluate(recogniser, corpus.test)
    curve = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return {
        "run": asdict(run),
        "steps": curve[-1]["step"],
        "seconds": curve[-1]["elapsed"],
        "learning_curve": curve,
        "test": {"references": scores.references, "hypotheses": scores.hypotheses},
        "machine": machine(),
        "finished": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_whole(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
