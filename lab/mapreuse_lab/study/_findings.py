"""Attention maps of the trained models, their similarity, attention between phonemes; and time by part."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapreuse.console import console
from mapreuse.measure import analyze, breakdown, machine
from mapreuse.models import plan_of
from mapreuse_lab.models import speech_like_features
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._phoneme_attention import phoneme_attention
from mapreuse_lab.study._runs import Run, RunDirectory
from mapreuse_lab.study._step_cache import StepCache, timing_environment
from mapreuse_lab.techniques import layer_sources
from mapreuse_lab.training import Recogniser, features, open_corpus, phoneme_batches, speech_batches, waveform_of

_VERSION = 1
"""Version of the findings in trained models; increase it to measure them again."""

_UTTERANCE_SECONDS = (3.0, 4.5)
_PHONEME_SENTENCES = 100


def findings(config: FullConfig, runs: RunDirectory, directory: Path) -> dict[str, Any]:
    """Similarity, maps, phoneme attention and breakdown, by name, as far as this machine has the trained weights.

    Results stay in `directory`; keep it under version control, because trained weights are not.
    """
    trained = {name: Run(name, config.corpus, 0, config.recipe) for name in config.shown}
    weights = {name: runs.weights(run) for name, run in trained.items()}
    keys: dict[str, Any] = {name: run.key for name, run in trained.items()} | {"version": _VERSION}
    # Other machines lack the weights, so a change of the code must not discard these findings.
    cache = StepCache(directory, ())
    found: dict[str, Any] = {}
    for name, measure in {"similarity": _similarity, "maps": _maps, "phonemes": _phonemes}.items():
        if not (cache.has(name, keys) or all(weights.values())):
            console.print(f"{name}: not measured, because the trained weights are on another machine")
            continue

        def run(name: str = name, measure: Callable[..., dict[str, Any]] = measure) -> dict[str, Any]:
            console.print(f"[bold]{name}[/]")
            recognisers = {name: Recogniser.load(path) for name, path in weights.items() if path is not None}
            return measure(recognisers, config) | {"commit": machine()["commit"]}

        found[name] = cache.get(name, keys, run)
    timed = StepCache(directory, ("plan.py", "maps", "models", "measure", "study/_findings.py"))
    inputs = asdict(config) | timing_environment()
    return found | {"breakdown": timed.get("breakdown", inputs, lambda: _breakdown(config))}


def _similarity(recognisers: dict[str, Recogniser], config: FullConfig) -> dict[str, Any]:
    """Similarity of layers, and measures of every head, on development utterances."""
    full = recognisers[config.shown[0]]
    found = analyze(full.model, speech_batches(full, config.corpus))
    return {
        "layers": _rounded(found.similarity.layers),
        "diagonality": _rounded(found.diagonality),
        "entropy": _rounded(found.relative_entropy),
    }


def _maps(recognisers: dict[str, Recogniser], config: FullConfig) -> dict[str, Any]:
    """All maps of one test utterance, in steps of 1/255, and each recogniser's transcript of it."""
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
            "hypothesis": recogniser.texts(*recogniser.logits([audio]))[0],
            "frames": layers[0].shape[-1],
            "layers": [[base64.b64encode(head.numpy().tobytes()).decode() for head in heads] for heads in layers],
            "source_layers": layer_sources(plan),
        }
    transcript = cut.supervisions[0].text
    return {"utterance": cut.id, "transcript": transcript, "techniques": techniques}


def _phonemes(recognisers: dict[str, Recogniser], config: FullConfig) -> dict[str, Any]:
    """Attention between phonemes on synthetic speech, whose phoneme times are known."""
    language = open_corpus(config.corpus).language
    phonemes: list[str] = []
    found = {}
    for name, recogniser in recognisers.items():
        batches, labels, phonemes = phoneme_batches(recogniser, language, sentences=_PHONEME_SENTENCES)
        found[name] = phoneme_attention(recogniser.model, batches, labels, num_classes=len(phonemes))
    return {
        "phonemes": phonemes,
        "matrices": {name: _rounded(one.matrices.mean(1)) for name, one in found.items()},
        "same_phoneme": {name: _rounded(one.same) for name, one in found.items()},
    }


def _breakdown(config: FullConfig) -> dict[str, Any]:
    """Seconds of every part of a forward pass by length, with and without reuse, and of one layer of each kind."""
    encoder = config.recipe.create("en", None, 0).model.encoder.eval().to(config.device)
    _, reusing = config.shown
    inputs = {length: speech_like_features(length, 1, encoder.config.num_mel_bins) for length in config.lengths}
    found = breakdown(
        encoder,
        {str(length): {"input_features": features.to(config.device)} for length, features in inputs.items()},
        plans=f"full,{reusing.removeprefix('reuse-')}",
        kinds=("mapreuse+optimize",),
        repeats=config.repeats,
    )
    contestants: dict[str, dict[str, dict[str, float]]] = {}
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for one in found["breakdowns"]:
        name = "full" if one["name"] == "mapreuse full+optimize" else reusing
        contestants.setdefault(name, {})[one["batch"]] = {p: cost["seconds"] for p, cost in one["parts"].items()}
        if name != "full":
            for layer in one["layers"]:
                parts = {part: cost["seconds"] for part, cost in layer["parts"].items()}
                layers.setdefault(layer["kind"], {})[one["batch"]] = parts
    return {"contestants": contestants, "layer": layers}


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with 4 decimals; None for nan."""
    if values.dim():
        return [_rounded(value) for value in values]
    return None if values.isnan() else round(values.item(), 4)
