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
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import CompressedAttention
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
        width, reach = technique.width, 6 * technique.width
        centres = torch.linspace(-3 * width, 3 * width, self.num_heads) if self.num_heads > 1 else torch.zeros(1)
        distances = torch.arange(-reach, reach + 1)
        weights = (-(distances - centres[:, None]).square() / (2 * width**2)).exp()
        self.register_buffer("weights", weights.to(original.v_proj.weight), persistent=False)

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        values = self.v_proj(hidden_states).transpose(1, 2)
        counted = values.new_ones(1, 1, values.shape[-1]) if valid is None else valid[:, None].to(values.dtype)
        weights = self.weights.to(values.dtype)
        reach = weights.shape[-1] // 2
        by_channel = weights.repeat_interleave(self.head_dim, 0)[:, None]
        sums = functional.conv1d(values * counted, by_channel, padding=reach, groups=len(by_channel))
        totals = functional.conv1d(counted, weights[:, None], padding=reach).clamp(min=torch.finfo(values.dtype).tiny)
        context = sums.unflatten(1, (self.num_heads, -1)) / totals[:, :, None]
        return context.permute(0, 3, 1, 2)


class Diagonal(Technique, notation="diagonal", label="diagonal maps"):
    """Every frame attends to itself: two projections."""

    source = "Zhang et al., On the Usefulness of Self-Attention for ASR with Transformers, SLT 2021"
    attention = DiagonalAttention


class Gaussian(Technique, notation="gaussian-{width}", label="fixed Gaussian maps, deviation {width}"):
    """Every frame attends to frames at fixed distances, with a standard deviation of `width` frames."""

    width: int
    source = "You, Sun & Iyyer, Hard-Coded Gaussian Attention for NMT, ACL 2020"
    attention = GaussianAttention
