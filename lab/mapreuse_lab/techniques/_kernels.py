"""Attention whose weights are products of features, so that no map is needed: time and memory grow with T."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def kernel_attention(
    query_features: Float[Tensor, "batch heads frames features"],
    key_features: Float[Tensor, "batch heads frames features"],
    values: Float[Tensor, "batch heads frames value_dim"],
) -> Float[Tensor, "batch heads frames value_dim"]:
    """Context under the map that is φ(Q) φ(K)ᵀ with its rows made to sum to one.

        context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1)

    Features are positive; those of padded keys are zero. Numerator and denominator are one product, the values having
    a column of ones.
    """
    with_ones = functional.pad(values, (0, 1), value=1.0)
    sums = query_features @ (key_features.mT @ with_ones)
    return sums[..., :-1] / sums[..., -1:]
