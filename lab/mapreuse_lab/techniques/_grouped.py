"""Grouped attention: G neighbouring frames attend as one; their features are concatenated.

    Q', K', V' = Q, K, V of shape (H, T, d) read as (H, ⌈T/G⌉, G·d)
    context' = softmax(((Q' + u') K'ᵀ + shift((Q' + v') R'ᵀ)) / √(G·d)) V',    R'[Δ] = R[G·Δ], G times side by side
    context = context' read as (H, T, d)

Cost: 6·T²·C / G FLOPs; 2·(2T/G − 1)·C² to project the distances.

Frames beyond the end, and padding, are zero in queries, keys and values. The paper also concatenates the
encodings of G neighbouring distances. Here a group's frames share the encoding of the distance between groups. This
distance is never longer than the utterance, so results do not depend on padding.

Paper: https://arxiv.org/abs/2109.01163
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._frame_steps import in_steps, step_distances, valid_steps
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique


class GroupedAttention(RelativeAttention):
    """Attention between groups of frames."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        size = self.technique.size
        projected = self.project(hidden_states)
        if valid is not None:
            projected = [part * valid[:, None, :, None] for part in projected]
        query, key, values = (in_steps(part, size) for part in projected)
        content_query, relative_query = self.biased(query)
        context = self.attend_relative(
            (content_query.flatten(-2), relative_query.flatten(-2)),
            key.flatten(-2),
            values.flatten(-2),
            self.relative_keys(step_distances(positions, size)).repeat(1, 1, 1, size),
            valid_steps(valid, size),
        )
        frames = context.unflatten(-1, (size, -1)).transpose(2, 3).flatten(1, 2)
        return frames[:, : hidden_states.shape[1]]


class Grouped(Technique, notation="grouped-{size}", label="grouped attention, {size} frames", minimum=2):
    """Groups of `size` frames attend to groups."""

    size: int
    source = "Burchi & Vielzeuf, Efficient Conformer, ASRU 2021"
    attention = GroupedAttention
    not_causal = "tokens of a group attend as one, so the first would attend to the last"

    def attend(self, inputs: AttentionInputs) -> Tensor:
        valid, size = inputs.valid, self.size
        parts = [inputs.query, inputs.key, inputs.values]
        if valid is not None:
            parts = [part * valid[:, None, :, None] for part in parts]
        steps = valid_steps(valid, size)
        query, key, values = (in_steps(part, size).flatten(-2) for part in parts)
        context = functional.scaled_dot_product_attention(
            query,
            key,
            values,
            None if steps is None else steps[:, None, None, :],
            inputs.dropout_p,
            scale=inputs.scaling * size**-0.5,
        )
        return context.unflatten(-1, (size, -1)).flatten(2, 3)[:, :, : inputs.query.shape[2]]
