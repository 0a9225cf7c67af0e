"""The quick study: two recognisers are converted, recovered, evaluated and timed on this machine."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import ParakeetEncoder

from mapreuse.console import check_device, command_line, console
from mapreuse.conversion import convert
from mapreuse.measure import Similarity, analyze, machine
from mapreuse.plan import ReusePlan
from mapreuse_lab.models import conformer_m, quality_json
from mapreuse_lab.study._costs import attention_latency, encoder_latency, encoder_variants, speech_features
from mapreuse_lab.study._pretrained import PretrainedRecogniser
from mapreuse_lab.study._report import write_report, write_results
from mapreuse_lab.study._results import SCHEMA
from mapreuse_lab.study._step_cache import StepCache, timing_environment
from mapreuse_lab.techniques import layer_sources
from mapreuse_lab.training import (
    BASELINE,
    Corpus,
    Recogniser,
    TrainConfig,
    evaluate,
    features,
    open_corpus,
    train,
    waveform_of,
)

_OPTIMIZED = ("sdpa", "full", "groups of 2", "groups of 4")
"""Contestants that are also timed with `mapreuse.optimize`."""


@dataclass(frozen=True)
class QuickConfig:
    """Settings of the quick study.

    Attributes:
        corpus: name of the corpus, as `open_corpus` takes it.
        baseline: directory of the recogniser to convert.
        pretrained: name of a pretrained recogniser of English, as `SpeechModel` takes it; None to leave it out.
        pretrained_plans: plans of its encoder, or of its decoder's self-attention (such as "decoder 2x3"); the first
            one is recovered.
        pretrained_recovery_seconds: duration of its recovery.
        pretrained_lengths: recordings for the latency of its encoder, in seconds.
        recovery_seconds: duration of the fine-tuning after each conversion.
        recovery_rate: peak learning rate of the fine-tuning.
        lengths: encoder frames for latency.
        repeats: number of repeats of each timing.
        seed: seed of the fine-tuning.
        device: "cpu" or "cuda".
    """

    corpus: str = "prompts:en"
    baseline: str = str(BASELINE)
    pretrained: str | None = "moonshine-tiny"
    pretrained_plans: tuple[str, ...] = ("2x3", "1x2,2x2", "3x2", "decoder 2x3")
    pretrained_recovery_seconds: float = 180.0
    pretrained_lengths: tuple[int, ...] = (10, 30)
    recovery_seconds: float = 30.0
    recovery_rate: float = 3e-4
    lengths: tuple[int, ...] = (250, 1000, 2000)
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"


def run_quick(config: QuickConfig, out_dir: Path, work_dir: Path) -> dict[str, Any]:
    """Run the quick study, or what is left of it, and write `results.json` and its report to `out_dir`.

    Finished steps are in `work_dir` and are not repeated.

    Returns:
        The results, as in `results.json`.

    Raises:
        ValueError: if the corpus or the recogniser cannot be opened, or the recogniser lacks letters of the corpus.
    """
    results = _Quick(config, work_dir).run()
    write_results(results, out_dir)
    write_report(results, out_dir)
    return results


class _Quick:
    def __init__(self, config: QuickConfig, work_dir: Path) -> None:
        check_device(config.device)
        self.config = config
        self.cache = StepCache(work_dir)
        self.corpus: Corpus = open_corpus(config.corpus)
        self.baseline = Recogniser.load(config.baseline)
        letters = {letter for cut in self.corpus.test for letter in cut.supervisions[0].text}
        if missing := sorted(letters - set(self.baseline.vocabulary)):
            raise ValueError(
                f"{config.corpus} has letters that the recogniser in {config.baseline} does not know: "
                f"{' '.join(missing)}. Train one first: mapreuse-lab train --corpus {config.corpus} --seconds 3600 "
                "--out runs/mine, then add --model runs/mine/best"
            )
        self.identity = {"corpus": config.corpus, "baseline": _digest(Path(config.baseline)), "seed": config.seed}

    def run(self) -> dict[str, Any]:
        encoder = self.baseline.model.encoder
        num_layers = encoder.config.num_hidden_layers
        original = self._step("baseline", {}, lambda: _scores(self.baseline, self.corpus))
        found = self._step("similarity", {}, self._similarity)
        measured = Similarity(torch.tensor(found["heads"]), found["num_queries"])
        num_groups = max(1, (num_layers // 2 + num_layers // 4) // 2)  # between groups of 2 and groups of 4
        plans = _grouped(num_layers) | {"most alike": most_similar_groups(measured, num_groups)}
        aligned = {name: most_similar_heads(measured, plan) for name, plan in plans.items()}
        variants = [self._variant(name, plan, aligned[name]) for name, plan in plans.items()]
        return {
            "schema": SCHEMA,
            "preset": "quick",
            "command": command_line("mapreuse-lab"),
            "machine": machine(),
            "config": asdict(self.config) | {"baseline": Path(self.config.baseline).name},
            "attribution": self.corpus.attribution,
            "baseline": original | {"parameters": _parameters(self.baseline)},
            "similarity": {"layers": measured.layers.tolist(), "num_queries": measured.num_queries},
            "variants": variants,
            "latency": {
                "recogniser": self._latency("recogniser", encoder, {"full": ReusePlan.full(num_layers)} | aligned),
                "conformer-m": self._latency(
                    "conformer-m", self._conformer(), {"full": ReusePlan.full(16)} | _grouped(16)
                ),
            },
            "attention": self._timings("attention", {}, self._attention),
        } | self._pretrained()

    def _pretrained(self) -> dict[str, Any]:
        """Quality and latency of the pretrained recogniser; nothing for a corpus that is not English."""
        config, name = self.config, self.config.pretrained
        if name is None or self.corpus.language != "en":
            return {}
        recogniser = PretrainedRecogniser(name, config.corpus)
        quality = self._pretrained_quality(recogniser)
        plans, lengths = recogniser.encoder_plans(config.pretrained_plans), config.pretrained_lengths
        here = {"model": name, "plans": plans, "repeats": config.repeats} | timing_environment()
        run = partial(recogniser.latency, plans, lengths, config.repeats)
        latency = self._step("pretrained-latency", {"lengths": lengths} | here, run)
        run = partial(recogniser.transcription, config.pretrained_plans, config.repeats)
        transcription = self._step("pretrained-transcription", here | {"plans": config.pretrained_plans}, run)
        found = {"model": name, "quality": quality, "latency": latency, "transcription": transcription}
        return {"pretrained": found}

    def _pretrained_quality(self, recogniser: PretrainedRecogniser) -> dict[str, Any]:
        """Error rates under each plan, by processes with one thread: decoding gains nothing by more threads."""
        plans = self.config.pretrained_plans
        seconds = dict.fromkeys(plans, 0.0) | {plans[0]: self.config.pretrained_recovery_seconds}
        inputs = {plan: {"model": recogniser.name, "plan": plan, "recovery": seconds[plan]} for plan in plans}
        missing = [plan for plan in plans if not self.cache.has(f"pretrained-{plan}", inputs[plan] | self.identity)]
        workers = min(torch.get_num_threads(), len(missing) + 1)
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_with_one_thread) as pool:
            runs = {plan: pool.submit(recogniser.quality, plan, seconds[plan]) for plan in missing}
            originals = [pool.submit(recogniser.original)] if missing else []

            def result(plan: str) -> dict[str, Any]:
                (original,) = originals
                return quality_json({"original": original.result(), **runs[plan].result()})

            return {plan: self._step(f"pretrained-{plan}", inputs[plan], partial(result, plan)) for plan in plans}

    def _step(self, name: str, inputs: dict[str, Any], run: Callable[[], dict]) -> dict[str, Any]:
        inputs = inputs | self.identity
        console.print(f"[bold]{name}[/]{': finished before' if self.cache.has(name, inputs) else ''}")
        return self.cache.get(name, inputs, run)

    def _similarity(self) -> dict[str, Any]:
        """Similarity of heads on 64 training utterances from all over the corpus."""
        cuts = list(self.corpus.train)
        cuts = sorted(cuts[:: max(1, len(cuts) // 64)][:64], key=lambda cut: cut.duration)
        batches = []
        for start in range(0, len(cuts), 8):
            audio = [waveform_of(cut, self.baseline.feature_config.sampling_rate) for cut in cuts[start : start + 8]]
            inputs, mask = features(audio, self.baseline.feature_config)
            batches.append({"input_features": inputs, "attention_mask": mask})
        measured = analyze(self.baseline.model, batches).similarity
        return {"heads": measured.heads.tolist(), "num_queries": measured.num_queries}

    def _variant(self, name: str, plan: ReusePlan, aligned: ReusePlan) -> dict[str, Any]:
        """Error rates of the recogniser with a plan: by index, aligned, and recovered."""
        converted = self.baseline.with_model(convert(self.baseline.model, aligned))
        training = TrainConfig(
            seconds=self.config.recovery_seconds,
            learning_rate=self.config.recovery_rate,
            warmup=0.1,
            seed=self.config.seed,
        )
        step, inputs = f"variant-{name}", {"plan": plan.to_json(), "training": training.to_json()}
        work = self.cache.directory / self.cache.key(step, inputs | self.identity)

        def run() -> dict[str, Any]:
            by_index = self.baseline.with_model(convert(self.baseline.model, plan))
            found = {"by_index": _scores(by_index, self.corpus), "aligned": _scores(converted, self.corpus)}
            train(converted, self.corpus, training, work, original=self.baseline)
            found["recovered"] = _scores(converted, self.corpus)
            shutil.rmtree(work)
            return found

        description = {
            "name": name,
            "plan": aligned.to_json(),
            "reusing_layers": sum(plan.reuses(layer) for layer in range(plan.num_layers)),
            "parameters": _parameters(converted),
        }
        return description | self._step(step, inputs, run)

    def _latency(self, name: str, encoder: ParakeetEncoder, plans: Mapping[str, ReusePlan]) -> dict[str, Any]:
        """Latency of an encoder with each plan, by length."""
        inputs = {"plans": {name: plan.to_json() for name, plan in plans.items()}, "repeats": self.config.repeats}

        def measure(title: str, features: torch.Tensor) -> dict[str, Any]:
            variants = encoder_variants(encoder, plans, _OPTIMIZED)
            return encoder_latency(title, variants, features, repeats=self.config.repeats, device=self.config.device)

        return self._timings(f"latency-{name}", inputs, measure)

    def _attention(self, title: str, features: torch.Tensor) -> dict[str, Any]:
        return attention_latency(title, self._conformer(), features, repeats=10, device=self.config.device)

    def _timings(
        self, name: str, inputs: dict[str, Any], measure: Callable[[str, torch.Tensor], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `measure` returns for the features of each length."""
        timings = {}
        for frames in self.config.lengths:

            def run(title: str = f"{name}, T = {frames}", frames: int = frames) -> dict[str, Any]:
                return measure(title, speech_features(self.corpus, self.baseline.feature_config, frames))

            here = {"frames": frames, "device": self.config.device} | timing_environment()
            timings[str(frames)] = self._step(f"{name}-{frames}", inputs | here, run)
        return timings

    def _conformer(self) -> ParakeetEncoder:
        return conformer_m(self.baseline.feature_config.num_mel_bins)


