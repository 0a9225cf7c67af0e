"""Multi-query and grouped-query attention: several heads of queries for each head of keys and values.

    context[h] = softmax(((Q[h] + u[h]) K[g]ᵀ + shift((Q[h] + v[h]) R[h]ᵀ)) / √d) V[g],    g = ⌊h·G / H⌋

with G heads of keys and values, each for H / G heads of queries.

Cost: the FLOPs of full attention, with key and value projections of width G·d. Decoding reads a smaller cache; an
encoder has none, so projections are all that is saved.

Ainslie et al. average the heads of a trained model; the first head of each group is kept here, since an average of
random weights would start training at another scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import RelativeAttention
from mapreuse_lab.techniques._encoder import head_rows, replace_attention, some_outputs, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("gqa-G", r"gqa-(?P<groups>\d+)")
@dataclass(frozen=True)
class GroupedQuery:
    """`groups` heads of keys and values; one is multi-query attention."""

    groups: int
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(groups=self.groups)

    @property
    def name(self) -> str:
        return f"gqa-{self.groups}"

    @property
    def title(self) -> str:
        return "multi-query" if self.groups == 1 else f"grouped-query, {self.groups} groups"

    @property
    def source(self) -> str:
        if self.groups == 1:
            return "Shazeer, Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150"
        return "Ainslie et al., GQA, EMNLP 2023"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        heads = encoder.config.num_attention_heads
        if self.groups >= heads or heads % self.groups:
            raise ValueError(f"{self.name}: {heads} heads cannot be put in {self.groups} equal groups of several")
        replace_attention(encoder, self.name, lambda _, original: GroupedQueryAttention(original, self.groups))
        return model


class GroupedQueryAttention(RelativeAttention):
    """Attention with fewer heads of keys and values than of queries."""

    def __init__(self, original: ParakeetEncoderAttention, groups: int) -> None:
        super().__init__(original)
        self.groups = groups
        rows = head_rows(range(0, self.num_heads, self.num_heads // groups), self.head_dim)
        self.k_proj, self.v_proj = some_outputs(self.k_proj, rows), some_outputs(self.v_proj, rows)

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        return self.attend_relative(
            self.split(self.q_proj(hidden_states)),
            self._for_every_head(self.k_proj(hidden_states)),
            self._for_every_head(self.v_proj(hidden_states)),
            self.split(self.relative_k_proj(position_embeddings)),
            valid,
        )

    def _for_every_head(self, projected: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (self.groups, 1, -1)).expand(-1, -1, -1, self.num_heads // self.groups, -1)
        return heads.flatten(2, 3).transpose(1, 2)
