"""The full study: every technique trained from scratch by one recipe, judged, timed, set against full attention."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mapreuse.conversion import search
from mapreuse.measure import memory_in_fresh_process
from mapreuse.plan import ReusePlan
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._costs import (
    REFERENCE,
    speech_features,
    technique_flops,
    technique_latency,
    technique_memory,
    training_latency,
    utterance_batch,
)
from mapreuse_lab.study._findings import findings
from mapreuse_lab.study._progress import ProgressBar
from mapreuse_lab.study._results import study_results, write_full
from mapreuse_lab.study._runs import Recipe, Run, RunDirectory, worker
from mapreuse_lab.study._steps import Steps, where
from mapreuse_lab.techniques import Reuse, Technique, parse
from mapreuse_lab.training import Corpus, open_corpus, speech_batches, write_whole

FLOPS_LENGTH = 1000
"""Encoder frames at which FLOPs are counted, and at which a training step is timed beside one of short utterances."""

_COSTLY = (
    *("plan.py", "maps", "models", "techniques", "study/_costs.py"),
    *("measure/_latency.py", "measure/_memory.py"),
)
"""Code on which latencies, memory and FLOPs depend."""

_ANY_ERROR = 1.0
"""No plan's error is greater: the search ends when every map that can be shared is."""


def run_full(
    config: FullConfig,
    out_dir: Path,
    work_dir: Path,
    console: Console,
    *,
    workers: int = 1,
    training_only: bool = False,
) -> dict[str, Any]:
    """Run the study, or what is left of it, and write `report.html`, `report.md` and `results.json` to `out_dir`.

    Training runs leave their results in `out_dir/runs`, where other machines may work at the same study; checkpoints
    and weights stay in `work_dir`. Afterwards everything is timed, with nothing else running.

    Args:
        config: what to run.
        out_dir: directory of the report, with the results of runs below it.
        work_dir: directory of what this machine alone needs.
        console: where progress is shown.
        workers: training processes at a time, which share the processor's cores.
        training_only: only train, as a machine that helps does; no report is written.

    Raises:
        ValueError: where a corpus cannot be opened, or `workers` is below 1.
    """
    return _Full(config, out_dir, work_dir, console, workers).run(training_only)


