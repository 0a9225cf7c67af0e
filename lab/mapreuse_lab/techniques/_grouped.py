"""Grouped attention: G neighbouring frames attend as one, their features side by side.

    Q', K', V' = Q, K, V of shape (H, T, d) read as (H, ⌈T/G⌉, G·d)
    context' = softmax(((Q' + u') K'ᵀ + shift((Q' + v') R'ᵀ)) / √(G·d)) V',    R'[Δ] = R[G·Δ], G times side by side
    context = context' read as (H, T, d)

Cost: 6·T²·C / G FLOPs; 2·(2T/G − 1)·C² to project the distances.

Frames beyond the end, and padding, are zero in queries, keys and values. In the paper the encodings of G neighbouring
distances lie side by side as well; here a group's frames share the encoding of the distance between groups, which is
never longer than the utterance, so that results do not depend on padding.
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


@register("grouped-G", r"grouped-(?P<size>\d+)")
@dataclass(frozen=True)
class Grouped:
    """Groups of `size` frames attend groups."""

    size: int
    source: ClassVar[str] = "Burchi & Vielzeuf, Efficient Conformer, ASRU 2021"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"{self.name}: groups are of at least 2 frames")

    @property
    def name(self) -> str:
        return f"grouped-{self.size}"

    @property
    def title(self) -> str:
        return f"grouped attention, {self.size} frames"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: GroupedAttention(original, self.size))
        return model


class GroupedAttention(RelativeAttention):
    """Attention between groups of frames."""

    def __init__(self, original: ParakeetEncoderAttention, size: int) -> None:
        super().__init__(original)
        self.size = size

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        assert position_embeddings is not None
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, values = (self._grouped(projection(hidden_states), valid) for projection in projections)
        distances = step_distances(position_embeddings, self.size)
        scores = Scores(
            query=(query + self.bias_u[:, None, None]).flatten(-2),
            key=key.flatten(-2),
            scaling=(self.size * self.head_dim) ** -0.5,
            mask=square_mask(valid_steps(valid, self.size)),
            relative=RelativePositions(
                query=(query + self.bias_v[:, None, None]).flatten(-2),
                key=self.split(self.relative_k_proj(distances)).repeat(1, 1, 1, self.size),
            ),
        )
        values = values.flatten(-2)
        context, _ = attend(scores.to(values.dtype), values, keep=False, dropout_p=self.dropout_p())
        frames = context.unflatten(-1, (self.size, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
        return frames[:, : hidden_states.shape[1]]

    def _grouped(self, projected: Tensor, valid: Tensor | None) -> Tensor:
        """(batch, frames, inner) to (batch, heads, groups, size, dim)."""
        if valid is not None:
            projected = projected * valid[..., None]
        return in_steps(self.split(projected), self.size)
