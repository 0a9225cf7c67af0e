"""Token merging: every layer merges its most similar tokens, so that later layers have fewer.

    A, B     the tokens at even and at odd places
    best(i)  the j in B whose key is most similar to that of i in A, by the cosine of keys averaged over heads
    x[j]     ← (s[j] x[j] + Σ s[i] x[i]) / (s[j] + Σ s[i])    over the i that are merged into j

with s the number of original tokens in a token. Of A, the tokens that are most similar to their best are merged:
`percent` % of all tokens, rounded down. It happens after attention and before the feed-forward layers, and attention
counts a token as often as it has original ones: softmax(Q Kᵀ / √d + log s). After the last layer, every original
token gets the states of the one that it was merged into.

Cost: that of full attention with (1 − percent / 100)^l · T tokens in layer l; feed-forward layers become cheaper,
too. The similarities cost T²/2 · d FLOPs.

In the paper, the number of merged tokens of a layer is the same for all images, and the class token is never merged.

Paper: https://arxiv.org/abs/2210.09461
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core, LayerStore, PretrainedStack
from mapreuse_lab.techniques._technique import Technique

_TOKENS, _KEYS = 0, 1
"""What the layers of a pass share in a `LayerStore`."""


class _Tokens(NamedTuple):
    """The tokens of a pass: how many original ones are in each, 0 for padding, and where each original one is."""

    sizes: Float[Tensor, "batch tokens"]
    places: Int[Tensor, "batch originals"]


class MergingCore(Core):
    """Attention in which tokens count by their size. It keeps the keys, by which tokens are merged."""

    def __init__(self, technique: TokenMerging, layer: AttentionLayer, store: LayerStore) -> None:
        super().__init__(technique, layer)
        self.store = store

    def forward(self, inputs: AttentionInputs) -> Tensor:
        if _TOKENS not in self.store.tensors:
            batch, _, length, _ = inputs.query.shape
            valid = inputs.query.new_ones(batch, length) if inputs.valid is None else inputs.valid
            places = torch.arange(length, device=valid.device).expand(batch, length)
            self.store.tensors[_TOKENS] = _Tokens(valid.to(inputs.query.dtype), places)
        self.store.tensors[_KEYS] = inputs.key.mean(1)
        bias = self.store.tensors[_TOKENS].sizes.log()[:, None, None, :]
        return functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.values, bias, inputs.dropout_p, scale=inputs.scaling
        )


class _Hooks:
    """Merges the states that leave a block of attention, and unmerges those that leave the last layer."""

    def __init__(self, percent: int, store: LayerStore) -> None:
        self.percent, self.store = percent, store

    def merge(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        states, *others = output
        sizes, places = self.store.tensors[_TOKENS]
        states, sizes, groups = _merged(states, self.store.tensors[_KEYS], sizes, self.percent)
        self.store.tensors[_TOKENS] = _Tokens(sizes, groups.gather(1, places))
        return (states, *others)

    def unmerge(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        places = self.store.tensors[_TOKENS].places
        return output.gather(1, places[..., None].expand(-1, -1, output.shape[-1]))


def _merged(
    states: Float[Tensor, "batch tokens width"],
    keys: Float[Tensor, "batch tokens dim"],
    sizes: Float[Tensor, "batch tokens"],
    percent: int,
) -> tuple[Float[Tensor, "batch fewer width"], Float[Tensor, "batch fewer"], Int[Tensor, "batch tokens"]]:
    """The states and sizes of the tokens after merging, and where each token went."""
    length, valid = sizes.shape[1], sizes > 0
    fewer = length - length * percent // 100
    if fewer == length:
        return states, sizes, torch.arange(length, device=sizes.device).expand_as(sizes)
    unit = functional.normalize(keys, dim=-1)
    pairs = valid[:, ::2, None] & valid[:, None, 1::2]
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).masked_fill(~pairs, -torch.inf).max(-1)
    rank = best.argsort(1, descending=True).argsort(1)
    number = valid.sum(1, keepdim=True) * percent // 100
    leaves = (rank < number) & best.isfinite()
    kept = valid.clone()
    kept[:, ::2] &= ~leaves
    groups = (kept.cumsum(1) - 1).clamp(0, fewer - 1)  # padding has no weight
    groups[:, ::2] = torch.where(leaves, groups.gather(1, 2 * partner + 1), groups[:, ::2])
    found = sizes.new_zeros(len(sizes), fewer).scatter_add(1, groups, sizes)
    sums = states.new_zeros(len(sizes), fewer, states.shape[-1]).scatter_add(
        1, groups[..., None].expand_as(states), states * sizes[..., None]
    )
    return sums / found.clamp(min=1)[..., None], found, groups


class TokenMerging(
    Technique, notation="merge-{percent}", label="{percent} % of tokens merged in each layer", from_scratch=False
):
    """Every layer merges `percent` % of its tokens into others."""

    percent: int
    source = "Bolya et al., Token Merging, ICLR 2023 (arXiv 2210.09461)"
    not_causal = "a merged token would contain later tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percent > 50:
            raise ValueError(f"{self.notation}: percent must be at most 50, got {self.percent}")

    def why_not(self, stack: PretrainedStack) -> str:
        if any(layer.block is layer.layer for layer in stack.layers):
            return super().why_not(stack) or "merged tokens have no single position to rotate queries and keys by"
        return super().why_not(stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        store = LayerStore(stack.module)
        hooks = _Hooks(self.percent, store)
        stack.use_interface()
        for layer in stack.layers:
            layer.use(MergingCore(self, layer, store))
            layer.block.register_forward_hook(hooks.merge)
        stack.layers[-1].layer.register_forward_hook(hooks.unmerge)
