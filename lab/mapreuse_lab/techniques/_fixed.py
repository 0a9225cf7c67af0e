"""Fixed maps: functions of distance alone, the same for every input.

    diagonal:     context = V
    gaussian-W:   map[h, i, j] ∝ exp(−(j − i − μ_h)² / 2W²)  for |j − i| ≤ 6W; rows sum to one over frames that are
                  not padding, and the heads' centres μ_h are evenly spaced from −3W to 3W

Cost: nothing, or 2·T·(12·W + 1)·C FLOPs, because the map is a convolution of the values. Queries, keys and positions
are not projected. Attention dropout is not applied.

The paper centres heads one word before, after and at each word, with W near 1; speech is smoother, so centres spread
with W.

Papers: https://arxiv.org/abs/2011.04906 (diagonal), https://arxiv.org/abs/2005.00742 (Gaussian)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import CompressedAttention
from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core, PretrainedStack
from mapreuse_lab.techniques._technique import Technique


class DiagonalAttention(CompressedAttention):
    """Attention of every frame to itself."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        return self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1))


class GaussianAttention(CompressedAttention):
    """Attention by a fixed function of distance."""

    weights: Tensor

    def __init__(self, original: ParakeetEncoderAttention, technique: Gaussian, layer: int) -> None:
        super().__init__(original, technique, layer)
        weights = _weights(technique.width, self.num_heads)
        self.register_buffer("weights", weights.to(original.v_proj.weight), persistent=False)

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        return _convolved(self.split(self.v_proj(hidden_states)), self.weights, valid).transpose(1, 2)


class GaussianCore(Core):
    """Attention by a fixed function of distance in a pretrained model; in a causal one, to earlier positions."""

    weights: Tensor

    def __init__(self, technique: Gaussian, layer: AttentionLayer) -> None:
        super().__init__(technique, layer)
        weights = _weights(technique.width, layer.num_heads)
        if getattr(layer.attention, "is_causal", False):
            weights[:, weights.shape[1] // 2 + 1 :] = 0.0
        self.register_buffer("weights", weights.to(layer.projection("value").weight), persistent=False)

    def forward(self, inputs: AttentionInputs) -> Tensor:
        return _convolved(inputs.values, self.weights, inputs.valid)


def _weights(width: int, num_heads: int) -> Float[Tensor, "heads distances"]:
    """exp(−(j − i − μ_h)² / 2W²) of the distances j − i = −6W … 6W."""
    reach = 6 * width
    centres = torch.linspace(-3 * width, 3 * width, num_heads) if num_heads > 1 else torch.zeros(1)
    return (-(torch.arange(-reach, reach + 1) - centres[:, None]).square() / (2 * width**2)).exp()


def _convolved(
    values: Float[Tensor, "batch heads frames dim"],
    weights: Float[Tensor, "heads distances"],
    valid: Bool[Tensor, "batch frames"] | None,
) -> Float[Tensor, "batch heads frames dim"]:
    """Means of values with weights by distance, over frames that are not padding."""
    heads, dim = values.shape[1], values.shape[3]
    counted = values.new_ones(1, 1, values.shape[2]) if valid is None else valid[:, None].to(values.dtype)
    weights = weights.to(values.dtype)
    reach = weights.shape[-1] // 2
    channels = values.mT.flatten(1, 2) * counted
    by_channel = weights.repeat_interleave(dim, 0)[:, None]
    sums = functional.conv1d(channels, by_channel, padding=reach, groups=len(by_channel))
    totals = functional.conv1d(counted, weights[:, None], padding=reach).clamp(min=torch.finfo(values.dtype).tiny)
    return (sums.unflatten(1, (heads, -1)) / totals[:, :, None]).mT


class Diagonal(Technique, notation="diagonal", label="diagonal maps"):
    """Every frame attends to itself: two projections."""

    source = "Zhang et al., On the Usefulness of Self-Attention for ASR with Transformers, SLT 2021"
    attention = DiagonalAttention

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        super().convert(stack, batches)
        for layer in stack.layers:
            layer.remove("query", "key")

    def attend(self, inputs: AttentionInputs) -> Tensor:
        return inputs.values


class Gaussian(Technique, notation="gaussian-{width}", label="fixed Gaussian maps, deviation {width}"):
    """Every frame attends to frames at fixed distances, with a standard deviation of `width` frames."""

    width: int
    source = "You, Sun & Iyyer, Hard-Coded Gaussian Attention for NMT, ACL 2020"
    attention = GaussianAttention
    core = GaussianCore

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        super().convert(stack, batches)
        for layer in stack.layers:
            layer.remove("query", "key")
