"""Nothing compressed: the baseline.

    context = softmax(((Q + u) Kᵀ + shift((Q + v) Rᵀ)) / √d) V

with Q, K, V (H, T, d), encodings of all distances R (H, 2T − 1, d), and shift(P)[i, j] = P[i, T − 1 − i + j].

Cost: 6·T²·C FLOPs (content scores, positional scores, map × values, 2 each), in blocks of rows, so that each meets
little more than the T distances it needs and no T × T tensor is stored; and 2·(2T − 1)·C² to project the distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._encoder import untouched_encoder
from mapreuse_lab.techniques._technique import Model, register


@register("full", r"full")
@dataclass(frozen=True)
class Full:
    """Every layer computes a map of every pair of frames, by the exact blocked core that reuse builds on."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full attention"
    source: ClassVar[str] = "Dai et al., Transformer-XL, ACL 2019; Gulati et al., Conformer, Interspeech 2020"
    positions: ClassVar[str] = "kept"

    def apply(self, model: Model) -> Model:
        return apply(model, ReusePlan.full(len(untouched_encoder(model).layers)))
