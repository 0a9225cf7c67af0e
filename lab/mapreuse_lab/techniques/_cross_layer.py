"""Cross-layer attention: groups of layers share keys and values.

    context[l] = softmax(((Q[l] + u[l]) K[s]ᵀ + shift((Q[l] + v[l]) R[l]ᵀ)) / √d) V[s]

where s is the first layer of l's group, the only one with key and value projections. Every layer has its own queries,
positions and maps: the mirror image of map reuse, which shares Q and K (as their map) and not V.

Cost: the FLOPs of full attention, without 4·T·C² for projections in all layers of a group but the first, which stores
2·T·C numbers for them. The paper shrinks the cache of a decoder; an encoder has none.

Paper: https://arxiv.org/abs/2405.12981
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._layer_sharing import LayerSharingAttention, open_shared_maps
from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core, LayerStore, PretrainedStack
from mapreuse_lab.techniques._technique import Technique


class CrossLayerAttention(LayerSharingAttention):
    """Attention over the keys and values of the group's first layer."""

    def __init__(
        self, original: ParakeetEncoderAttention, technique: CrossLayer, layer: int, plan: ReusePlan
    ) -> None:
        super().__init__(original, technique, layer, plan)
        if self.source != layer:
            del self.k_proj, self.v_proj

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        key, values = self.shared(
            lambda: [self.split(part(hidden_states)) for part in (self.k_proj, self.v_proj)], kwargs
        )
        query = self.split(self.q_proj(hidden_states))
        return self.attend_relative(self.biased(query), key, values, self.relative_keys(positions), valid)


class CrossLayer(Technique, notation="cla-{size}", label="keys and values shared by {size} layers", minimum=2):
    """Groups of `size` consecutive layers use the keys and values of their first."""

    size: int
    source = "Brandon et al., Reducing Transformer Key-Value Cache Size with CLA, NeurIPS 2024"
    attention = CrossLayerAttention

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        open_shared_maps(encoder)
        sources = [layer - layer % self.size for layer in range(len(encoder.layers))]
        self.replace_attention(encoder, ReusePlan.from_sources(sources))

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        stack.use_interface()
        store = LayerStore(stack.module)
        for layer in stack.layers:
            source = layer.index - layer.index % self.size
            layer.use(CrossLayerCore(self, layer, source, store))
            if source != layer.index:
                layer.remove("key", "value")


class CrossLayerCore(Core):
    """Attention over the keys and values of the group's first layer, in a pretrained model."""

    def __init__(self, technique: CrossLayer, layer: AttentionLayer, source: int, store: LayerStore) -> None:
        super().__init__(technique, layer)
        self.source, self.is_own, self.store = source, source == layer.index, store

    def forward(self, inputs: AttentionInputs) -> Tensor:
        if self.is_own:
            self.store.tensors[self.source] = inputs.key, inputs.values
        key, values = self.store.tensors[self.source]
        return functional.scaled_dot_product_attention(
            inputs.query, key, values, inputs.mask(), inputs.dropout_p, scale=inputs.scaling
        )
