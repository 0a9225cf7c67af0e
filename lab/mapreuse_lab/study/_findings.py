"""What the papers look at in trained models: maps, how alike they are, phonemes; and where the time goes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mapreuse.measure import (
    BreakdownConfig,
    analyze,
    breakdown,
    encoders_to_compare,
    machine,
)
from mapreuse.models import plan_of
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._phoneme_attention import phoneme_attention, phoneme_attention_data
from mapreuse_lab.study._progress import ProgressBar
from mapreuse_lab.study._runs import Run, RunDirectory
from mapreuse_lab.study._steps import Steps, where
from mapreuse_lab.training import (
    Recogniser,
    features,
    open_corpus,
    phoneme_batches,
    speech_batches,
    waveform_of,
)

_VERSION = 1
"""Of what is found in trained models; a greater one has it measured again, where the weights are."""

_DIGITS = 4
_UTTERANCE_SECONDS = (3.0, 4.5)
_PHONEME_SENTENCES = 100


def findings(config: FullConfig, runs: RunDirectory, directory: Path, console: Console) -> dict[str, Any]:
    """Everything of this kind that can be said here; what needs weights that another machine has is left out.

    Results are kept in `directory`, to be put under version control: trained weights are not.
    """
    shown = config.shown
    trained = {name: Run(name, config.corpus, 0, config.recipe) for name in shown}
    keys: dict[str, Any] = {name: run.key for name, run in trained.items()} | {"version": _VERSION}
    timed = Steps(directory, ("plan.py", "maps", "models", "measure", "study/_findings.py"))
    steps = Steps(directory, ())  # kept for machines without the weights, though code that measured them may change
    found: dict[str, Any] = {}

    def add(
        name: str, what: str, inputs: dict[str, Any], measure: Callable[[], dict[str, Any]], steps: Steps = steps
    ) -> None:
        if not steps.is_done(name, inputs):
            console.print(f"[bold]{name}[/]: {what}")
        try:
            found[name] = steps.do(name, inputs, measure)
        except _Missing as missing:
            console.print(f"[bold]{name}[/]: not measured, {missing}")

    def full() -> Recogniser:
        original = runs.original(trained[shown[0]])
        if original is None:
            raise _Missing(f"the weights of {keys[shown[0]]} are not on this machine")
        return original

    def both() -> dict[str, Recogniser]:
        weights = {name: runs.weights(run) for name, run in trained.items()}
        if missing := [keys[name] for name, path in weights.items() if path is None]:
            raise _Missing(f"the weights of {', '.join(missing)} are not on this machine")
        return {name: Recogniser.load(path) for name, path in weights.items() if path is not None}

    commit = {"commit": machine()["commit"]}
    add("similarity", "comparing attention maps", keys, lambda: _likeness(full(), config.corpus) | commit)
    add("maps", "keeping the maps of one utterance", keys, lambda: _maps(both(), config) | commit)
    add("phonemes", "which phonemes attend which", keys, lambda: _phonemes(both(), config) | commit)
    inputs = asdict(config) | where()
    add("breakdown", "where the time goes", inputs, lambda: _breakdown(config, console), timed)
    return found


class _Missing(Exception):
    """Why something cannot be measured on this machine."""


def _likeness(full: Recogniser, corpus: str) -> dict[str, Any]:
    """Similarity of layers, and diagonality and entropy of every head, on dev utterances."""
    found = analyze(full.model, speech_batches(full, corpus))
    return {
        "layers": _rounded(found.similarity.layers),
        "diagonality": _rounded(found.diagonality.heads),
        "entropy": _rounded(found.entropy.relative),
        "concentration": _rounded(found.concentration.heads),
    }


def _maps(recognisers: dict[str, Recogniser], config: FullConfig) -> dict[str, Any]:
    """All maps of one test utterance, in steps of 1/255, with what each recogniser hears in it."""
    shortest, longest = _UTTERANCE_SECONDS
    cuts = sorted(open_corpus(config.corpus).test, key=lambda cut: cut.id)
    cut = next((cut for cut in cuts if shortest <= cut.duration <= longest), cuts[0])
    techniques = {}
    for name, recogniser in recognisers.items():
        audio = waveform_of(cut, recogniser.feature_config.sampling_rate)
        inputs, mask = features([audio], recogniser.feature_config)
        with torch.no_grad():
            output = recogniser.model.encoder(input_features=inputs, attention_mask=mask, output_attentions=True)
        plan = plan_of(recogniser.model)
        assert plan is not None
        layers = [weights[0].mul(255).round().byte() for weights in output.attentions]
        techniques[name] = {
            "hypothesis": recogniser.transcribe(audio),
            "frames": layers[0].shape[-1],
            "layers": [[base64.b64encode(head.numpy().tobytes()).decode() for head in heads] for heads in layers],
            "source_layers": [
                plan.sources(layer)[0] if plan.reuses(layer) else layer for layer in range(plan.num_layers)
            ],
        }
    return {
        "utterance": cut.id,
        "transcript": cut.supervisions[0].text,
        "seconds_per_frame": 0.04,
        "techniques": techniques,
    }


def _phonemes(recognisers: dict[str, Recogniser], config: FullConfig) -> dict[str, Any]:
    """Phoneme attention relationship, on synthetic speech whose phoneme times are known."""
    language = open_corpus(config.corpus).language
    names: list[str] = []
    found = {}
    for name, recogniser in recognisers.items():
        batches, labels, names = phoneme_batches(recogniser, language, sentences=_PHONEME_SENTENCES)
        found[name] = phoneme_attention(recogniser.model, batches, labels, num_classes=len(names))
    return phoneme_attention_data(found, names)


def _breakdown(config: FullConfig, console: Console) -> dict[str, Any]:
    """Seconds of every part of a forward pass by length, full and reusing, and of one layer of each kind."""
    encoder = config.recipe.create("en", None, 0).model.encoder.eval()
    _, reusing = config.shown
    compared = encoders_to_compare(encoder, ("ours",), f"full,{reusing.removeprefix('reuse-')}")
    settings = BreakdownConfig(lengths=config.lengths, device=config.device, repeats=config.repeats)
    with ProgressBar(console, "breakdown", 1.0) as bar:
        found = breakdown(compared, settings, lambda doing, done, total: bar.to(done / total))
    contestants: dict[str, dict[str, dict[str, float]]] = {}
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for one in found:
        name = "full" if one.name.endswith("full") else reusing
        contestants.setdefault(name, {})[str(one.frames)] = {p: cost.seconds for p, cost in one.parts.items()}
        if name != "full":
            for layer in one.layers:
                parts = {part: cost.seconds for part, cost in layer.parts.items()}
                layers.setdefault(layer.kind, {})[str(one.frames)] = parts
    return {"contestants": contestants, "layer": layers}


def _rounded(values: Tensor) -> list[Any]:
    return [_rounded(row) for row in values] if values.dim() > 1 else [round(v, _DIGITS) for v in values.tolist()]
