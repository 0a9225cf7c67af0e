"""Full attention, the baseline, and attention map reuse: layers apply an earlier layer's map.

    full:     map[l, h] = softmax(((Q + u) Kᵀ + shift((Q + v) Rᵀ)) / √d),    context[l, h] = map[l, h] V[l, h]
    reuse:    context[l, h] = map[source(l, h)] V[l, h]

with Q, K, V (H, T, d), encodings of all distances R (H, 2T − 1, d), and shift(P)[i, j] = P[i, T − 1 − i + j].

Cost of full attention: 6·T²·C FLOPs (scores of contents, scores of positions, and map × values, 2 each) in blocks of
rows, so that each block computes little more than the T distances it needs and no T × T tensor is stored; and
2·(2T − 1)·C² to project the distances.

Cost of reuse: a computing layer has the cost of full attention, and stores its map, H·T² numbers, until the last
reader. A reusing layer costs 2·T²·C FLOPs and has no query, key or positional projections. In partial reuse some
heads of each reusing layer compute their own maps, at the cost of full attention.

The papers share maps within groups of equal size, by all heads or the same number of heads in every layer; a
`ReusePlan` is more general.

Papers: https://arxiv.org/abs/1901.02860 (relative positions), https://arxiv.org/abs/2005.08100 (Conformer);
https://openreview.net/forum?id=AvcfxqRy4Y, https://arxiv.org/abs/2301.12444 (reuse),
https://arxiv.org/abs/2110.06821 (partial reuse)
"""

from __future__ import annotations

from torch import nn
from transformers import ParakeetEncoder

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._technique import Technique, check_plan


class Full(Technique, notation="full", label="full attention"):
    """Every layer computes a map of every pair of frames, by the kernel that reuse builds on."""

    source = "Dai et al., Transformer-XL, ACL 2019; Gulati et al., Conformer, Interspeech 2020"

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        apply(model, ReusePlan.full(len(encoder.layers)))


class Reuse(
    Technique,
    notation="reuse-{plan}[-partial-{partial}]",
    label="reuse {plan}[, {partial} heads of each reusing layer]",
):
    """Layers share maps.

    Attributes:
        plan: whose map each layer applies; layer by layer if `partial` is given.
        partial: number of heads of each reusing layer, the last ones, that reuse; the others compute. None for all.
    """

    plan: ReusePlan
    partial: int | None = None
    source = "Shim, Choi & Sung, ICLR 2022 and arXiv 2301.12444"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partial is not None and self.plan.num_heads is not None:
            raise ValueError(f"partial={self.partial} needs a plan without head assignments")

    def check(self, encoder: ParakeetEncoder) -> None:
        num_heads = encoder.config.num_attention_heads
        check_plan(encoder, self.plan, num_heads)
        if self.partial is not None and self.partial >= num_heads:
            raise ValueError(f"{self.name}: the layers have {num_heads} heads, no more than {self.partial}")

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        plan, num_heads = self.plan, encoder.config.num_attention_heads
        if self.partial is not None:
            first = num_heads - self.partial
            heads = [None] * first + list(range(first, num_heads))
            reusing = [layer for layer in range(plan.num_layers) if plan.reuses(layer)]
            plan = ReusePlan.from_sources(layer_sources(plan), dict.fromkeys(reusing, heads))
        apply(model, plan)
