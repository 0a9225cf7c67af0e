"""Fewer heads.

    heads-N:        context = concat(head 1 … head N) of the original dimension d; the other heads are removed
    wide-heads-N:   the same width C in N heads of dimension C / N

Cost of fewer heads: that of full attention times N / H (6·T²·N·d FLOPs), with projections of width N·d. Cost of wide
heads: the FLOPs of full attention, with N / H of its softmax and memory.

Michel et al. prune the least important heads of a trained model. Here the first N are kept, which is the same if
training starts from random weights. Wide heads are the opposite of the small heads that Bhojanapalli et al. study.

Papers: https://arxiv.org/abs/1905.10650 (fewer heads), https://arxiv.org/abs/2002.07028 (wide heads)
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._smaller_projections import rows_of_heads, some_inputs, some_outputs
from mapreuse_lab.techniques._technique import Technique, check_plan


class Heads(Technique, notation="heads-{num_heads}[+reuse-{plan}]", label="{num_heads} heads[, reuse {plan}]"):
    """The first `num_heads` heads of every layer remain.

    Attributes:
        num_heads: heads that remain.
        plan: whose map each layer applies; None if layers share none.
    """

    num_heads: int
    plan: ReusePlan | None = None
    source = "Michel, Levy & Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019"

    @property
    def title(self) -> str:
        return super().title if self.num_heads > 1 else super().title.replace("heads", "head", 1)

    def check(self, encoder: ParakeetEncoder) -> None:
        check_plan(encoder, self._plan(encoder), self.num_heads)
        before = encoder.config.num_attention_heads
        if self.num_heads >= before:
            raise ValueError(f"{self.name}: the layers have {before} heads, no more than {self.num_heads}")

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        config = copy.copy(encoder.config)
        config.head_dim = self.head_dim(encoder)
        config.num_attention_heads = config.num_key_value_heads = self.num_heads
        for block in encoder.layers:
            _keep_heads(block.self_attn, config)
        apply(model, self._plan(encoder))

    def head_dim(self, encoder: ParakeetEncoder) -> int:
        """Dimension of the heads that remain."""
        return encoder.layers[0].self_attn.head_dim

    def _plan(self, encoder: ParakeetEncoder) -> ReusePlan:
        return self.plan or ReusePlan.full(len(encoder.layers))


class WideHeads(
    Heads, notation="wide-heads-{num_heads}[+reuse-{plan}]", label="{num_heads} wide heads[, reuse {plan}]"
):
    """The whole width is divided among `num_heads` heads."""

    source = "Bhojanapalli et al., Low-Rank Bottleneck in Multi-head Attention Models, ICML 2020"

    def check(self, encoder: ParakeetEncoder) -> None:
        super().check(encoder)
        before, head_dim = encoder.config.num_attention_heads, encoder.layers[0].self_attn.head_dim
        if before * head_dim % self.num_heads:
            raise ValueError(f"{self.name}: {before} heads of {head_dim} cannot be made {self.num_heads} equal ones")

    def head_dim(self, encoder: ParakeetEncoder) -> int:
        return encoder.config.num_attention_heads * super().head_dim(encoder) // self.num_heads


def _keep_heads(attention: ParakeetEncoderAttention, config: ParakeetEncoderConfig) -> None:
    """Make the heads of `attention` those of `config`, with the first of its weights."""
    rows = rows_of_heads(range(config.num_attention_heads), config.head_dim)
    if len(rows) < attention.q_proj.out_features:
        for name in ("q_proj", "k_proj", "v_proj", "relative_k_proj"):
            setattr(attention, name, some_outputs(getattr(attention, name), rows))
        attention.o_proj = some_inputs(attention.o_proj, rows)
    for name in ("bias_u", "bias_v"):
        bias = getattr(attention, name).detach().flatten()[rows]
        setattr(attention, name, nn.Parameter(bias.view(-1, config.head_dim)))
    attention.config, attention.head_dim, attention.scaling = config, config.head_dim, config.head_dim**-0.5
