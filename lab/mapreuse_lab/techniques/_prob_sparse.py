"""ProbSparse attention: only the queries whose maps are far from uniform attend, the others take the mean.

    M(q) = max_j(q · k_j) − mean_j(q · k_j)  over u sampled keys j;  u = ⌈F·ln T⌉, at least 2, at most T
    context[i] = full attention's for the u queries with the greatest M, mean(V) for the others

Cost: 2·T·u·C FLOPs to choose, 4·u·T·C for scores and context, 4·u·T·C for positional scores; 2·(2T − 1)·C² to project
the distances. Stored: T·u and 3·u·T numbers for each head. All are O(T log T).

Informer draws u keys at random for every query; here the keys are evenly spaced over the utterance and the same for
all, so that results repeat, do not depend on padding, and the choice is one product. Positions are kept in the maps
and left out of the choice, as in M(q) above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import RelativeAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("probsparse-F", r"probsparse-(?P<factor>\d+)")
@dataclass(frozen=True)
class ProbSparse:
    """`factor`·ln T queries attend, of T."""

    factor: int
    source: ClassVar[str] = "Zhou et al., Informer, AAAI 2021"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(factor=self.factor)

    @property
    def name(self) -> str:
        return f"probsparse-{self.factor}"

    @property
    def title(self) -> str:
        return f"ProbSparse, {self.factor}·ln T queries"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        replace_attention(encoder, self.name, lambda _, original: ProbSparseAttention(original, self.factor))
        return model


class ProbSparseAttention(RelativeAttention):
    """Attention of the queries that have something to find."""

    def __init__(self, original: ParakeetEncoderAttention, factor: int) -> None:
        super().__init__(original)
        self.factor = factor

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        batch, frames, _ = hidden_states.shape
        if valid is None:
            valid = hidden_states.new_ones(batch, frames, dtype=torch.bool)
        query, key = self.split(self.q_proj(hidden_states)), self.split(self.k_proj(hidden_states))
        values = self.split(self.v_proj(hidden_states))
        chosen, is_chosen = self._choose(query.detach(), key.detach(), valid)
        few = query.gather(2, chosen[..., None].expand(-1, -1, -1, self.head_dim))
        bias = self._positional(few, self.split(self.relative_k_proj(position_embeddings)), chosen)
        attended = functional.scaled_dot_product_attention(
            few + self.bias_u[:, None],
            key,
            values,
            bias.masked_fill(~valid[:, None, None, :], torch.finfo(bias.dtype).min),
            self.dropout_p(),
            scale=self.scaling,
        )
        unpadded = valid[:, None, :, None]
        mean = (values * unpadded).sum(2, keepdim=True) / unpadded.sum(2, keepdim=True).clamp(min=1)
        found = torch.where(is_chosen[:, None, :, None], attended, mean.to(attended.dtype))
        context = mean.to(found.dtype).expand_as(values).scatter(2, chosen[..., None].expand_as(found), found)
        return context.transpose(1, 2)

    def _choose(
        self,
        query: Float[Tensor, "batch heads frames dim"],
        key: Float[Tensor, "batch heads frames dim"],
        valid: Bool[Tensor, "batch frames"],
    ) -> tuple[Int[Tensor, "batch heads some"], Bool[Tensor, "batch some"]]:
        """The queries that attend, of every item and head, and which of them an item has by its own length."""
        lengths = valid.sum(1, keepdim=True).clamp(min=1)
        numbers = (self.factor * lengths.log()).ceil().long().clamp(min=2).minimum(lengths)
        most = int(numbers.max())
        ranks = torch.arange(most, device=query.device)
        is_chosen = ranks < numbers
        sampled = ((ranks + 0.5) * lengths / numbers).long().minimum(lengths - 1)
        samples = key.gather(2, sampled[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        scores = query @ samples.mT
        unused = ~is_chosen[:, None, None, :]
        mean = scores.masked_fill(unused, 0.0).sum(-1) / numbers[:, None]
        measure = scores.masked_fill(unused, -torch.inf).amax(-1) - mean
        return measure.masked_fill(~valid[:, None], -torch.inf).topk(most, dim=-1).indices, is_chosen

    def _positional(
        self,
        query: Float[Tensor, "batch heads some dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        chosen: Int[Tensor, "batch heads some"],
    ) -> Float[Tensor, "batch heads some frames"]:
        """Positional scores of the chosen queries at every key, times the scores' scaling."""
        scores = (query + self.bias_v[:, None]) * self.scaling @ relative_key.mT
        frames = scores.shape[-1] // 2 + 1
        distances = frames - 1 - chosen[..., None] + torch.arange(frames, device=chosen.device)
        return scores.gather(-1, distances)
