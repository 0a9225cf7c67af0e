"""The full study: every technique is trained from scratch with one recipe, evaluated and timed."""

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
from torch import Tensor

from mapreuse.console import console, progress_bar, tracked
from mapreuse.conversion import search
from mapreuse.measure import memory_in_fresh_process
from mapreuse.plan import ReusePlan
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._costs import (
    REFERENCES,
    Timings,
    speech_features,
    technique_flops,
    technique_latency,
    technique_memory,
    training_latency,
    utterance_batch,
)
from mapreuse_lab.study._findings import findings
from mapreuse_lab.study._report import write_report, write_results
from mapreuse_lab.study._results import study_results
from mapreuse_lab.study._runs import Recipe, Run, RunDirectory, worker
from mapreuse_lab.study._step_cache import StepCache, timing_environment
from mapreuse_lab.techniques import Reuse, Technique, parse
from mapreuse_lab.training import Corpus, open_corpus, speech_batches, write_whole

FLOPS_LENGTH = 1000
"""Encoder frames for FLOPs and for the longer of the two timed training steps."""

_COST_SOURCES = (
    *("plan.py", "maps", "models", "techniques", "study/_costs.py"),
    *("measure/_latency.py", "measure/_memory.py"),
)
"""Code that latency, memory and FLOPs depend on."""

_MAX_ERROR = 1.0
"""Maximum error of a plan; with it, the search continues until all maps are shared."""


def run_full(
    config: FullConfig, out_dir: Path, work_dir: Path, *, workers: int = 1, training_only: bool = False
) -> dict[str, Any] | None:
    """Run the full study, or what is left of it, and write `results.json` and its report to `out_dir`.

    Each run leaves its result in `out_dir/runs`; other machines that share this directory can help. Checkpoints and
    weights are in `work_dir`. After the training, everything is timed, with nothing else running.

    Args:
        config: settings of the study.
        out_dir: directory of the results.
        work_dir: directory of this machine's checkpoints and finished measurements.
        workers: number of training processes, which share the cores of the processor.
        training_only: train only, to help another machine; no report is written.

    Returns:
        The results, as in `results.json`; None with `training_only`.

    Raises:
        ValueError: if a corpus cannot be opened, `workers` is below 1, or `out_dir` has a run with other references.
    """
    return _Full(config, out_dir, work_dir, workers).run(training_only)


