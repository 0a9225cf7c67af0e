"""Linear attention.

    context = φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1),    φ(x) = elu(x) + 1

Cost: 4·T·C·(d + 1) FLOPs. Stored: features, 2·T·C numbers, and d·(d + 1) for each head.

As in the paper, for a bidirectional encoder. Positions are dropped: there are no scores that they could enter.
There are no weights to drop either, so attention dropout is not applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from mapreuse_lab.techniques._attention import ContentAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._kernels import kernel_attention
from mapreuse_lab.techniques._technique import Model, register


@register("linear", r"linear")
@dataclass(frozen=True)
class Linear:
    """Attention by the kernel elu + 1."""

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "linear attention"
    source: ClassVar[str] = "Katharopoulos et al., Transformers are RNNs, ICML 2020"
    positions: ClassVar[str] = "dropped"

    def apply(self, model: Model) -> Model:
        replace_attention(untouched_encoder(model), self.name, lambda _, original: LinearAttention(original))
        return model


class LinearAttention(ContentAttention):
    """Attention without a map."""

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        query_features = functional.elu(self.split(self.q_proj(hidden_states))) + 1
        key_features = functional.elu(self.split(self.k_proj(hidden_states))) + 1
        if valid is not None:
            key_features = key_features * valid[:, None, :, None]
        return kernel_attention(query_features, key_features, self.split(self.v_proj(hidden_states))).transpose(1, 2)
