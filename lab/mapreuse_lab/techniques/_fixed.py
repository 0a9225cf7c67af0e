"""Fixed maps: functions of distance alone, the same for every input.

    diagonal:     context = V
    gaussian-W:   map[h, i, j] ∝ exp(−(j − i − μ_h)² / 2W²)  for |j − i| ≤ 6W, rows summing to one over frames that
                  are not padding; the heads' centres μ_h are evenly spaced from −3W to 3W

Cost: nothing, or 2·T·(12·W + 1)·C FLOPs: the map is a convolution of the values. No queries, keys or positional
projections remain.

You et al. centre heads one word before, after and at each word, W = 1 or so; speech is smoother, so centres spread
with W. There are no scores, so positions do not enter, and no stored weights, so attention dropout is not applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import CompressedAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("diagonal", r"diagonal")
@dataclass(frozen=True)
class Diagonal:
    """Every frame attends itself: two projections."""

    name: ClassVar[str] = "diagonal"
    title: ClassVar[str] = "diagonal maps"
    source: ClassVar[str] = "Zhang et al., On the Usefulness of Self-Attention for ASR with Transformers, SLT 2021"
    positions: ClassVar[str] = "none"

    def apply(self, model: Model) -> Model:
        replace_attention(untouched_encoder(model), self.name, lambda _, original: DiagonalAttention(original))
        return model


@register("gaussian-W", r"gaussian-(?P<width>\d+)")
@dataclass(frozen=True)
class Gaussian:
    """Every frame attends around fixed distances from it, with deviation `width` frames."""

    width: int
    source: ClassVar[str] = "You, Sun & Iyyer, Hard-Coded Gaussian Attention for NMT, ACL 2020"
    positions: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_at_least_one(width=self.width)

    @property
    def name(self) -> str:
        return f"gaussian-{self.width}"

    @property
    def title(self) -> str:
        return f"fixed Gaussian maps, deviation {self.width}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: GaussianAttention(original, self.width))
        return model


class DiagonalAttention(CompressedAttention):
    """Attention of every frame to itself."""

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        return self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1))


class GaussianAttention(CompressedAttention):
    """Attention by a fixed function of distance."""

    weights: Tensor

    def __init__(self, original: ParakeetEncoderAttention, width: int) -> None:
        super().__init__(original)
        reach = 6 * width
        centres = torch.linspace(-3 * width, 3 * width, self.num_heads) if self.num_heads > 1 else torch.zeros(1)
        distances = torch.arange(-reach, reach + 1)
        weights = (-(distances - centres[:, None]).square() / (2 * width**2)).exp()
        self.register_buffer("weights", weights.to(original.v_proj.weight), persistent=False)

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        values = self.v_proj(hidden_states).transpose(1, 2)
        counted = values.new_ones(1, 1, values.shape[-1]) if valid is None else valid[:, None].to(values.dtype)
        kernels = self.weights.to(values.dtype)
        reach = kernels.shape[-1] // 2
        by_channel = kernels.repeat_interleave(self.head_dim, 0)[:, None]
        sums = functional.conv1d(values * counted, by_channel, padding=reach, groups=len(by_channel))
        totals = functional.conv1d(counted, kernels[:, None], padding=reach).clamp(min=torch.finfo(values.dtype).tiny)
        context = sums.unflatten(1, (self.num_heads, -1)) / totals[:, :, None]
        return context.permute(0, 3, 1, 2)
