"""Attention skipped in the upper layers: feed-forward and convolution remain.

    y = x + 0,    in the place of    y = x + attention(norm(x))

Cost: nothing in the skipped layers, full attention's in the others.

Zhang et al. replace the attention of a Transformer's upper layers by feed-forward layers; a Conformer's layers have
two of those already, so the sublayer goes, its norm with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._encoder import replace_attention, untouched_encoder
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("skip-N", r"skip-(?P<skipped>\d+)")
@dataclass(frozen=True)
class Skipped:
    """The upper `skipped` layers have no attention."""

    skipped: int
    source: ClassVar[str] = "Zhang et al., On the Usefulness of Self-Attention for ASR with Transformers, SLT 2021"
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(skipped=self.skipped)

    @property
    def name(self) -> str:
        return f"skip-{self.skipped}"

    @property
    def title(self) -> str:
        return f"no attention in the upper {self.skipped} layers"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        first = len(encoder.layers) - self.skipped
        if first < 0:
            raise ValueError(f"{self.name}: the encoder has only {len(encoder.layers)} layers")
        apply(model, ReusePlan.full(len(encoder.layers)))
        replace_attention(encoder, self.name, lambda *_: NoAttention(), start=first)
        for block in encoder.layers[first:]:
            block.norm_self_att = nn.Identity()
        return model


class NoAttention(nn.Module):
    """Adds nothing to the layer's input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None
