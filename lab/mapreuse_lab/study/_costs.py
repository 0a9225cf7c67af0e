"""What encoders, and single attention modules, cost on real speech features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ParakeetEncoder

from mapreuse.maps import SharedMaps
from mapreuse.measure import SUBSAMPLING, Latency, peak_memory, time_interleaved
from mapreuse.models import ARGUMENT, apply, find_stack, optimize
from mapreuse.plan import ReusePlan
from mapreuse_lab.study._runs import Recipe
from mapreuse_lab.training import Corpus, FeatureConfig, features, waveform_of

REFERENCE = "transformers"
"""The contestant that is the encoder as `transformers` makes it, with fused attention."""


def encoder_latency(
    encoder: ParakeetEncoder,
    plans: dict[str, ReusePlan],
    features: Float[Tensor, "1 frames mels"],
    *,
    repeats: int,
    device: str,
    advance: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Seconds of one forward pass: the original as `transformers` runs it, and under each plan, in turn."""
    original = copy.deepcopy(encoder).to(device)
    variants: dict[str, nn.Module] = {"transformers": original}
    for name, plan in plans.items():
        variants[name] = optimize(apply(copy.deepcopy(encoder), plan)).to(device)
    features = features.to(device)
    contestants = {name: _call(model, features) for name, model in variants.items()}
    measured = time_interleaved(contestants, repeats=repeats, device=device, advance=advance)
    return _figures(measured)


def attention_latency(
    encoder: ParakeetEncoder,
    features: Float[Tensor, "1 frames mels"],
    *,
    repeats: int,
    device: str,
    advance: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Seconds of one layer's attention, projections included, on what reaches layer 1 for these features.

    `transformers` as it is (fused attention with a positional bias), the computing layer that hands its map on, and
    the reusing layer that applies it.
    """
    encoder = copy.deepcopy(encoder).to(device)
    sharing = optimize(apply(copy.deepcopy(encoder), ReusePlan.grouped(encoder.config.num_hidden_layers, 2)))
    original = find_stack(encoder).layers[1].attention
    arguments = _inputs_of(original, encoder, features.to(device))
    layers = find_stack(sharing).layers
    computing, reusing = layers[0].attention, layers[1].attention
    published = SharedMaps(retain=True)
    with torch.inference_mode():
        computing(**arguments, **{ARGUMENT: published})
    contestants = {
        "transformers": lambda: original(**arguments),
        "computing": lambda: computing(**arguments, **{ARGUMENT: SharedMaps()}),
        "reusing": lambda: reusing(**arguments, **{ARGUMENT: published}),
    }
    measured = time_interleaved(contestants, repeats=repeats, device=device, advance=advance)
    return _figures(measured)


def _call(model: nn.Module, features: Tensor) -> Callable[[], object]:
    return lambda: model(input_features=features)


def _inputs_of(attention: nn.Module, encoder: nn.Module, features: Tensor) -> dict[str, Any]:
    """The keyword arguments with which `encoder` calls this attention module for these features."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        encoder(input_features=features)
    handle.remove()
    return seen


def speech_features(corpus: Corpus, settings: FeatureConfig, frames: int) -> Float[Tensor, "1 frames mels"]:
    """Features of test recordings, one after the other, for this many encoder frames."""
    wanted = frames * SUBSAMPLING * settings.sampling_rate // 100
    pieces: list[np.ndarray] = []
    cuts = list(corpus.test)
    while sum(map(len, pieces)) < wanted + settings.sampling_rate:
        pieces.append(waveform_of(cuts[len(pieces) % len(cuts)], settings.sampling_rate))
    inputs, _ = features([np.concatenate(pieces)], settings)
    return inputs[:, : frames * SUBSAMPLING]


def utterance_batch(corpus: Corpus, settings: FeatureConfig, seconds: float) -> dict[str, Tensor]:
    """Training utterances of median length and above, padded to one another, of so many seconds in all."""
    cuts = sorted(corpus.train, key=lambda cut: (cut.duration, cut.id))
    audio: list[np.ndarray] = []
    for cut in cuts[len(cuts) // 2 :]:
        audio.append(waveform_of(cut, settings.sampling_rate))
        if sum(map(len, audio)) > seconds * settings.sampling_rate:
            break
    inputs, mask = features(audio, settings)
    return {"input_features": inputs, "attention_mask": mask}


def technique_latency(
    recipe: Recipe,
    techniques: Sequence[str],
    features: Float[Tensor, "1 frames mels"],
    *,
    repeats: int,
    device: str,
    advance: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Seconds of one forward pass of the encoder under every technique, and as `transformers` runs it, in turn."""
    features = features.to(device)
    encoders = {name: _encoder(recipe, name).to(device) for name in (*techniques, REFERENCE)}
    contestants = {name: _call(encoder, features) for name, encoder in encoders.items()}
    return _figures(time_interleaved(contestants, repeats=repeats, device=device, advance=advance))


def training_latency(
    recipe: Recipe,
    techniques: Sequence[str],
    batch: dict[str, Tensor],
    *,
    repeats: int,
    device: str,
    advance: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Seconds of one training step without its optimizer, forward and backward, under every technique, in turn."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    contestants = {}
    for name in (*techniques, REFERENCE):
        model = _encoder(recipe, name).to(device).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0  # steps that train nothing must not drive the statistics apart
        contestants[name] = _training_step(model, batch)
    return _figures(time_interleaved(contestants, repeats=repeats, device=device, advance=advance))


def technique_flops(recipe: Recipe, technique: str, frames: int) -> int:
    """FLOPs of one forward pass of the encoder as PyTorch counts them, two for a multiplication with its addition.

    Fused attention, of which nothing is counted, is replaced by the products that it is made of.
    """
    encoder = _encoder(recipe, technique)
    inputs = torch.zeros(1, frames * SUBSAMPLING, encoder.config.num_mel_bins)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(input_features=inputs)
    return counter.get_total_flops()


def technique_memory(recipe: dict[str, Any], technique: str, frames: int, device: str) -> int:
    """Bytes that a forward pass needs beside the weights; for `memory_in_fresh_process`."""
    encoder = _encoder(Recipe(**recipe), technique).to(device)
    num_mels = encoder.config.num_mel_bins
    short, long = (torch.randn(1, length * SUBSAMPLING, num_mels, device=device) for length in (16, frames))
    with torch.inference_mode():
        encoder(input_features=short)  # what is allocated once, whatever the length
        return peak_memory(lambda: encoder(input_features=long), device)


def _encoder(recipe: Recipe, technique: str) -> ParakeetEncoder:
    """Under a technique, with `optimize`, or as `transformers` makes it."""
    if technique == REFERENCE:
        return recipe.create("en", None, 0).model.encoder.eval()
    encoder = recipe.create("en", technique, 0).model.encoder.eval()
    return optimize(encoder)


def _training_step(encoder: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            encoder(**batch).last_hidden_state.square().mean().backward()
        encoder.zero_grad()

    return step


def _figures(measured: dict[str, Latency]) -> dict[str, dict[str, float]]:
    return {name: {"median": taken.median, "spread": taken.spread} for name, taken in measured.items()}
