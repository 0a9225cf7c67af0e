"""Latency, memory and FLOPs of encoders, and of single attention modules, on speech features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ParakeetEncoder

from mapreuse.maps import SharedMaps
from mapreuse.measure import flop_counter, peak_memory, time_interleaved
from mapreuse.models import MAPS_ARGUMENT, apply, find_stack, optimize
from mapreuse.plan import ReusePlan
from mapreuse_lab.models import SUBSAMPLING
from mapreuse_lab.study._runs import Recipe
from mapreuse_lab.training import Corpus, FeatureConfig, features, waveform_of

Timings = dict[str, dict[str, float]]
"""By contestant: "median" in seconds, and "spread" as a fraction of it."""

OPTIMIZE = "+optimize"
"""Ends the names of contestants that run with `mapreuse.optimize`."""

REFERENCES = ("sdpa", "sdpa" + OPTIMIZE)
"""Contestants that run the encoder of `transformers` with fused attention."""


def encoder_variants(
    encoder: ParakeetEncoder, plans: Mapping[str, ReusePlan], optimized: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The encoder as `transformers` makes it, and under each plan; those named in `optimized` with `optimize` too."""
    variants: dict[str, nn.Module] = {REFERENCES[0]: encoder}
    variants |= {name: apply(copy.deepcopy(encoder), plan) for name, plan in plans.items()}
    return variants | {name + OPTIMIZE: optimize(copy.deepcopy(variants[name])) for name in optimized}


def encoder_latency(
    title: str,
    encoders: Mapping[str, nn.Module],
    features: Float[Tensor, "1 frames mels"],
    *,
    repeats: int,
    device: str,
) -> Timings:
    """Latency of a forward pass of each encoder; the encoders take turns. `title` is shown while they run."""
    features = features.to(device)
    return _timed(
        title, {n: partial(e.to(device), input_features=features) for n, e in encoders.items()}, repeats, device
    )


def attention_latency(
    title: str, encoder: ParakeetEncoder, features: Float[Tensor, "1 frames mels"], *, repeats: int, device: str
) -> Timings:
    """Latency of one layer's attention, including projections, on the inputs of layer 1 for these features.

    The contestants are the layer of `transformers` (fused attention with a positional bias), a computing layer, which
    publishes its map, and a reusing layer, which applies it.
    """
    encoder = copy.deepcopy(encoder).to(device)
    sharing = apply(copy.deepcopy(encoder), ReusePlan.grouped(encoder.config.num_hidden_layers, 2))
    original = find_stack(encoder).layers[1].attention
    arguments = _inputs_of(original, encoder, features.to(device))
    computing, reusing = (layer.attention for layer in find_stack(sharing).layers[:2])
    published = SharedMaps(retain=True)
    with torch.inference_mode():
        computing(**arguments, **{MAPS_ARGUMENT: published})
    contestants = {
        "sdpa": lambda: original(**arguments),
        "computing": lambda: computing(**arguments, **{MAPS_ARGUMENT: SharedMaps()}),
        "reusing": lambda: reusing(**arguments, **{MAPS_ARGUMENT: published}),
    }
    return _timed(title, contestants, repeats, device)


def technique_latency(
    title: str,
    recipe: Recipe,
    techniques: Sequence[str],
    features: Float[Tensor, "1 frames mels"],
    *,
    repeats: int,
    device: str,
) -> Timings:
    """Latency of a forward pass of the encoder under each technique, and of the references."""
    encoders = {name: _encoder(recipe, name) for name in (*techniques, *REFERENCES)}
    return encoder_latency(title, encoders, features, repeats=repeats, device=device)


def training_latency(
    title: str, recipe: Recipe, techniques: Sequence[str], batch: dict[str, Tensor], *, repeats: int, device: str
) -> Timings:
    """Latency of a forward and a backward pass under each technique, and of the references; no optimizer step."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    contestants = {}
    for name in (*techniques, *REFERENCES):
        encoder = _encoder(recipe, name).to(device).train()
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0  # repeats must not change the running statistics
        contestants[name] = _training_step(encoder, batch)
    return _timed(title, contestants, repeats, device)


def technique_flops(recipe: Recipe, technique: str, frames: int) -> int:
    """FLOPs of one forward pass of the encoder, as `torch.utils.flop_counter` counts them.

    A multiplication with its addition counts two.
    """
    encoder = _encoder(recipe, technique)
    inputs = torch.zeros(1, frames * SUBSAMPLING, encoder.config.num_mel_bins)
    with torch.no_grad(), flop_counter(encoder) as counter:
        encoder(input_features=inputs)
    return counter.get_total_flops()


def technique_memory(recipe: dict[str, Any], technique: str, frames: int, device: str) -> int:
    """Peak memory of a forward pass in bytes, without the weights; for `memory_in_fresh_process`."""
    encoder = _encoder(Recipe(**recipe), technique).to(device)
    num_mels = encoder.config.num_mel_bins
    short, long = (torch.randn(1, length * SUBSAMPLING, num_mels, device=device) for length in (16, frames))
    with torch.inference_mode():
        encoder(input_features=short)  # allocations that happen once, whatever the length
        return peak_memory(lambda: encoder(input_features=long), device)


def speech_features(corpus: Corpus, settings: FeatureConfig, frames: int) -> Float[Tensor, "1 frames mels"]:
    """Features of concatenated test recordings, for this number of encoder frames."""
    num_samples = frames * SUBSAMPLING * settings.sampling_rate // 100 + settings.sampling_rate
    pieces: list[np.ndarray] = []
    cuts = list(corpus.test)
    while sum(map(len, pieces)) < num_samples:
        pieces.append(waveform_of(cuts[len(pieces) % len(cuts)], settings.sampling_rate))
    inputs, _ = features([np.concatenate(pieces)], settings)
    return inputs[:, : frames * SUBSAMPLING]


def utterance_batch(corpus: Corpus, settings: FeatureConfig, seconds: float) -> dict[str, Tensor]:
    """A padded batch of training utterances of this total duration, of median length and longer."""
    cuts = sorted(corpus.train, key=lambda cut: (cut.duration, cut.id))
    audio: list[np.ndarray] = []
    for cut in cuts[len(cuts) // 2 :]:
        audio.append(waveform_of(cut, settings.sampling_rate))
        if sum(map(len, audio)) > seconds * settings.sampling_rate:
            break
    inputs, mask = features(audio, settings)
    return {"input_features": inputs, "attention_mask": mask}


def _encoder(recipe: Recipe, name: str) -> ParakeetEncoder:
    """The encoder of a technique, with `optimize`, or a reference."""
    encoder = recipe.create("en", None if name in REFERENCES else name, 0).model.encoder.eval()
    return encoder if name == REFERENCES[0] else optimize(encoder)


def _timed(title: str, contestants: Mapping[str, Callable[[], object]], repeats: int, device: str) -> Timings:
    measured = time_interleaved(contestants, repeats=repeats, single_from=1.0, device=device, title=title)
    return {name: {"median": one.median, "spread": one.spread} for name, one in measured.items()}


def _training_step(encoder: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            encoder(**batch).last_hidden_state.square().mean().backward()
        encoder.zero_grad()

    return step


def _inputs_of(attention: nn.Module, encoder: nn.Module, features: Tensor) -> dict[str, Any]:
    """Keyword arguments with which `encoder` calls this attention module for these features."""
    arguments: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.update(kwargs)

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        encoder(input_features=features)
    handle.remove()
    return arguments
