"""Pooled keys and values: every frame attends means of S neighbouring frames.

    K', V' = Wk mean_S(x), Wv mean_S(x),    (H, ⌈T/S⌉, d); the mean is over frames that are not padding
    context[i] = softmax over c of ((Q[i] + u) · K'[c] + (Q[i] + v) · R[S·(⌊i/S⌋ − c)]) / √d,  times V'

Cost: 6·T²·C / S FLOPs, and key and value projections of T / S frames; 2·(2T/S − 1)·C² to project the distances.

The S frames of each step of queries are S more heads of square attention between steps, which the exact blocked core
computes. Liu et al. compress by a strided convolution, Fan et al. pool after projecting (the same for a mean) and
pool queries too; distances here are those between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.maps import RelativePositions, Scores, attend
from mapreuse_lab.techniques._attention import RelativeAttention, square_mask
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._steps import in_steps, step_distances, valid_steps
from mapreuse_lab.techniques._technique import Model, register


@register("pool-S", r"pool-(?P<size>\d+)")
@dataclass(frozen=True)
class Pooled:
    """Keys and values are means of `size` frames."""

    size: int
    source: ClassVar[str] = (
        "Liu et al., Generating Wikipedia, ICLR 2018; Fan et al., Multiscale Vision Transformers, ICCV 2021"
    )
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"{self.name}: keys are pooled over at least 2 frames")

    @property
    def name(self) -> str:
        return f"pool-{self.size}"

    @property
    def title(self) -> str:
        return f"keys and values pooled by {self.size}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: PooledAttention(original, self.size))
        return model


class PooledAttention(RelativeAttention):
    """Attention over means of frames."""

    def __init__(self, original: ParakeetEncoderAttention, size: int) -> None:
        super().__init__(original)
        self.size = size

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        assert position_embeddings is not None
        size = min(self.size, hidden_states.shape[1])
        pooled = self._pool(hidden_states, valid, size)
        distances = step_distances(position_embeddings, size)
        query = in_steps(self.split(self.q_proj(hidden_states)), size)
        scores = Scores(
            query=(query + self.bias_u[:, None, None]).transpose(2, 3).flatten(1, 2),
            key=self.split(self.k_proj(pooled)).repeat_interleave(size, dim=1),
            scaling=self.scaling,
            mask=square_mask(valid_steps(valid, size)),
            relative=RelativePositions(
                query=(query + self.bias_v[:, None, None]).transpose(2, 3).flatten(1, 2),
                key=self.split(self.relative_k_proj(distances)).repeat_interleave(size, dim=1),
            ),
        )
        values = self.split(self.v_proj(pooled)).repeat_interleave(size, dim=1)
        context, _ = attend(scores.to(values.dtype), values, keep=False, dropout_p=self.dropout_p())
        frames = context.unflatten(1, (self.num_heads, size)).permute(0, 3, 2, 1, 4).flatten(1, 2)
        return frames[:, : hidden_states.shape[1]]

    @staticmethod
    def _pool(hidden_states: Tensor, valid: Tensor | None, size: int) -> Tensor:
        weights = hidden_states.new_ones(1, hidden_states.shape[1], 1)
        if valid is not None:
            weights = valid[..., None].to(hidden_states.dtype)
        total = in_steps(hidden_states * weights, size).sum(-2)
        return total / in_steps(weights, size).sum(-2).clamp(min=1)
