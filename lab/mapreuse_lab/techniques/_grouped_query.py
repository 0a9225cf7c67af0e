"""Multi-query and grouped-query attention: several heads of queries share one head of keys and values.

    context[h] = softmax(((Q[h] + u[h]) K[g]ᵀ + shift((Q[h] + v[h]) R[h]ᵀ)) / √d) V[g],    g = ⌊h·G / H⌋

with G heads of keys and values, each for H / G heads of queries.

Cost: the FLOPs of full attention, with key and value projections of width G·d. The papers shrink the cache of a
decoder; an encoder has none.

Ainslie et al. average the heads of a trained model, which is done here to pretrained models. From scratch, the first
head of each group is kept, because an average of random weights would start training at another scale.

Papers: https://arxiv.org/abs/1911.02150 (multi-query), https://arxiv.org/abs/2305.13245 (grouped-query)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._pretrained import PretrainedStack, Role
from mapreuse_lab.techniques._smaller_projections import rows_of_heads, some_outputs
from mapreuse_lab.techniques._technique import Technique


class GroupedQueryAttention(RelativeAttention):
    """Attention with fewer heads of keys and values than of queries."""

    def __init__(self, original: ParakeetEncoderAttention, technique: GroupedQuery, layer: int) -> None:
        super().__init__(original, technique, layer)
        rows = rows_of_heads(range(0, self.num_heads, self.num_heads // technique.groups), self.head_dim)
        self.k_proj, self.v_proj = some_outputs(self.k_proj, rows), some_outputs(self.v_proj, rows)

    def project(self, hidden_states: Tensor) -> list[Tensor]:
        query, key, values = (part(hidden_states) for part in (self.q_proj, self.k_proj, self.v_proj))
        return [self.split(query), self._for_every_head(key), self._for_every_head(values)]

    def _for_every_head(self, projected: Tensor) -> Tensor:
        groups = self.technique.groups
        heads = projected.unflatten(-1, (groups, 1, -1)).expand(-1, -1, -1, self.num_heads // groups, -1)
        return heads.flatten(2, 3).transpose(1, 2)


class GroupedQuery(Technique, notation="gqa-{groups}", label="grouped-query, {groups} groups"):
    """`groups` heads of keys and values; one is multi-query attention."""

    groups: int
    attention = GroupedQueryAttention

    @property
    def title(self) -> str:
        return "multi-query" if self.groups == 1 else super().title

    @property
    def source(self) -> str:
        if self.groups == 1:
            return "Shazeer, Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150"
        return "Ainslie et al., GQA, EMNLP 2023"

    def check(self, encoder: ParakeetEncoder) -> None:
        heads = encoder.config.num_attention_heads
        if self.groups >= heads or heads % self.groups:
            raise ValueError(f"{self.name}: {heads} heads cannot be put in {self.groups} equal groups of several")

    def why_not(self, stack: PretrainedStack) -> str:
        heads = stack.layers[0].num_key_heads
        fits = self.groups < heads and heads % self.groups == 0
        return "" if fits else f"its {heads} heads of keys and values cannot be put in {self.groups} equal groups"

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        for layer in stack.layers:
            roles: tuple[Role, ...] = ("key", "value")
            for role in roles:
                layer.replace(role, MeanHeads(layer.projection(role), self.groups, layer.num_key_heads))


class MeanHeads(nn.Module):
    """A projection to the means of heads in equal groups, repeated for every head of its group."""

    def __init__(self, projection: nn.Linear, groups: int, num_heads: int) -> None:
        super().__init__()
        size, rows = num_heads // groups, projection.out_features // num_heads
        self.groups, self.size = groups, size
        self.linear = some_outputs(projection, torch.arange(groups * rows))
        with torch.no_grad():
            for mean, whole in zip(self.linear.parameters(), projection.parameters(), strict=True):
                heads = whole.unflatten(0, (groups, size, rows)).mean(1)
                mean.copy_(heads.flatten(0, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = self.linear(hidden_states).unflatten(-1, (self.groups, 1, -1))
        return heads.expand(*heads.shape[:-2], self.size, -1).flatten(-3)
