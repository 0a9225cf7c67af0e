"""A smaller query and key dimension: maps of lower rank, values as they are.

    context = softmax(((Q + u) Kᵀ + shift((Q + v) Rᵀ)) / √r) V,    Q, K, R of r < d dimensions, V of d

Cost: T²·H·(4·r + 2·d) FLOPs, and query, key and positional projections of width H·r.

Nothing differs from the definition; the paper's concern is how much dimension a map needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import RelativeAttention
from mapreuse_lab.techniques._encoder import head_rows, replace_attention, some_outputs, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("qk-dim-R", r"qk-dim-(?P<dim>\d+)")
@dataclass(frozen=True)
class QueryKeyDim:
    """Queries and keys of `dim` dimensions in every head, the first of the original's."""

    dim: int
    source: ClassVar[str] = "Bhojanapalli et al., Low-Rank Bottleneck in Multi-head Attention Models, ICML 2020"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(dim=self.dim)

    @property
    def name(self) -> str:
        return f"qk-dim-{self.dim}"

    @property
    def title(self) -> str:
        return f"query/key dimension {self.dim}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        before = encoder.layers[0].self_attn.head_dim
        if self.dim >= before:
            raise ValueError(f"{self.name}: heads have {before} dimensions, no more than {self.dim}")
        replace_attention(encoder, self.name, lambda _, original: NarrowAttention(original, self.dim))
        return model


class NarrowAttention(RelativeAttention):
    """Attention whose queries and keys have fewer dimensions than its values."""

    def __init__(self, original: ParakeetEncoderAttention, dim: int) -> None:
        super().__init__(original)
        rows = head_rows(range(self.num_heads), self.head_dim, dim)
        self.q_proj, self.k_proj, self.relative_k_proj = (
            some_outputs(projection, rows) for projection in (self.q_proj, self.k_proj, self.relative_k_proj)
        )
        self.bias_u, self.bias_v = (
            nn.Parameter(bias.detach()[:, :dim].clone()) for bias in (self.bias_u, self.bias_v)
        )

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        return self.attend_relative(
            self.split(self.q_proj(hidden_states)),
            self.split(self.k_proj(hidden_states)),
            self.split(self.v_proj(hidden_states)),
            self.split(self.relative_k_proj(position_embeddings)),
            valid,
        )
