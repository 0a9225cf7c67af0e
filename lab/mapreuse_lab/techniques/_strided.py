"""Strided attention: only every S-th frame asks, and the frames up to the next share its context.

    context[i] = context_full[S·⌊i/S⌋]

with context_full the context of full attention, of which only those rows are computed.

Cost: 6·T²·C / S + 128·T·C FLOPs, since a block of 64 rows spans 64·S distances more than each of them meets; a
query projection of T / S frames; 2·(2T − 1)·C² to project the distances. Stored: the scores of a block at a time.

In the paper strided attention stands where the encoder halves its frame rate, and frames between are dropped; here
the rate stays, so they share what the S-th frame found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import RelativeAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._technique import Model, register

_ROWS = 64
"""Query rows that are computed at a time."""


@register("strided-S", r"strided-(?P<stride>\d+)")
@dataclass(frozen=True)
class Strided:
    """Every `stride`-th frame asks."""

    stride: int
    source: ClassVar[str] = "Burchi & Vielzeuf, Efficient Conformer, ASRU 2021"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if self.stride < 2:
            raise ValueError(f"{self.name}: a stride is of at least 2 frames")

    @property
    def name(self) -> str:
        return f"strided-{self.stride}"

    @property
    def title(self) -> str:
        return f"strided attention, stride {self.stride}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: StridedAttention(original, self.stride))
        return model


class StridedAttention(RelativeAttention):
    """Attention whose queries are every `stride`-th frame."""

    def __init__(self, original: ParakeetEncoderAttention, stride: int) -> None:
        super().__init__(original)
        self.stride = stride

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        query = self.split(self.q_proj(hidden_states[:, :: self.stride]))
        key, values = self.split(self.k_proj(hidden_states)), self.split(self.v_proj(hidden_states))
        relative_query = (query + self.bias_v[:, None]) * self.scaling
        relative_key = self.split(self.relative_k_proj(position_embeddings))
        padding = None if valid is None else ~valid[:, None, None, :]
        contexts = []
        for start in range(0, query.shape[2], _ROWS):
            bias = self._positional(relative_query[:, :, start : start + _ROWS], relative_key, start)
            if padding is not None:
                bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)
            rows = query[:, :, start : start + _ROWS] + self.bias_u[:, None]
            contexts.append(
                functional.scaled_dot_product_attention(rows, key, values, bias, self.dropout_p(), scale=self.scaling)
            )
        context = torch.cat(contexts, dim=2).transpose(1, 2)
        return context.repeat_interleave(self.stride, dim=1)[:, : hidden_states.shape[1]]

    def _positional(
        self,
        query: Float[Tensor, "batch heads rows dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        start: int,
    ) -> Float[Tensor, "batch heads rows frames"]:
        """Positional scores of strided rows from number `start` on.

        Row r meets key j at distance S·(start + r) − j. Of the distances that these rows span, from the last row and
        key 0 on, that is number S·(rows − 1 − r) + j: every row reads S columns before the one above it.
        """
        rows, frames = query.shape[2], relative_key.shape[2] // 2 + 1
        first = frames - 1 - self.stride * (start + rows - 1)
        width = frames + self.stride * (rows - 1)
        scores = query @ relative_key[:, :, first : first + width].mT
        if rows == 1:
            return scores
        begin, step = self.stride * (rows - 1), width - self.stride
        return scores.flatten(-2)[..., begin : begin + rows * step].unflatten(-1, (rows, step))[..., :frames]
