"""Cross-layer attention: keys and values shared by groups of layers.

    context[l] = softmax(((Q[l] + u[l]) K[s]ᵀ + shift((Q[l] + v[l]) R[l]ᵀ)) / √d) V[s]

where s is the first layer of l's group, the only one with key and value projections. Queries, positions and so maps
are every layer's own: the mirror image of map reuse, which shares Q and K (as their map) and not V.

Cost: the FLOPs of full attention; 4·T·C² for projections saved in all layers of a group but the first, which keeps
2·T·C numbers for them.

Brandon et al. mean to shrink the cache of a decoder; an encoder has none, so projections are all that is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse_lab.techniques._attention import RelativeAttention
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._handing import publish, published
from mapreuse_lab.techniques._technique import Model, register


@register("cla-S", r"cla-(?P<size>\d+)")
@dataclass(frozen=True)
class CrossLayer:
    """Groups of `size` consecutive layers use the keys and values of their first."""

    size: int
    source: ClassVar[str] = "Brandon et al., Reducing Transformer Key-Value Cache Size with CLA, NeurIPS 2024"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"{self.name}: layers share keys and values in groups of at least 2")

    @property
    def name(self) -> str:
        return f"cla-{self.size}"

    @property
    def title(self) -> str:
        return f"keys and values shared by {self.size} layers"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        publish(encoder, [layer - layer % self.size for layer in range(len(encoder.layers))])
        replace_attention(
            encoder,
            self.name,
            lambda layer, original: CrossLayerAttention(original, layer, layer - layer % self.size),
        )
        return model


class CrossLayerAttention(RelativeAttention):
    """Attention of layer `layer` over the keys and values of layer `source`."""

    def __init__(self, original: ParakeetEncoderAttention, layer: int, source: int) -> None:
        super().__init__(original)
        self.layer, self.source = layer, source
        if layer != source:
            del self.k_proj, self.v_proj

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        shared = published(self.layer, kwargs)
        if self.layer == self.source:
            shared.put(self.layer, [self.split(part(hidden_states)) for part in (self.k_proj, self.v_proj)])
        key, values = shared.get(self.source, self.layer)
        query, relative_key = self.q_proj(hidden_states), self.relative_k_proj(position_embeddings)
        return self.attend_relative(self.split(query), key, values, self.split(relative_key), valid)
