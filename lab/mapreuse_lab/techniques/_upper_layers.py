"""The upper layers dropped, or left without attention.

    layers-N:    the lower N layers remain
    skip-N:      y = x instead of y = x + attention(norm(x)) in the upper N layers

Cost: that of the layers that remain; none in skipped layers. Dropping layers also saves feed-forward and convolution,
which skipped layers keep. It is the baseline for all techniques that compress attention alone.

Sajjad et al. drop layers of a trained model and fine-tune the rest; dropping the upper ones works best there. Zhang
et al. replace the attention of a Transformer's upper layers by feed-forward layers. A Conformer's layers already have
two of those, so attention and its norm are removed.

Of a pretrained model, calibration data choose the layers: those whose outputs differ least from their inputs are
dropped (1 − cosine similarity, Men et al.), and those whose attention adds least, relative to the layer's input, lose
it (after He et al.).

Papers: https://arxiv.org/abs/2004.03844 (dropped), https://arxiv.org/abs/2011.04906 (skipped),
https://arxiv.org/abs/2403.03853, https://arxiv.org/abs/2406.15786 (the choice)
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetEncoder

import mapreuse as mr
from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._pretrained import AttentionInputs, PretrainedStack
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

    def why_not(self, stack: PretrainedStack) -> str:
        return "" if self.kept < len(stack.layers) else f"it has only {len(stack.layers)} layers"

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        influence = stack.means(batches, _influence)
        mr.drop_layers(stack.module, influence.argsort()[: len(stack.layers) - self.kept].tolist())


def _influence(rows: dict[str, Tensor]) -> Tensor:
    """How much a layer changes its input: 1 − mean cosine similarity of both."""
    return 1 - functional.cosine_similarity(rows["input"], rows["states"], dim=-1).mean()


def _added(rows: dict[str, Tensor]) -> Tensor:
    """Size of what attention adds, relative to the layer's input."""
    return rows["attention"].square().sum() / rows["input"].square().sum()


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

    @property
    def pretrained_title(self) -> str:
        return f"no attention in {self.skipped} layers"

    def why_not(self, stack: PretrainedStack) -> str:
        return "" if self.skipped <= len(stack.layers) else f"it has only {len(stack.layers)} layers"

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        chosen = stack.means(batches, _added).argsort()[: self.skipped].tolist()
        stack.use_interface()
        for index in chosen:
            stack.layers[index].use(self.core(self, stack.layers[index]))
            stack.layers[index].remove("query", "key", "value", "output")

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """The zeros that stand in the place of values."""
        return inputs.values
