"""ProbSparse attention: only the queries with the least uniform maps attend; the others take the mean of the values.

    M(q) = max_j(q · k_j) − mean_j(q · k_j)  over u sampled keys j;  u = ⌈F·ln T⌉, at least 2, at most T
    context[i] = full attention's for the u queries with the largest M, mean(V) for the others

Cost: 2·T·u·C FLOPs to choose, 4·u·T·C for scores and context, 4·u·T·C for positional scores; 2·(2T − 1)·C² to project
the distances. Stored: T·u and 3·u·T numbers for each head. All are O(T log T).

The paper samples u random keys for every query. Here the keys are evenly spaced over the utterance and the same for
all queries: results repeat and do not depend on padding, and the choice is one product. Positions enter the maps
but not the choice, as in M(q) above.

Paper: https://arxiv.org/abs/2012.07436
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique


class ProbSparseAttention(RelativeAttention):
    """Attention of the queries whose maps are far from uniform."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        batch, frames, _ = hidden_states.shape
        if valid is None:
            valid = hidden_states.new_ones(batch, frames, dtype=torch.bool)
        query, key, values = self.project(hidden_states)
        chosen, is_chosen = _choose(query.detach(), key.detach(), valid, self.technique.factor)
        few = query.gather(2, chosen[..., None].expand(-1, -1, -1, self.head_dim))
        bias = self._positional(few, self.relative_keys(positions), chosen)
        attended = functional.scaled_dot_product_attention(
            few + self.bias_u[:, None],
            key,
            values,
            bias.masked_fill(~valid[:, None, None, :], torch.finfo(bias.dtype).min),
            self.dropout_p(),
            scale=self.scaling,
        )
        return _with_means(attended, values, valid, chosen, is_chosen).transpose(1, 2)

    def _positional(
        self,
        query: Float[Tensor, "batch heads some dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        chosen: Int[Tensor, "batch heads some"],
    ) -> Float[Tensor, "batch heads some frames"]:
        """Scaled positional scores of the chosen queries at every key."""
        scores = (query + self.bias_v[:, None]) * self.scaling @ relative_key.mT
        frames = scores.shape[-1] // 2 + 1
        distances = frames - 1 - chosen[..., None] + torch.arange(frames, device=chosen.device)
        return scores.gather(-1, distances)


def _choose(
    query: Float[Tensor, "batch heads frames dim"],
    key: Float[Tensor, "batch heads frames dim"],
    valid: Bool[Tensor, "batch frames"],
    factor: int,
) -> tuple[Int[Tensor, "batch heads some"], Bool[Tensor, "batch some"]]:
    """The queries that attend, for every item and head, and True for those that the item's own length allows."""
    lengths = valid.sum(1, keepdim=True).clamp(min=1)
    numbers = (factor * lengths.log()).ceil().long().clamp(min=2).minimum(lengths)
    maximum = int(numbers.max())
    ranks = torch.arange(maximum, device=query.device)
    is_chosen = ranks < numbers
    sampled = ((ranks + 0.5) * lengths / numbers).long().minimum(lengths - 1)
    samples = key.gather(2, sampled[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
    scores = query @ samples.mT
    unused = ~is_chosen[:, None, None, :]
    mean = scores.masked_fill(unused, 0.0).sum(-1) / numbers[:, None]
    measure = scores.masked_fill(unused, -torch.inf).amax(-1) - mean
    return measure.masked_fill(~valid[:, None], -torch.inf).topk(maximum, dim=-1).indices, is_chosen


def _with_means(
    attended: Float[Tensor, "batch heads some dim"],
    values: Float[Tensor, "batch heads frames dim"],
    valid: Bool[Tensor, "batch frames"],
    chosen: Int[Tensor, "batch heads some"],
    is_chosen: Bool[Tensor, "batch some"],
) -> Float[Tensor, "batch heads frames dim"]:
    """The contexts of the chosen queries; for all others, the mean of the values."""
    unpadded = valid[:, None, :, None]
    mean = (values * unpadded).sum(2, keepdim=True) / unpadded.sum(2, keepdim=True).clamp(min=1)
    found = torch.where(is_chosen[:, None, :, None], attended, mean.to(attended.dtype))
    return mean.to(found.dtype).expand_as(values).scatter(2, chosen[..., None].expand_as(found), found)


class ProbSparse(Technique, notation="probsparse-{factor}", label="ProbSparse, {factor}·ln T queries"):
    """`factor`·ln T of T queries attend."""

    factor: int
    source = "Zhou et al., Informer, AAAI 2021"
    attention = ProbSparseAttention
    not_causal = "which queries attend depends on all tokens, later ones included"

    def attend(self, inputs: AttentionInputs) -> Tensor:
        query, key, valid = inputs.query, inputs.key, inputs.valid
        if valid is None:
            valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        chosen, is_chosen = _choose(query.detach(), key.detach(), valid, self.factor)
        few = query.gather(2, chosen[..., None].expand(-1, -1, -1, query.shape[-1]))
        attended = functional.scaled_dot_product_attention(
            few, key, inputs.values, inputs.mask(), inputs.dropout_p, scale=inputs.scaling
        )
        return _with_means(attended, inputs.values, valid, chosen, is_chosen)
