"""Linear attention.

    context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1),    φ(x) = elu(x) + 1

with Q, K, V (H, T, d). In a causal model, position i sums over the keys j ≤ i.

Cost: 4·T·C·(d + 1) FLOPs. Stored: features, 2·T·C numbers, and d·(d + 1) for each head.

As in the paper. There are no scores, so relative positions are dropped, and no weights, so attention dropout is not
applied. Rotary positions of a pretrained model stay in Q and K.

Paper: https://arxiv.org/abs/2006.16236
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._compressed_attention import ContentAttention
from mapreuse_lab.techniques._frame_steps import in_steps
from mapreuse_lab.techniques._pretrained import AttentionInputs
from mapreuse_lab.techniques._technique import Technique

_BLOCK = 64
"""Positions of a block of causal attention."""


class LinearAttention(ContentAttention):
    """Attention by the features elu(x) + 1 of queries and keys."""

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, values = self.project(hidden_states)
        return attend_by_features(*_features(query, key, valid), values)


def _features(query: Tensor, key: Tensor, valid: Bool[Tensor, "batch frames"] | None) -> tuple[Tensor, Tensor]:
    """φ(Q), and φ(K) with zeros for padding."""
    query_features, key_features = functional.elu(query) + 1, functional.elu(key) + 1
    return query_features, key_features if valid is None else key_features * valid[:, None, :, None]


def attend_by_features(
    query_features: Float[Tensor, "batch heads frames features"],
    key_features: Float[Tensor, "batch heads frames features"],
    values: Float[Tensor, "batch heads frames value_dim"],
    causal: bool = False,
) -> Float[Tensor, "batch frames heads value_dim"]:
    """Context under the map φ(Q) φ(K)ᵀ with its rows divided by their sums; the map is not computed.

        context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1)

    Args:
        query_features: φ(Q), positive.
        key_features: φ(K), positive; zero for padding.
        values: values.
        causal: sums over keys end at the query's own position.
    """
    with_ones = functional.pad(values, (0, 1), value=1.0)  # numerator and denominator by one product
    if causal:
        sums = _causal_sums(query_features, key_features, with_ones)
    else:
        sums = query_features @ (key_features.mT @ with_ones)
    return (sums[..., :-1] / sums[..., -1:]).transpose(1, 2)


def _causal_sums(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """Rows i of tril(φ(Q) φ(K)ᵀ) V, in blocks: products within a block, and the state of all earlier blocks."""
    queries, keys, contents = (in_steps(part, _BLOCK) for part in (query, key, values))
    states = (keys.mT @ contents).cumsum(2)
    earlier = functional.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    sums = queries @ earlier + (queries @ keys.mT).tril() @ contents
    return sums.flatten(2, 3)[:, :, : query.shape[2]]


class Linear(Technique, notation="linear", label="linear attention"):
    """Attention whose time and memory grow with T."""

    source = "Katharopoulos et al., Transformers are RNNs, ICML 2020"
    attention = LinearAttention

    def attend(self, inputs: AttentionInputs) -> Tensor:
        features = _features(inputs.query, inputs.key, inputs.valid)
        return attend_by_features(*features, inputs.values, inputs.causal).transpose(1, 2)
