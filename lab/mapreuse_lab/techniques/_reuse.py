"""Layers that apply an earlier layer's map: what this library is about.

    context[l, h] = map[source(l, h)] V[l, h]

Cost: a computing layer's is that of full attention, and it stores its map, H·T² numbers, until the last reader; a
reusing layer's is 2·T²·C FLOPs, without query, key and positional projections. Partial reuse (Bhojanapalli et al.
2021) lets some heads of each reusing layer compute their own maps; those cost what they do in full attention.

The papers share maps within groups of equal size, all heads or the same number of heads in every layer; a `ReusePlan`
may be any.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._encoder import check_plan, untouched_encoder
from mapreuse_lab.techniques._technique import Model, register

PLAN = r"(?P<plan>.+?)"
"""Of the patterns of techniques that compose with reuse."""


@register("reuse-PLAN[-partial-K]", rf"reuse-{PLAN}(-partial-(?P<partial>\d+))?")
@dataclass(frozen=True)
class Reuse:
    """Layers share maps as `plan` says.

    Attributes:
        plan: whose map each layer applies, layer by layer unless `partial` is None.
        partial: of every reusing layer, this many heads (the last) reuse, and the others compute; None for all.
    """

    plan: ReusePlan
    partial: int | None = None
    source: ClassVar[str] = "Shim, Choi & Sung, ICLR 2022 and arXiv 2301.12444"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if self.partial is not None and self.plan.num_heads is not None:
            raise ValueError(f"the plan says head by head who reuses, so partial={self.partial} cannot say it too")
        if self.partial == 0:
            raise ValueError("partial must be at least 1 head, got 0; the technique without reuse is 'full'")

    @property
    def name(self) -> str:
        return f"reuse-{notation(self.plan)}" + ("" if self.partial is None else f"-partial-{self.partial}")

    @property
    def title(self) -> str:
        which = "" if self.partial is None else f", {self.partial} heads of each reusing layer"
        return f"reuse {describe(self.plan)}{which}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        num_heads = encoder.config.num_attention_heads
        check_plan(encoder, self.plan, num_heads)
        if self.partial is None:
            return apply(model, self.plan)
        if self.partial >= num_heads:
            raise ValueError(
                f"partial reuse of {self.partial} heads needs more than that, but layers have {num_heads}"
            )
        first = num_heads - self.partial
        heads = {
            layer: [None] * first + list(range(first, num_heads))
            for layer in range(self.plan.num_layers)
            if self.plan.reuses(layer)
        }
        return apply(model, ReusePlan.from_sources(_sources(self.plan), heads))


def notation(plan: ReusePlan) -> str:
    """The shortest text from which `ReusePlan.parse` makes this plan: "2x4", "[0,1,0,1]" or JSON."""
    if plan.num_heads is not None:
        return json.dumps(json.loads(plan.to_json()), separators=(",", ":"))
    sources = _sources(plan)
    if sources != sorted(sources):
        return json.dumps(sources, separators=(",", ":"))
    sizes = [len(list(members)) for _, members in groupby(sources)]
    return ",".join(f"{size}x{len(list(equal))}" for size, equal in groupby(sizes))


def describe(plan: ReusePlan) -> str:
    """The plan as a table shows it."""
    return "head by head" if plan.num_heads is not None else notation(plan)


def _sources(plan: ReusePlan) -> list[int]:
    return [source if isinstance(source, int) else layer for layer, source in enumerate(plan.layers)]
