"""Every technique on pretrained models: quality before and after recovery, and latency."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mapreuse.console import command_line, console, one_line, write_json
from mapreuse.measure import machine, time_interleaved
from mapreuse_lab.models import (
    EmbeddingModel,
    LanguageModel,
    Metric,
    SpeechModel,
    Task,
    bible,
    open_task,
    quality_json,
    text_windows,
)
from mapreuse_lab.study._recovery import recover
from mapreuse_lab.study._technique_comparison import amounts_text, baseline_metrics, is_complete
from mapreuse_lab.techniques import PretrainedStack, Technique, parse, pretrained_techniques
from mapreuse_lab.training import waveform_of

_LENGTHS = {SpeechModel: 96, EmbeddingModel: 24, LanguageModel: 512}
"""Typical positions of the evaluation data, to which settings of techniques are fitted."""

_CALIBRATION = {SpeechModel: 128, EmbeddingModel: 32, LanguageModel: 24}
"""Batches that conversions are fitted on, of one recording, 16 sentences and one window; recovery reads all."""

_TIMED_CALIBRATION, _LONG_SECONDS = 8, 0.5

_TIMED_LENGTHS: dict[Any, tuple[int, ...]] = {
    SpeechModel: (10, 30),
    EmbeddingModel: (16, 128, 512),
    LanguageModel: (512, 2048),
}
"""Seconds of speech, or tokens."""


class TechniqueStudy:
    """Techniques on one pretrained model, with results in `NAME.json`, technique by technique.

    Args:
        name: of the model, as `open_task` takes it.
        out: directory of the results.
        names: techniques; empty for those of `pretrained_techniques`.
        samples: recordings, sentences, or windows of each kind of text for the evaluation; None for all of the task.

    Raises:
        ValueError: if the model has no task, or `out` has results with another number of samples.
    """

    def __init__(self, name: str, out: Path, names: tuple[str, ...] = (), samples: int | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / f"{Path(name).name}.json"
        self.task: Any = open_task(name)
        if type(self.task) not in _LENGTHS:
            raise ValueError(f"{name}: techniques are compared on pretrained models, see `mapreuse-lab fetch`")
        self.original: nn.Module = self.task.model.get_submodule(self.task.stack)
        stack = PretrainedStack(self.original)
        length = _LENGTHS[type(self.task)]
        self.techniques = [parse(one) for one in names] or pretrained_techniques(stack, length)
        found = json.loads(self.file.read_text()) if self.file.exists() else {"schema": 1, "techniques": {}}
        if found.setdefault("samples", samples) != samples:
            raise ValueError(
                f"{self.file} has results of {found['samples'] or 'all'} samples; use that number, or another --out"
            )
        if samples is not None:
            _use_samples(self.task, samples)
        self.results: dict[str, Any] = found | {"model": name, "machine": machine()}
        for technique in self.techniques:
            row = self.results["techniques"].setdefault(technique.name, {})
            row |= {
                "title": technique.pretrained_title,
                "source": technique.source,
                "why not": technique.why_not(stack),
            }

    def evaluate(self, steps: int = 0) -> None:
        """Add the quality of each technique that has none yet, after `steps` steps of recovery; 0 for none."""
        stage = f"recovered, {steps} steps" if steps else "no training"
        baseline = self._baseline()
        batches = self.task.calibration(self.task.stack)
        for number, technique in enumerate(self.techniques, 1):
            row = self.results["techniques"][technique.name]
            if row["why not"] or is_complete(row.get(stage)) or (steps and technique.name == "full"):
                continue
            try:
                model, recovery = self._converted(technique, batches, steps)
                metrics = self.task.evaluate(model)
                row[stage] = {"metrics": quality_json({"full": baseline, technique.name: metrics})[technique.name]}
                for one in metrics:
                    row[stage]["metrics"][one.name]["amounts"] = amounts_text(one)
                row[stage] |= {"recovery": recovery} if recovery else {}
                text = ", ".join(f"{one.name} {one.text()}" for one in metrics)
            except (RuntimeError, ValueError) as error:
                row[stage] = {"failed": one_line(error)}
                text = f"failed: {one_line(error)}"
            self._write()
            console.print(f"{number}/{len(self.techniques)} {technique.name}, {stage}: {text}", markup=False)

    def time(self, repeats: int) -> None:
        """Measure the latency of the techniques by turns, on each length, and keep that of all others.

        Every turn times full attention, too. Conversions are fitted to a few batches, which latency does not show.
        """
        batches = self.task.calibration(self.task.stack)[:_TIMED_CALIBRATION]
        models = {"full": self.original} | {
            one.name: self._converted(one, batches, 0)[0].get_submodule(self.task.stack)
            for one in self.techniques
            if one.name != "full" and not self.results["techniques"][one.name]["why not"]
        }
        for model in models.values():
            _share_weights(model, self.original)
        latency = self.results.setdefault("latency", {})
        for length in _TIMED_LENGTHS[type(self.task)]:
            inputs = _inputs(self.task, length)
            calls = {name: _call(model, inputs) for name, model in models.items()}
            timed = time_interleaved(calls, repeats=repeats, single_from=_LONG_SECONDS, title=f"length {length}")
            kept = latency.setdefault(str(length), {"techniques": {}})
            kept |= {"command": command_line("mapreuse-lab"), "threads": torch.get_num_threads()}
            speed_ups = {name: one.speed_up_over(timed["full"]) for name, one in timed.items()}
            kept["techniques"] |= {name: one.data() | {"speed-up": speed_ups[name]} for name, one in timed.items()}
            self._write()

    def _baseline(self) -> list[Metric]:
        """The metrics of the original; they are kept, so that a resumed run compares with the same ones."""
        kept = self.results.get("baseline")
        if kept is None:
            metrics = self.task.evaluate(self.task.model)
            kept = [{"name": one.name, "kind": one.kind, "sums": one.sums.tolist()} for one in metrics]
            self.results["baseline"] = kept
            self._write()
        return baseline_metrics(self.results)

    def _converted(
        self, technique: Technique, batches: list[dict[str, Tensor]], steps: int
    ) -> tuple[Any, dict[str, float]]:
        """A copy of the whole model under a technique, and what recovery did."""
        torch.manual_seed(0)
        model = copy.deepcopy(self.task.model)
        module = model.get_submodule(self.task.stack)
        layers = [layer.layer for layer in PretrainedStack(module).layers]
        originals = [layer.layer for layer in PretrainedStack(self.original).layers]
        number = _CALIBRATION[type(self.task)]
        technique.convert_pretrained(module, batches[:: max(1, len(batches) // number)][:number])
        found = {}
        if steps:
            left = set(module.modules())
            pairs = [(one, other) for one, other in zip(layers, originals, strict=True) if one in left]
            found = recover(module, self.original, pairs, batches, steps)
        parameters = sum(one.numel() for one in module.parameters())
        self.results["techniques"][technique.name]["parameters"] = parameters
        technique.finish(module)
        return model, found

    def _write(self) -> None:
        self.results["command"] = command_line("mapreuse-lab")
        write_json(self.file, self.results)


def _use_samples(task: Any, samples: int) -> None:
    """Evaluate on fewer samples, spread over the test data."""
    if isinstance(task, SpeechModel):
        cuts = list(task.cuts)
        task.cuts = cuts[:: max(1, len(cuts) // samples)][:samples]
    elif isinstance(task, EmbeddingModel):
        task.num_evaluation = samples
    else:
        task.num_windows = samples


def _share_weights(model: nn.Module, original: nn.Module) -> None:
    """Let a copy use the original's weights where they are equal, to save memory."""
    originals = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if name in originals and torch.equal(parameter, originals[name]):
            parameter.data = originals[name].data


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """A forward pass; a language model computes the logits of the last token alone, as before generation."""
    more: dict[str, Any] = {"use_cache": False} if "input_ids" in inputs else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1
    return lambda: model(**inputs, **more)


def _inputs(task: Task, length: int) -> dict[str, Tensor]:
    """One real input of the stack: seconds of speech, or tokens."""
    if isinstance(task, SpeechModel):
        rate = task.extractor.sampling_rate
        samples = np.concatenate([waveform_of(cut, rate) for cut in task.cuts])
        return task.inputs(np.resize(samples, length * rate))
    (window,) = text_windows(task.tokenizer, bible(), length, 1)  # type: ignore[attr-defined]
    return {"input_ids": window, "attention_mask": torch.ones_like(window)}
