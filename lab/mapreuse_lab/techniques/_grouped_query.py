"""Multi-query and grouped-query attention: several heads of queries share one head of keys and values.

    context[h] = softmax(((Q[h] + u[h]) K[g]ᵀ + shift((Q[h] + v[h]) R[h]ᵀ)) / √d) V[g],    g = ⌊h·G / H⌋

with G heads of keys and values, each for H / G heads of queries.

Cost: the FLOPs of full attention, with key and value projections of width G·d. The papers shrink the cache of a
decoder; an encoder has none.

Ainslie et al. average the heads of a trained model. Here the first head of each group is kept, because an average of
random weights would start training at another scale.

Papers: https://arxiv.org/abs/1911.02150 (multi-query), https://arxiv.org/abs/2305.13245 (grouped-query)
"""

from __future__ import annotations

from torch import Tensor
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
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
