"""Latency of encoders and of single attention modules, on real speech features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ParakeetEncoder

from mapreuse.maps import SharedMaps
from mapreuse.measure import time_interleaved
from mapreuse.models import ARGUMENT, apply, find_stack
from mapreuse.plan import ReusePlan


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
        variants[name] = apply(copy.deepcopy(encoder), plan).to(device)
    features = features.to(device)
    contestants = {name: _call(model, features) for name, model in variants.items()}
    measured = time_interleaved(contestants, repeats=repeats, device=device, advance=advance)
    return {name: {"median": taken.median, "spread": taken.spread} for name, taken in measured.items()}


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
    sharing = apply(copy.deepcopy(encoder), ReusePlan.grouped(encoder.config.num_hidden_layers, 2))
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
    return {name: {"median": taken.median, "spread": taken.spread} for name, taken in measured.items()}


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
