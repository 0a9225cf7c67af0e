"""Fewer heads.

    heads-N:        context = concat(head 1 … head N) of the original dimension d; the other heads are removed
    wide-heads-N:   the same width C in N heads of dimension C / N

Cost of fewer heads: that of full attention times N / H (6·T²·N·d FLOPs), with projections of width N·d. Cost of wide
heads: the FLOPs of full attention, with N / H of its softmax and memory.

Michel et al. prune the least important heads of a trained model. Of a pretrained model, the heads with the largest
mean ‖context[h] W_o[h]‖² on calibration data are kept in each layer, with heads of keys and values that several heads
share. Of random weights, the first N are kept, which is the same. Wide heads are the opposite of the small heads that
Bhojanapalli et al. study.

Papers: https://arxiv.org/abs/1905.10650 (fewer heads), https://arxiv.org/abs/2002.07028 (wide heads)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.models import apply
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._pretrained import PretrainedStack
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

    def why_not(self, stack: PretrainedStack) -> str:
        heads, group = stack.num_heads, stack.num_heads // stack.layers[0].num_key_heads
        if self.plan is not None:
            return "pruned heads and shared maps are combined from scratch only"
        if self.num_heads >= heads:
            return f"its layers have {heads} heads, no more than {self.num_heads}"
        return f"{group} heads share each head of keys and values" if self.num_heads % group else ""

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        for layer, sizes in zip(stack.layers, _contributions(stack, batches), strict=True):
            group = layer.num_heads // layer.num_key_heads
            kept = sizes.unflatten(0, (-1, group)).sum(1).topk(self.num_heads // group).indices.sort().values.tolist()
            keys = rows_of_heads(kept, layer.head_dim)
            queries = rows_of_heads([one * group + i for one in kept for i in range(group)], layer.head_dim)
            layer.replace("query", some_outputs(layer.projection("query"), queries))
            layer.replace("key", some_outputs(layer.projection("key"), keys))
            layer.replace("value", some_outputs(layer.projection("value"), keys))
            layer.replace("output", some_inputs(layer.projection("output"), queries))
            attention: Any = layer.attention
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads, attention.config.num_key_value_heads = self.num_heads, len(kept)


def _contributions(stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> Float[Tensor, "layers heads"]:
    """Mean ‖context[h] W_o[h]‖² of each head, relative to the layer's other heads."""
    sums = torch.zeros(len(stack.layers), stack.num_heads)
    for batch in batches:
        for layer, rows in zip(stack.layers, stack.recorded(batch), strict=True):
            contexts = rows["context"].unflatten(-1, (layer.num_heads, -1))
            weights = layer.projection("output").weight.detach().unflatten(-1, (layer.num_heads, -1))
            parts = torch.einsum("rhd,ohd->rho", contexts, weights)
            sums[layer.index] += parts.square().sum(-1).mean(0)
    return sums


class WideHeads(
    Heads, notation="wide-heads-{num_heads}[+reuse-{plan}]", label="{num_heads} wide heads[, reuse {plan}]"
):
    """The whole width is divided among `num_heads` heads."""

    source = "Bhojanapalli et al., Low-Rank Bottleneck in Multi-head Attention Models, ICML 2020"
    not_pretrained = "trained heads have no counterpart of another width"

    def why_not(self, stack: PretrainedStack) -> str:
        return self.not_pretrained

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
