"""Linear attention.

    context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1),    φ(x) = elu(x) + 1

with Q, K, V (H, T, d).

Cost: 4·T·C·(d + 1) FLOPs. Stored: features, 2·T·C numbers, and d·(d + 1) for each head.

As in the paper, for a bidirectional encoder. There are no scores, so positions are dropped, and no weights, so
attention dropout is not applied.

Paper: https://arxiv.org/abs/2006.16236
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import ContentAttention
from mapreuse_lab.techniques._technique import Technique


class LinearAttention(ContentAttention):
    """Attention by the features elu(x) + 1 of queries and keys."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, values = self.project(hidden_states)
        query_features, key_features = functional.elu(query) + 1, functional.elu(key) + 1
        if valid is not None:
            key_features = key_features * valid[:, None, :, None]
        return attend_by_features(query_features, key_features, values)


def attend_by_features(
    query_features: Float[Tensor, "batch heads frames features"],
    key_features: Float[Tensor, "batch heads frames features"],
    values: Float[Tensor, "batch heads frames value_dim"],
) -> Float[Tensor, "batch frames heads value_dim"]:
    """Context under the map φ(Q) φ(K)ᵀ with its rows divided by their sums; the map is not computed.

        context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1)

    Args:
        query_features: φ(Q), positive.
        key_features: φ(K), positive; zero for padding.
        values: values.
    """
    with_ones = functional.pad(values, (0, 1), value=1.0)  # numerator and denominator by one product
    sums = query_features @ (key_features.mT @ with_ones)
    return (sums[..., :-1] / sums[..., -1:]).transpose(1, 2)


class Linear(Technique, notation="linear", label="linear attention"):
    """Attention whose time and memory grow with T."""

    source = "Katharopoulos et al., Transformers are RNNs, ICML 2020"
    attention = LinearAttention
