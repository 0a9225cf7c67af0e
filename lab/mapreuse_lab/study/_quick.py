"""The quick study: the shipped recogniser, converted, recovered, scored and timed on this machine."""

from __future__ import annotations

import copy
import hashlib
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mapreuse.conversion import align_by, convert, group_by
from mapreuse.measure import Similarity, conformer_m, machine, similarity
from mapreuse.plan import ReusePlan
from mapreuse_lab.study._config import check_device
from mapreuse_lab.study._costs import attention_latency, encoder_latency, speech_features
from mapreuse_lab.study._progress import ProgressBar
from mapreuse_lab.study._report import write_report
from mapreuse_lab.study._steps import Steps, where
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


@dataclass(frozen=True)
class QuickConfig:
    """What the quick study runs.

    Attributes:
        corpus: name of the corpus, as `open_corpus` takes it.
        baseline: directory of the recogniser that is converted.
        recovery_seconds: length of the fine-tuning that recovers each converted recogniser.
        recovery_rate: its peak learning rate.
        lengths: encoder frames at which latency is measured.
        repeats: rounds of the interleaved timing.
        seed: of fine-tuning and of the bootstrap.
        device: "cpu" or "cuda".
    """

    corpus: str = "prompts:en"
    baseline: str = str(BASELINE)
    recovery_seconds: float = 60.0
    recovery_rate: float = 3e-4
    lengths: tuple[int, ...] = (250, 1000, 2000, 3000)
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"


def run_quick(config: QuickConfig, out_dir: Path, work_dir: Path, console: Console) -> dict[str, Any]:
    """Run the study, or what is left of it, and write `report.md`, `results.json` and plots to `out_dir`.

    Every finished step is kept in `work_dir`; calling again repeats none of them.

    Raises:
        ValueError: where the corpus or the baseline cannot be opened, or do not fit each other.
    """
    study = _Quick(config, work_dir, console)
    results = study.run()
    write_report(results, out_dir)
    return results


