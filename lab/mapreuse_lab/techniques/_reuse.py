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

import copy

from torch import Tensor, nn
from transformers import ParakeetEncoder

import mapreuse as mr
from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._notation import layer_sources, plan_notation
from mapreuse_lab.techniques._pretrained import PretrainedStack
from mapreuse_lab.techniques._technique import Technique, check_plan, wrong_depth


class Full(Technique, notation="full", label="full attention"):
    """Every layer computes a map of every pair of frames, by the kernel that reuse builds on."""

    source = "Dai et al., Transformer-XL, ACL 2019; Gulati et al., Conformer, Interspeech 2020"

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        apply(model, ReusePlan.full(len(encoder.layers)))

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        """The model stays as it is, with the attention of transformers."""


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
        apply(model, self._by_heads(encoder.config.num_attention_heads))

    def why_not(self, stack: PretrainedStack) -> str:
        if self.partial is not None and self.partial >= stack.num_heads:
            return f"its layers have {stack.num_heads} heads, no more than {self.partial}"
        return wrong_depth(self.plan, stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        """Share maps, with heads aligned and projections refitted on calibration data."""
        share_maps(stack, self._by_heads(stack.num_heads), batches)

    def _by_heads(self, num_heads: int) -> ReusePlan:
        """The plan, in which only the last `partial` heads of each reusing layer reuse."""
        if self.partial is None:
            return self.plan
        first = num_heads - self.partial
        heads = [None] * first + list(range(first, num_heads))
        reusing = [layer for layer in range(self.plan.num_layers) if self.plan.reuses(layer)]
        return ReusePlan.from_sources(layer_sources(self.plan), dict.fromkeys(reusing, heads))


def share_maps(stack: PretrainedStack, plan: ReusePlan, batches: list[dict[str, Tensor]]) -> None:
    """Apply a plan in place: whole layers with their heads aligned, then value and output projections refitted."""
    original = copy.deepcopy(stack.module)
    mr.apply(stack.module, mr.align(original, plan, batches) if plan.num_heads is None else plan)
    mr.refit(stack.module, original, batches)


class SharedKeys(
    Technique,
    notation="keys-{keys}-window-{window}+reuse-{plan}",
    label="{keys} shared keys, window {window}, reuse {plan}",
    from_scratch=False,
):
    """Source layers publish which keys matter; the others attend to those, the nearest, and the first.

    Attributes:
        keys: number of keys for each block of queries.
        window: a reusing layer also attends to the keys less than `window` positions away.
        plan: whose keys each layer reads.
    """

    keys: int
    window: int
    plan: ReusePlan
    source = "share mode keys of mapreuse, after Kascade and TidalDecode (arXiv 2410.05076)"

    def why_not(self, stack: PretrainedStack) -> str:
        return wrong_depth(self.plan, stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        plan = ReusePlan.parse(plan_notation(self.plan), share="keys", keys=self.keys, window=self.window)
        mr.apply(stack.module, plan)


class CorrectedMaps(
    Technique,
    notation="corrected-{rank}+reuse-{plan}",
    label="reuse {plan}, corrected by rank {rank}",
    minimum=2,
    from_scratch=False,
):
    """Reusing layers add products of `rank` numbers per head to the scores of their source.

    Attributes:
        rank: width of the queries and keys that a reusing layer adds.
        plan: whose scores each layer applies, layer by layer.
    """

    rank: int
    plan: ReusePlan
    source = "share mode corrected of mapreuse, after LiSA (arXiv 2408.01890)"

    def why_not(self, stack: PretrainedStack) -> str:
        return wrong_depth(self.plan, stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        share_maps(stack, ReusePlan.parse(plan_notation(self.plan), share="corrected", rank=self.rank), batches)
