"""Strided attention: every S-th frame attends, and the frames up to the next share its context.

    context[i] = context_full[S·⌊i/S⌋]

where context_full (T, H, d) is the context of full attention; only the rows that are used are computed.

Cost: 6·T²·C / S + 128·T·C FLOPs, because a block of 64 rows spans 64·S distances more than each of them needs; a
query projection of T / S frames; 2·(2T − 1)·C² to project the distances. Stored: the scores of a block at a time.

In the paper strided attention is used in layers that reduce the frame rate, and the frames between are dropped. Here
the frame rate stays, so they share the context of the S-th frame.

Paper: https://arxiv.org/abs/2109.01163
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique

_ROWS = 64
"""Query rows that are computed at a time."""


class StridedAttention(RelativeAttention):
    """Attention whose queries are every `stride`-th frame."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        stride = self.technique.stride
        query = self.split(self.q_proj(hidden_states[:, ::stride]))
        key, values = self.split(self.k_proj(hidden_states)), self.split(self.v_proj(hidden_states))
        relative_query = (query + self.bias_v[:, None]) * self.scaling
        relative_key = self.relative_keys(positions)
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
        return context.repeat_interleave(stride, dim=1)[:, : hidden_states.shape[1]]

    def _positional(
        self,
        query: Float[Tensor, "batch heads rows dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        start: int,
    ) -> Float[Tensor, "batch heads rows frames"]:
        """Positional scores of strided rows, from row number `start`.

        Row r meets key j at distance S·(start + r) − j. Count the distances that these rows span from the last row
        and key 0: this one has number S·(rows − 1 − r) + j, so every row begins S columns before the row above it.
        """
        stride = self.technique.stride
        rows, frames = query.shape[2], relative_key.shape[2] // 2 + 1
        first = frames - 1 - stride * (start + rows - 1)
        width = frames + stride * (rows - 1)
        scores = query @ relative_key[:, :, first : first + width].mT
        if rows == 1:
            return scores
        begin, step = stride * (rows - 1), width - stride
        return scores.flatten(-2)[..., begin : begin + rows * step].unflatten(-1, (rows, step))[..., :frames]


class Strided(Technique, notation="strided-{stride}", label="strided attention, stride {stride}", minimum=2):
    """Every `stride`-th frame attends."""

    stride: int
    source = "Burchi & Vielzeuf, Efficient Conformer, ASRU 2021"
    attention = StridedAttention

    def attend(self, inputs: AttentionInputs) -> Tensor:
        mask = inputs.mask()
        context = functional.scaled_dot_product_attention(
            inputs.query[:, :, :: self.stride],
            inputs.key,
            inputs.values,
            mask[:, :, :: self.stride] if mask is not None and inputs.causal else mask,
            inputs.dropout_p,
            scale=inputs.scaling,
        )
        return context.repeat_interleave(self.stride, dim=2)[:, :, : inputs.query.shape[2]]
