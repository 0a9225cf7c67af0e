"""Pooled keys and values: every frame attends to means of S neighbouring frames.

    K', V' = Wk mean_S(x), Wv mean_S(x),    (H, ⌈T/S⌉, d); the mean is over frames that are not padding
    context[i] = softmax over c of ((Q[i] + u) · K'[c] + (Q[i] + v) · R[S·(⌊i/S⌋ − c)]) / √d,  times V'

Cost: 6·T²·C / S FLOPs, and key and value projections of T / S frames; 2·(2T/S − 1)·C² to project the distances.

The S queries of each step become S more heads of square attention between steps, so that the exact kernel can compute
it. Liu et al. compress by a strided convolution. Fan et al. pool after projecting, which is the same for a mean, and
pool queries too. Distances are those between steps.

Papers: https://arxiv.org/abs/1801.10198, https://arxiv.org/abs/2104.11227
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._frame_steps import in_steps, step_distances, valid_steps
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique


class PooledAttention(RelativeAttention):
    """Attention over means of frames."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        size = min(self.technique.size, hidden_states.shape[1])
        pooled = _means(hidden_states, valid, size)
        content_query, relative_query = self.biased(in_steps(self.split(self.q_proj(hidden_states)), size))
        context = self.attend_relative(
            (content_query.transpose(2, 3).flatten(1, 2), relative_query.transpose(2, 3).flatten(1, 2)),
            self.split(self.k_proj(pooled)).repeat_interleave(size, dim=1),
            self.split(self.v_proj(pooled)).repeat_interleave(size, dim=1),
            self.relative_keys(step_distances(positions, size)).repeat_interleave(size, dim=1),
            valid_steps(valid, size),
        )
        frames = context.unflatten(2, (self.num_heads, size)).transpose(2, 3).flatten(1, 2)
        return frames[:, : hidden_states.shape[1]]


def _means(rows: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """Means of `size` rows (…, frames, dim) that are not padding; `valid` is (…, frames)."""
    weights = rows.new_ones(*(1,) * (rows.dim() - 2), rows.shape[-2], 1)
    if valid is not None:
        weights = valid[..., None].to(rows.dtype)
    total = in_steps(rows * weights, size).sum(-2)
    return total / in_steps(weights, size).sum(-2).clamp(min=1)


class Pooled(Technique, notation="pool-{size}", label="keys and values pooled by {size}", minimum=2):
    """Keys and values are means of `size` frames."""

    size: int
    source = "Liu et al., Generating Wikipedia, ICLR 2018; Fan et al., Multiscale Vision Transformers, ICCV 2021"
    attention = PooledAttention
    not_causal = "a mean of keys would contain later tokens"

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Means of projected frames are projections of mean frames."""
        valid = inputs.valid
        rows = None if valid is None else valid[:, None]
        key, values = (_means(part, rows, self.size) for part in (inputs.key, inputs.values))
        steps = valid_steps(valid, self.size)
        mask = None if steps is None else steps[:, None, None, :]
        return functional.scaled_dot_product_attention(
            inputs.query, key, values, mask, inputs.dropout_p, scale=inputs.scaling
        )