class _Full:
    def __init__(self, config: FullConfig, out_dir: Path, work_dir: Path, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, got {workers}")
        self.config = config
        self.out_dir = out_dir
        self.work_dir = work_dir
        self.workers = workers
        self.corpora: dict[str, Corpus] = {name: open_corpus(name) for name in (config.corpus, config.other_corpus)}
        self.runs = RunDirectory(out_dir / "runs", work_dir / "runs")
        self.techniques: list[Technique] = [parse(name) for name in config.techniques]

    def run(self, training_only: bool) -> dict[str, Any] | None:
        runs, longer = self.config.runs(), self.config.longer_runs()
        self._check_references([*runs, *longer])
        self._train(runs)
        searched = self._searched()
        if searched is not None and searched.name not in self.config.techniques:
            self.techniques.append(searched)
            runs.append(Run(searched.name, self.config.corpus, 0, self.config.recipe))
            self._train(runs[-1:])
        self._train(longer)
        if training_only:
            return None
        measured = self._costs() | findings(self.config, self.runs, self.out_dir / "findings")
        results = study_results(
            self.config, self.techniques, runs, longer, self.runs, self.corpora, measured, searched=searched
        )
        write_results(results, self.out_dir)
        write_report(json.loads(json.dumps(results)), self.out_dir)
        return results

    def _check_references(self, runs: Sequence[Run]) -> None:
        """Raises `ValueError` if a finished run was evaluated on other transcripts than the corpus has."""
        here = {name: [cut.supervisions[0].text for cut in corpus.test] for name, corpus in self.corpora.items()}
        for run in runs:
            result = self.runs.finished(run)
            if result is not None and result["test"]["references"] != here[run.corpus]:
                raise ValueError(
                    f"{self.runs.results / run.key}.json was evaluated on other transcripts than {run.corpus} has "
                    "now; delete it, or choose another --out"
                )

    def _train(self, runs: Sequence[Run]) -> None:
        """Let workers perform the unfinished runs. If the system kills a worker, start again while runs get done."""
        left = [run for run in runs if self.runs.finished(run) is None]
        self.runs.forget_failures(left)
        while left:
            killed = [code for code in self._perform(left) if code]
            before, left = len(left), [r for r in left if not (self.runs.finished(r) or self.runs.failed(r))]
            if not killed:
                return  # workers elsewhere have the other runs
            console.print(f"[red]a worker ended with exit status {killed[0]}[/]; {len(left)} runs are left")
            if len(left) == before:
                return

    def _perform(self, left: Sequence[Run]) -> list[int | None]:
        """Run the workers and show their progress. Returns their exit statuses."""
        log = self.work_dir / "workers.log"
        arguments = (left, self.runs, max(1, torch.get_num_threads() // self.workers), log)
        processes = [get_context("spawn").Process(target=worker, args=arguments) for _ in range(self.workers)]
        for process in processes:
            process.start()
        title = f"{len(left)} training runs, log in {log}"
        try:
            with progress_bar(title) as progress:
                while any(process.is_alive() for process in processes):
                    time.sleep(1.0)
                    progress(title, sum((self.runs.progress(run) for run in left), 0.0), len(left))
        finally:
            for process in processes:
                process.terminate()
                process.join()
        for run in left:
            if failure := self.runs.failed(run):
                console.print(f"[red]failed[/] {run.key}: {failure['error']}", highlight=False)
        return [process.exitcode for process in processes]

    def _searched(self) -> Technique | None:
        """A plan that `search` finds in the trained full model, as a technique; None without that model's weights.

        Of the plans found, the one with about as many reusing heads as the reuse technique in `shown`. The plan is
        written next to the runs, so that all machines train the same one. One worker searches, the others wait.
        """
        full = Run("full", self.config.corpus, 0, self.config.recipe)
        file = self.runs.results / f"{full.key}.search.json"
        with self.runs.lock(file.stem):
            if not file.is_file():
                recogniser = self.runs.original(full)
                if recogniser is None:
                    return None
                shown = parse(self.config.shown[1])
                assert isinstance(shown, Reuse)
                num_heads = recogniser.model.config.encoder_config.num_attention_heads
                target = _reusing_heads(shown.plan, num_heads)
                batches = speech_batches(recogniser, self.config.corpus, split="train", max_batches=8)
                plans = search(recogniser.model, batches, error=_MAX_ERROR, cache=self.work_dir / "search")
                best = min(plans, key=lambda one: (abs(_reusing_heads(one.plan, num_heads) - target), one.error))
                found = {"plan": json.loads(best.plan.to_json()), "error": best.error, "latency": best.latency}
                write_whole(file, lambda unfinished: unfinished.write_text(json.dumps(found) + "\n"))
        return Reuse(ReusePlan.from_json(json.dumps(json.loads(file.read_text())["plan"])))

    def _costs(self) -> dict[str, Any]:
        """Latency by length, training steps, peak memory and FLOPs of every technique and the references."""
        config, names = self.config, [technique.name for technique in self.techniques]
        cache = StepCache(self.work_dir / "costs", _COST_SOURCES)
        recipe = asdict(config.recipe)
        inputs = {"techniques": names, "recipe": recipe, "device": config.device, "repeats": config.repeats}
        inputs |= timing_environment()
        corpus, settings = self.corpora[config.corpus], config.recipe.create("en", None, 0).feature_config

        def timed(step: str, measure: Callable[..., Timings], argument: Any) -> Timings:
            run = partial(measure, step, config.recipe, names, argument, repeats=config.repeats, device=config.device)
            return cache.get(step, inputs, run)

        latency = {
            str(length): timed(f"latency-{length}", technique_latency, speech_features(corpus, settings, length))
            for length in config.lengths
        }
        batches: dict[str, dict[str, Tensor]] = {
            "utterances": utterance_batch(corpus, settings, config.recipe.batch_seconds),
            str(FLOPS_LENGTH): {"input_features": speech_features(corpus, settings, FLOPS_LENGTH)},
        }
        training = {name: timed(f"training-{name}", training_latency, batch) for name, batch in batches.items()}
        memory, flops, contestants = {}, {}, (*names, *REFERENCES)
        for name in tracked("memory and FLOPs", contestants):
            request = {"recipe": recipe, "technique": name, "frames": config.memory_length, "device": config.device}
            try:
                memory[name] = {
                    str(config.memory_length): cache.get("memory", request, partial(_memory, request))["bytes"]
                }
            except (RuntimeError, ValueError) as error:  # the process was killed, or the system has no /proc
                console.print(f"memory of {name}: not measured, {error}", highlight=False)
            request = {"recipe": recipe, "technique": name, "frames": FLOPS_LENGTH}
            flops[name] = {
                str(FLOPS_LENGTH): cache.get("flops", request, partial(_flops, config.recipe, name))["flops"]
            }
        return {"latency": latency, "training": training, "memory": memory, "flops": flops}


def _memory(request: dict[str, Any]) -> dict[str, int]:
    return {"bytes": memory_in_fresh_process(technique_memory, request)}


def _flops(recipe: Recipe, technique: str) -> dict[str, int]:
    return {"flops": technique_flops(recipe, technique, FLOPS_LENGTH)}


def _reusing_heads(plan: ReusePlan, num_heads: int) -> int:
    heads = (head for layer in range(plan.num_layers) for head in plan.heads(layer, num_heads))
    return sum(head is not None for head in heads)