def _with_one_thread() -> None:
    """Prepare a worker: one thread, and no progress bars beside those of other workers."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _grouped(num_layers: int) -> dict[str, ReusePlan]:
    """Plans with groups of one size, heads by index."""
    sizes = {"groups of 2": 2, "groups of 4": 4, "all from one": num_layers}
    return {name: ReusePlan.grouped(num_layers, size) for name, size in sizes.items()}


def most_similar_heads(measured: Similarity, plan: ReusePlan) -> ReusePlan:
    """The plan with each head of a reusing layer assigned to the most similar head of its source layer."""
    heads = {
        layer: measured.heads[plan.sources(layer)[0], :, layer].argmax(dim=0).tolist()
        for layer in range(plan.num_layers)
        if plan.reuses(layer)
    }
    return ReusePlan.from_sources(layer_sources(plan), heads)


def most_similar_groups(measured: Similarity, num_groups: int) -> ReusePlan:
    """Of all ways to cut the layers into groups, the one with layers most similar to the first of their group."""
    num_layers = len(measured.layers)

    def plan(starts: tuple[int, ...]) -> ReusePlan:
        return ReusePlan.from_sources([max(one for one in (0, *starts) if one <= m) for m in range(num_layers)])

    def total(one: ReusePlan) -> float:
        return sum(float(measured.layers[source, m]) for m, source in enumerate(layer_sources(one)) if source != m)

    return max(map(plan, itertools.combinations(range(1, num_layers), num_groups - 1)), key=total)


def _parameters(recogniser: Recogniser) -> int:
    return sum(parameter.numel() for parameter in recogniser.model.parameters())


def _scores(recogniser: Recogniser, corpus: Corpus) -> dict[str, Any]:
    kept = asdict(evaluate(recogniser, corpus.test))
    return {name: kept[name] for name in kept if name not in ("references", "hypotheses")}


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