class _Full:
    def __init__(self, config: FullConfig, out_dir: Path, work_dir: Path, console: Console, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, got {workers}")
        self.config = config
        self.out_dir = out_dir
        self.work_dir = work_dir
        self.console = console
        self.workers = workers
        self.corpora: dict[str, Corpus] = {name: open_corpus(name) for name in (config.corpus, config.other_corpus)}
        self.runs = RunDirectory(out_dir / "runs", work_dir / "runs")
        self.techniques: list[Technique] = [parse(name) for name in config.techniques]

    def run(self, training_only: bool) -> dict[str, Any]:
        runs, longer = self.config.runs(), self.config.longer_runs()
        self._check_judged([*runs, *longer])
        self._train(runs)
        searched = self._searched()
        if searched is not None and searched.name not in self.config.techniques:
            self.techniques.append(searched)
            runs.append(Run(searched.name, self.config.corpus, 0, self.config.recipe))
            self._train(runs[-1:])
        self._train(longer)
        known = partial(study_results, self.config, self.techniques, runs, self.runs, self.corpora)
        known = partial(known, longer=longer, searched=searched)
        if training_only:
            return known(measured={})
        measured = self._costs() | findings(self.config, self.runs, self.out_dir / "findings", self.console)
        results = known(measured=measured)
        write_full(results, self.out_dir)
        return results

    def _check_judged(self, runs: Sequence[Run]) -> None:
        """Raises `ValueError` where a finished run was judged by other transcripts than the corpus has here."""
        here = {name: [cut.supervisions[0].text for cut in corpus.test] for name, corpus in self.corpora.items()}
        for run in runs:
            result = self.runs.finished(run)
            if result is not None and result["test"]["references"] != here[run.corpus]:
                raise ValueError(
                    f"{self.runs.results / run.key}.json was judged by other transcripts than {run.corpus} has here; "
                    "delete it, or choose another --out"
                )

    def _train(self, runs: Sequence[Run]) -> None:
        """Let workers do what is not done; where the system ended one, once more when the others are through, as long
        as runs get done."""
        left = [run for run in runs if self.runs.finished(run) is None]
        self.runs.forget_failures(left)
        while left:
            ended = [code for code in self._work_off(left) if code]
            before, left = len(left), [r for r in left if not (self.runs.finished(r) or self.runs.failed(r))]
            if not ended:
                return  # what is left belongs to workers elsewhere
            self.console.print(f"[red]a worker ended with exit status {ended[0]}[/]; {len(left)} runs are left")
            if len(left) == before:
                return

    def _work_off(self, left: Sequence[Run]) -> list[int | None]:
        """Exit statuses of the workers; shows how far they are."""
        log = self.work_dir / "workers.log"
        arguments = (left, self.runs, max(1, torch.get_num_threads() // self.workers), log)
        processes = [get_context("spawn").Process(target=worker, args=arguments) for _ in range(self.workers)]
        for process in processes:
            process.start()
        try:
            with ProgressBar(self.console, f"{len(left)} training runs, log in {log}", len(left)) as bar:
                while any(process.is_alive() for process in processes):
                    time.sleep(1.0)
                    bar.to(sum((self.runs.progress(run) for run in left), 0.0))
        finally:
            for process in processes:
                process.terminate()
                process.join()
        for run in left:
            if failure := self.runs.failed(run):
                self.console.print(f"[red]failed[/] {run.key}: {failure['error']}", highlight=False)
        return [process.exitcode for process in processes]

    def _searched(self) -> Technique | None:
        """The plan that `search` finds in the trained full model, as a technique; None without that model's weights.

        Of the plans found, the one with about as many reusing heads as the reuse technique that the report shows.
        What was found once is kept beside the runs, so that every machine trains the same; one worker searches, and
        others wait for what it finds.
        """
        full = Run("full", self.config.corpus, 0, self.config.recipe)
        file = self.runs.results / f"{full.key}.search.json"
        with self.runs.lock(file.stem):
            if not file.is_file() and not self._search(full, file):
                return None
        return Reuse(ReusePlan.from_json(json.dumps(json.loads(file.read_text())["plan"])))

    def _search(self, full: Run, file: Path) -> bool:
        """Write down what the search finds in the trained full model; False without its weights."""
        recogniser = self.runs.original(full)
        if recogniser is None:
            return False
        shown = parse(self.config.shown[1])
        assert isinstance(shown, Reuse)
        num_heads = recogniser.model.config.encoder_config.num_attention_heads
        wanted = _reusing_heads(shown.plan, num_heads)
        batches = speech_batches(recogniser, self.config.corpus, split="train", max_batches=8)
        plans = search(recogniser.model, batches, error=_ANY_ERROR, cache=self.work_dir / "search.jsonl")
        chosen = min(plans, key=lambda one: (abs(_reusing_heads(one.plan, num_heads) - wanted), one.error))
        found = {"plan": json.loads(chosen.plan.to_json()), "error": chosen.error, "latency": chosen.latency}
        write_whole(file, lambda unfinished: unfinished.write_text(json.dumps(found) + "\n"))
        return True

    def _costs(self) -> dict[str, Any]:
        """Latency by length, training steps, peak memory and FLOPs of every technique."""
        config, names = self.config, [technique.name for technique in self.techniques]
        steps = Steps(self.work_dir / "costs", _COSTLY)
        recipe = asdict(config.recipe)
        inputs = {"techniques": names, "recipe": recipe, "device": config.device, "repeats": config.repeats}
        inputs |= where()
        corpus, settings = self.corpora[config.corpus], config.recipe.create("en", None, 0).feature_config

        def timed(measure: Callable[..., dict[str, Any]], title: str, what: Any) -> dict[str, Any]:
            with ProgressBar(self.console, title, (1 + config.repeats) * (len(names) + 1)) as bar:
                return measure(
                    config.recipe,
                    names,
                    what,
                    repeats=config.repeats,
                    device=config.device,
                    advance=bar.advance,
                )

        latency = {}
        for frames in config.lengths:
            title, what = f"latency, T = {frames}", speech_features(corpus, settings, frames)
            measure = partial(timed, technique_latency, title, what)
            latency[str(frames)] = steps.do(f"latency-{frames}", inputs, measure)
        batches: dict[str, dict[str, Tensor]] = {
            "utterances": utterance_batch(corpus, settings, config.recipe.batch_seconds),
            str(FLOPS_LENGTH): {"input_features": speech_features(corpus, settings, FLOPS_LENGTH)},
        }
        training = {}
        for name, batch in batches.items():
            measure = partial(timed, training_latency, f"a training step, {name}", batch)
            training[name] = steps.do(f"training-{name}", inputs, measure)
        memory, flops = {}, {}
        with ProgressBar(self.console, "memory and FLOPs", len(names) + 1) as bar:
            for name in (*names, REFERENCE):
                asked = {"recipe": recipe, "technique": name, "frames": config.memory_length, "device": config.device}
                try:
                    memory[name] = steps.do("memory", asked, partial(_memory, asked))["bytes"]
                except (RuntimeError, ValueError) as error:  # of its process: killed, or no way to tell
                    self.console.print(f"memory of {name}: not measured, {error}", highlight=False)
                asked = {"recipe": recipe, "technique": name, "frames": FLOPS_LENGTH}
                flops[name] = steps.do("flops", asked, partial(_flops, config.recipe, name))["flops"]
                bar.advance()
        lengths = {"memory_length": str(config.memory_length), "flops_length": str(FLOPS_LENGTH)}
        return {"latency": latency, "training": training, "memory": memory, "flops": flops} | lengths


def _memory(request: dict[str, Any]) -> dict[str, int]:
    return {"bytes": memory_in_fresh_process(technique_memory, request)}


def _flops(recipe: Recipe, technique: str) -> dict[str, int]:
    return {"flops": technique_flops(recipe, technique, FLOPS_LENGTH)}


def _reusing_heads(plan: ReusePlan, num_heads: int) -> int:
    heads = (head for layer in range(plan.num_layers) for head in plan.heads(layer, num_heads))
    return sum(head is not None for head in heads)
