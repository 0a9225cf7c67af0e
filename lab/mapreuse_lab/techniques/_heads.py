"""Fewer heads.

    heads-N:        context = concat(head 1 … head N) of the original dimension d; the other heads are removed
    wide-heads-N:   the same width C in N heads of dimension C / N

Cost: of full attention, times N / H (6·T²·N·d FLOPs) and with projections of width N·d; of wide heads, the FLOPs of
full attention, with N / H of its softmax and memory.

Michel et al. prune trained heads by importance; here the first N are kept, which is the same where training starts
from random weights. Wide heads are the other side of Bhojanapalli et al.'s low-rank bottleneck.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._encoder import check_plan, head_rows, some_inputs, some_outputs, untouched_encoder
from mapreuse_lab.techniques._reuse import PLAN, describe, notation
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register


@register("[wide-]heads-N[+reuse-PLAN]", rf"(?P<wide>wide-)?heads-(?P<num_heads>\d+)(\+reuse-{PLAN})?")
@dataclass(frozen=True)
class Heads:
    """Fewer heads in every layer.

    Attributes:
        num_heads: heads that remain.
        wide: they share the whole width, instead of keeping their dimension.
        plan: whose maps layers apply, if they share any.
    """

    num_heads: int
    wide: bool = False
    plan: ReusePlan | None = None
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(num_heads=self.num_heads)

    @property
    def name(self) -> str:
        reuse = "" if self.plan is None else f"+reuse-{notation(self.plan)}"
        return f"{'wide-' if self.wide else ''}heads-{self.num_heads}{reuse}"

    @property
    def title(self) -> str:
        reuse = "" if self.plan is None else f", reuse {describe(self.plan)}"
        return f"{self.num_heads} {'wide ' if self.wide else ''}head{'s' if self.num_heads > 1 else ''}{reuse}"

    @property
    def source(self) -> str:
        if self.wide:
            return "Bhojanapalli et al., Low-Rank Bottleneck in Multi-head Attention Models, ICML 2020"
        return "Michel, Levy & Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        plan = self.plan or ReusePlan.full(len(encoder.layers))
        check_plan(encoder, plan, self.num_heads)
        self._shrink(encoder)
        return apply(model, plan)

    def _shrink(self, encoder: ParakeetEncoder) -> None:
        before = encoder.config.num_attention_heads
        if self.num_heads >= before:
            raise ValueError(f"{self.name}: the layers have {before} heads, no more than {self.num_heads}")
        head_dim = encoder.layers[0].self_attn.head_dim
        if self.wide and before * head_dim % self.num_heads:
            raise ValueError(f"{self.name}: {before} heads of {head_dim} cannot be made {self.num_heads} equal ones")
        config = copy.copy(encoder.config)
        config.num_attention_heads = config.num_key_value_heads = self.num_heads
        config.head_dim = before * head_dim // self.num_heads if self.wide else head_dim
        rows = head_rows(range(self.num_heads), head_dim)
        for block in encoder.layers:
            if not self.wide:
                _keep_rows(block.self_attn, rows)
            _settle(block.self_attn, config)


def _keep_rows(attention: ParakeetEncoderAttention, rows: Tensor) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "relative_k_proj"):
        setattr(attention, name, some_outputs(getattr(attention, name), rows))
    attention.o_proj = some_inputs(attention.o_proj, rows)
    for name in ("bias_u", "bias_v"):
        kept = getattr(attention, name).detach().flatten()[rows]
        setattr(attention, name, nn.Parameter(kept.view(-1, attention.head_dim)))


def _settle(attention: ParakeetEncoderAttention, config: ParakeetEncoderConfig) -> None:
    """Make the module speak of the heads that it has."""
    attention.config = config
    attention.head_dim = config.head_dim
    attention.scaling = config.head_dim**-0.5
    for name in ("bias_u", "bias_v"):
        bias = getattr(attention, name)
        setattr(attention, name, nn.Parameter(bias.detach().reshape(-1, config.head_dim)))
