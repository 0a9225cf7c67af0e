"""WavLM: position biases of the first layer, gated by the queries' hidden states in every layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.maps import Scores, as_index
from mapreuse.models._adapters import register_attention
from mapreuse.models._deriving import Derived
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import make_scores
from mapreuse.models._sharing_classes import ComputingAttention

_OUTPUT = """
def output(self, context, weights, hidden_states, *, position_bias=None, **unused):
    return self.out_proj(context.flatten(2)), weights, position_bias
"""
_VALUES = """
def values(self, hidden_states, **unused):
    return self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
"""


class _WavLMComputing(ComputingAttention):
    """The projections stay whole, so that queries and keys of all heads are there."""

    def forward(
        self, hidden_states: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        batch, positions, _ = hidden_states.shape
        if position_bias is None:
            bias = self.compute_bias(positions, positions)
            position_bias = bias.unsqueeze(0).repeat(batch, 1, 1, 1).flatten(0, 1)
        return *super().forward(hidden_states, *args, position_bias=position_bias, **kwargs), position_bias

    def _project(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        attention_mask: Bool[Tensor, "batch frames"] | None = None,
        position_bias: Float[Tensor, "batch_heads frames frames"] | None = None,
        **kwargs: Any,
    ) -> tuple[Scores, Tensor]:
        assert position_bias is not None
        heads = hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        gates = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1)
        gate_a, gate_b = torch.sigmoid(gates).chunk(2, dim=-1)
        gate = gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0
        bias = gate * position_bias.unflatten(0, (-1, self.num_heads))
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
        query, key = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj)
        )
        query = query[:, as_index(self._layout.queries)]
        scores = make_scores(self, query, key, bias, self.head_dim**-0.5, is_causal=False)
        return scores, self._values(hidden_states)


@register_attention("WavLMAttention", "ce293cd611e7")
def _wavlm(module: nn.Module) -> AttentionForm:
    kept = frozenset({"v_proj", "out_proj"})
    values = frozenset({"v_proj"})
    derived = Derived(type(module), _VALUES, _OUTPUT, ("position_bias",), kept, values, values, direct=True)
    return AttentionForm(
        query=("q_proj", "gru_rel_pos_linear", "gru_rel_pos_const"),
        key=("k_proj", "rel_attn_embed"),
        value="v_proj",
        output=("out_proj",),
        dropout="dropout",
        computing=_WavLMComputing,
        derived=derived,
    )
