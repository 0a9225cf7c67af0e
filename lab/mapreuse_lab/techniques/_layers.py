"""Layers dropped: a shallower encoder.

Cost: that of the layers that remain; feed-forward and convolution are saved as well, so this is the yardstick for all
techniques that spare attention alone.

Sajjad et al. drop layers of a trained model and tune the rest; dropping the upper ones is what works best there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._encoder import untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("layers-N", r"layers-(?P<kept>\d+)")
@dataclass(frozen=True)
class Layers:
    """The lower `kept` layers remain, with full attention."""

    kept: int
    source: ClassVar[str] = "Sajjad et al., On the Effect of Dropping Layers, Computer Speech & Language 2023"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(kept=self.kept)

    @property
    def name(self) -> str:
        return f"layers-{self.kept}"

    @property
    def title(self) -> str:
        return f"{self.kept} layer{'s' if self.kept > 1 else ''}"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        if self.kept >= len(encoder.layers):
            raise ValueError(f"{self.name}: the encoder has only {len(encoder.layers)} layers")
        encoder.layers = encoder.layers[: self.kept]
        encoder.config = copy.copy(encoder.config)
        encoder.config.num_hidden_layers = self.kept
        return apply(model, ReusePlan.full(self.kept))