class _Quick:
    def __init__(self, config: QuickConfig, work_dir: Path, console: Console) -> None:
        check_device(config.device)
        self.config = config
        self.console = console
        self.steps = Steps(work_dir)
        self.corpus: Corpus = open_corpus(config.corpus)
        self.baseline = Recogniser.load(config.baseline)
        letters = {letter for cut in self.corpus.test for letter in cut.supervisions[0].text}
        missing = sorted(letters - set(self.baseline.vocabulary))
        if missing:
            raise ValueError(
                f"the recogniser in {config.baseline} has no {' '.join(missing)}, but {config.corpus} does; "
                f"train one first: mapreuse-lab train --corpus {config.corpus} --seconds 3600 --out runs/mine, then add "
                "--model runs/mine/best"
            )
        self.identity = {"corpus": config.corpus, "baseline": _digest(Path(config.baseline)), "seed": config.seed}

    def run(self) -> dict[str, Any]:
        num_layers = self.baseline.model.config.encoder_config.num_hidden_layers
        full = self._step("baseline", {}, "scoring the shipped recogniser", self._score_baseline)
        alike = self._step("similarity", {}, "comparing attention maps", self._similarity)
        measured = Similarity(torch.tensor(alike["heads"]), alike["num_queries"])
        plans = recogniser_plans(num_layers, measured)
        variants = [self._variant(name, plan, measured) for name, plan in plans.items()]
        timed = {"full": ReusePlan.full(num_layers)}
        timed |= {name: align_by(measured, plan) for name, plan in plans.items()}
        latency = {
            "recogniser": self._latency("recogniser", self.baseline.model.encoder, timed),
            "conformer-m": self._latency("conformer-m", None, conformer_plans()),
        }
        attention = self._attention()
        return {
            "schema": 2,
            "preset": "quick",
            "command": _command(self.config),
            "machine": machine(),
            "config": asdict(self.config) | {"baseline": Path(self.config.baseline).name},
            "attribution": self.corpus.attribution,
            "baseline": full | {"parameters": _parameters(self.baseline)},
            "similarity": {"layers": measured.layers.tolist(), "num_queries": measured.num_queries},
            "variants": variants,
            "latency": latency,
            "attention": attention,
        }

    def _step(self, name: str, inputs: dict[str, Any], doing: str, run: Callable[[], dict]) -> dict[str, Any]:
        inputs = inputs | self.identity
        state = "[dim]done before[/]" if self.steps.is_done(name, inputs) else doing
        self.console.print(f"[bold]{name}[/]: {state}")
        return self.steps.do(name, inputs, run)

    def _score_baseline(self) -> dict[str, Any]:
        return _scores(self.baseline, self.corpus)

    def _similarity(self) -> dict[str, Any]:
        measured = similarity(self.baseline.model, self._calibration())
        return {"heads": measured.heads.tolist(), "num_queries": measured.num_queries}

    def _calibration(self) -> list[dict[str, torch.Tensor]]:
        """Features of 64 training utterances, spread over the corpus, in batches of 8."""
        cuts = list(self.corpus.train)
        cuts = sorted(cuts[:: max(1, len(cuts) // 64)][:64], key=lambda cut: cut.duration)
        batches = []
        for start in range(0, len(cuts), 8):
            audio = [waveform_of(cut, self.baseline.feature_config.sampling_rate) for cut in cuts[start : start + 8]]
            inputs, mask = features(audio, self.baseline.feature_config)
            batches.append({"input_features": inputs, "attention_mask": mask})
        return batches

    def _variant(self, name: str, plan: ReusePlan, measured: Similarity) -> dict[str, Any]:
        inputs = {"plan": plan.to_json()}
        aligned = align_by(measured, plan)
        converted = _converted(self.baseline, aligned)
        scores = self._step(
            f"convert-{name}",
            inputs,
            "scoring it converted, without training",
            lambda: {
                "by_index": _scores(_converted(self.baseline, plan), self.corpus),
                "aligned": _scores(converted, self.corpus),
            },
        )
        training = TrainConfig(
            seconds=self.config.recovery_seconds,
            learning_rate=self.config.recovery_rate,
            warmup=0.1,
            seed=self.config.seed,
        )
        inputs |= {"training": training.to_json()}
        work = self.steps.directory / self.steps.key(f"recover-{name}", inputs | self.identity)

        def recover() -> dict[str, Any]:
            train(converted, self.corpus, training, work, original=self.baseline)
            result = {"recovered": _scores(converted, self.corpus)}
            shutil.rmtree(work)
            return result

        recovered = self._step(
            f"recover-{name}", inputs, f"fine-tuning for {self.config.recovery_seconds:.0f} s", recover
        )
        reusing = sum(plan.reuses(layer) for layer in range(plan.num_layers))
        description = {
            "name": name,
            "plan": aligned.to_json(),
            "reusing_layers": reusing,
            "parameters": _parameters(converted),
        }
        return description | scores | recovered

    def _latency(self, name: str, encoder: Any, plans: Mapping[str, ReusePlan]) -> dict[str, Any]:
        measured = {}
        for frames in self.config.lengths:
            inputs = {
                "frames": frames,
                "plans": {plan: p.to_json() for plan, p in plans.items()},
                "repeats": self.config.repeats,
                "device": self.config.device,
            } | where()

            def time(frames: int = frames) -> dict[str, Any]:
                model = conformer_m(self.baseline.feature_config.num_mel_bins) if encoder is None else encoder
                rounds = (1 + self.config.repeats) * (len(plans) + 1)
                with ProgressBar(self.console, f"{name}, T = {frames}", rounds) as bar:
                    return encoder_latency(
                        model,
                        dict(plans),
                        self._features(frames),
                        repeats=self.config.repeats,
                        device=self.config.device,
                        advance=bar.advance,
                    )

            measured[str(frames)] = self._step(f"latency-{name}-{frames}", inputs, "timing", time)
        return measured

    def _attention(self) -> dict[str, Any]:
        measured = {}
        for frames in self.config.lengths:

            def time(frames: int = frames) -> dict[str, Any]:
                with ProgressBar(self.console, f"one layer's attention, T = {frames}", 33) as bar:
                    return attention_latency(
                        conformer_m(self.baseline.feature_config.num_mel_bins),
                        self._features(frames),
                        repeats=10,
                        device=self.config.device,
                        advance=bar.advance,
                    )

            inputs = {"frames": frames, "device": self.config.device} | where()
            measured[str(frames)] = self._step(f"attention-{frames}", inputs, "timing", time)
        return measured

    def _features(self, frames: int) -> torch.Tensor:
        return speech_features(self.corpus, self.baseline.feature_config, frames)


def recogniser_plans(num_layers: int, measured: Similarity) -> dict[str, ReusePlan]:
    """The plans that the study compares, heads by index: groups of 2 and of 4, one group, and the most alike.

    The most alike are in a number of groups between those of the fixed plans, so that it is a plan of its own.
    """
    similar = group_by(measured, max(1, (num_layers // 2 + num_layers // 4) // 2))
    return {
        "groups of 2": ReusePlan.grouped(num_layers, 2),
        "groups of 4": ReusePlan.grouped(num_layers, 4),
        "all from one": ReusePlan.grouped(num_layers, num_layers),
        "most alike": _by_index(similar),
    }


def conformer_plans() -> dict[str, ReusePlan]:
    """The plans at which the Conformer-M encoder is timed."""
    return {
        "full": ReusePlan.full(16),
        "groups of 2": ReusePlan.grouped(16, 2),
        "groups of 4": ReusePlan.grouped(16, 4),
        "all from one": ReusePlan.grouped(16, 16),
    }


def _command(config: QuickConfig) -> str:
    """The command line of this study, options that differ from their defaults included."""
    words = ["mapreuse-lab", "study", "--preset", "quick", "--corpus", config.corpus]
    if config.baseline != QuickConfig.baseline:
        words += ["--model", config.baseline]
    if config.device != QuickConfig.device:
        words += ["--device", config.device]
    return shlex.join(words)


def _by_index(plan: ReusePlan) -> ReusePlan:
    """The same layers sharing, every head applying the head of its own number."""
    return ReusePlan.from_sources(
        [plan.sources(layer)[0] if plan.reuses(layer) else layer for layer in range(plan.num_layers)]
    )


def _converted(baseline: Recogniser, plan: ReusePlan) -> Recogniser:
    converted = copy.copy(baseline)
    converted.model = convert(baseline.model, plan)
    return converted


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
