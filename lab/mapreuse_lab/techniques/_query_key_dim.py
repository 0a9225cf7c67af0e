"""A smaller query and key dimension: maps of lower rank, values unchanged.

    context = softmax(((Q + u) Kᵀ + shift((Q + v) Rᵀ)) / √r) V,    Q, K, R of r < d dimensions, V of d

Cost: T²·H·(4·r + 2·d) FLOPs, and query, key and positional projections of width H·r.

The paper asks how much dimension a map needs.

Paper: https://arxiv.org/abs/2002.07028
"""

from __future__ import annotations

from torch import nn
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._smaller_projections import rows_of_heads, some_outputs
from mapreuse_lab.techniques._technique import Technique


class NarrowAttention(RelativeAttention):
    """Attention whose queries and keys have fewer dimensions than its values."""

    def __init__(self, original: ParakeetEncoderAttention, technique: QueryKeyDim, layer: int) -> None:
        super().__init__(original, technique, layer)
        rows = rows_of_heads(range(self.num_heads), self.head_dim, technique.dim)
        for name in ("q_proj", "k_proj", "relative_k_proj"):
            setattr(self, name, some_outputs(getattr(self, name), rows))
        for name in ("bias_u", "bias_v"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[:, : technique.dim].clone()))


class QueryKeyDim(Technique, notation="qk-dim-{dim}", label="query/key dimension {dim}"):
    """Every head keeps the first `dim` dimensions of its queries and keys."""

    dim: int
    source = "Bhojanapalli et al., Low-Rank Bottleneck in Multi-head Attention Models, ICML 2020"
    attention = NarrowAttention
    not_pretrained = "its attention classes have one width for queries, keys and values"

    def check(self, encoder: ParakeetEncoder) -> None:
        before = encoder.layers[0].self_attn.head_dim
        if self.dim >= before:
            raise ValueError(f"{self.name}: heads have {before} dimensions, no more than {self.dim}")
