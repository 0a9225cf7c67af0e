"""The upper layers dropped, or left without attention.

    layers-N:    the lower N layers remain
    skip-N:      y = x instead of y = x + attention(norm(x)) in the upper N layers

Cost: that of the layers that remain; none in skipped layers. Dropping layers also saves feed-forward and convolution,
which skipped layers keep. It is the baseline for all techniques that compress attention alone.

Sajjad et al. drop layers of a trained model and fine-tune the rest; dropping the upper ones works best there. Zhang
et al. replace the attention of a Transformer's upper layers by feed-forward layers. A Conformer's layers already have
two of those, so attention and its norm are removed.

Papers: https://arxiv.org/abs/2004.03844 (dropped), https://arxiv.org/abs/2011.04906 (skipped)
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import ParakeetEncoder

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._technique import Technique


class Layers(Technique, notation="layers-{kept}", label="{kept} layers"):
    """The lower `kept` layers remain, with full attention."""

    kept: int
    source = "Sajjad et al., On the Effect of Dropping Layers, Computer Speech & Language 2023"

    @property
    def title(self) -> str:
        return super().title if self.kept > 1 else "1 layer"

    def check(self, encoder: ParakeetEncoder) -> None:
        if self.kept >= len(encoder.layers):
            raise ValueError(f"{self.name}: the encoder has only {len(encoder.layers)} layers")

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        encoder.layers = encoder.layers[: self.kept]
        encoder.config = copy.copy(encoder.config)
        encoder.config.num_hidden_layers = self.kept
        apply(model, ReusePlan.full(self.kept))


class NoAttention(nn.Module):
    """Adds nothing to the layer's input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class Skipped(Technique, notation="skip-{skipped}", label="no attention in the upper {skipped} layers"):
    """The upper `skipped` layers have no attention."""

    skipped: int
    source = "Zhang et al., On the Usefulness of Self-Attention for ASR with Transformers, SLT 2021"

    def check(self, encoder: ParakeetEncoder) -> None:
        if self.skipped > len(encoder.layers):
            raise ValueError(f"{self.name}: the encoder has only {len(encoder.layers)} layers")

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        apply(model, ReusePlan.full(len(encoder.layers)))
        for block in encoder.layers[len(encoder.layers) - self.skipped :]:
            block.self_attn, block.norm_self_att = NoAttention(), nn.Identity()
