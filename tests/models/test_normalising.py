"""Forwards that compute their softmax themselves are rewritten, or refused if they do it in an unusual way."""

import pickle

import pytest
import torch
from agreement import PLANS
from altered import rewritten
from families import build
from oracle import defined_output, disagreement
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv

import mapreuse as mr
from mapreuse.models import Unsupported
from mapreuse.models._reading import read_attention


class EagerAttention(LlamaAttention):
    """The usual way to compute attention without an interface."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        key_states = repeat_kv(key_states, self.num_key_value_groups)
        value_states = repeat_kv(value_states, self.num_key_value_groups)
        scores = torch.matmul(query_states, key_states.transpose(-1, -2))
        scores = scores * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = nn.functional.softmax(scores, dim=-1)
        weights = nn.functional.dropout(weights, p=self.attention_dropout, training=self.training)
        context = torch.matmul(weights, value_states)
        context = context.permute(0, 2, 1, 3).flatten(2)
        return self.o_proj(context), weights


PRODUCT = "scores = torch.matmul(query_states, key_states.transpose(-1, -2))"
SCALED = "scores = scores * self.scaling"
SOFTMAX = "weights = nn.functional.softmax(scores, dim=-1)"
CONTEXT = "context = torch.matmul(weights, value_states)"
ADDED = "if attention_mask is not None:\n        scores = scores + attention_mask"
DROPPED = "weights = nn.functional.dropout(weights, p=self.attention_dropout, training=self.training)"
FLAT = """batch, positions, _ = hidden_states.shape
    query_states, key_states = query_states.flatten(0, 1), key_states.flatten(0, 1)
    scores = torch.bmm(query_states, key_states.transpose(1, 2) / 2)
    scores = scores.view(batch, 4, positions, positions) * (2 * self.scaling)
    if attention_mask is not None:
        if attention_mask.dim() != scores.dim():
            raise ValueError(f"expected a mask for scores {scores.shape}")
        scores = scores.view(batch, 4, positions, positions) + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    reshaped = weights.view(batch * 4, positions, positions)
    context = torch.bmm(reshaped, value_states.flatten(0, 1))
    context = context.view(batch, 4, positions, self.head_dim)"""

USUAL = {
    "as it is": (CONTEXT, CONTEXT),
    "in one step": (f"{PRODUCT}\n    {SCALED}", f"{PRODUCT} * self.scaling"),
    "by an operator": (PRODUCT, "scores = query_states @ key_states.mT"),
    "divided, then by a bias, then multiplied": (
        SCALED,
        "scores /= 2\n    scores = torch.ones(4, 1, 1) * scores.dtype.itemsize + scores\n"
        "    scores *= 2 * self.scaling",
    ),
    "with a bias for each head": (
        SCALED,
        f"{SCALED}\n    positions = torch.arange(scores.dtype.itemsize * 0 + hidden_states.shape[1])\n"
        "    scores = scores + torch.arange(4)[:, None, None] * positions / 9",
    ),
    "keys masked by filling": (
        SCALED,
        f"{SCALED}\n    far = torch.ones(hidden_states.shape[1], hidden_states.shape[1]).tril(-3).bool()\n"
        "    scores = scores.masked_fill(far, torch.finfo(scores.dtype).min)",
    ),
    "keys masked by a choice": (
        SCALED,
        f"{SCALED}\n    near = torch.ones(hidden_states.shape[1], hidden_states.shape[1]).triu(-3).bool()\n"
        "    scores = torch.where(near, scores, torch.finfo(scores.dtype).min)",
    ),
    "with heads in the batch": (
        f"{PRODUCT}\n    {SCALED}\n    {ADDED}\n    {SOFTMAX}\n    {DROPPED}\n    {CONTEXT}",
        FLAT,
    ),
}
"""Text of `EagerAttention.forward` and its replacement."""
UNUSUAL = {
    "softmax over queries": (SOFTMAX, SOFTMAX.replace("-1", "-2")),
    "weights that are scaled": (SOFTMAX, f"{SOFTMAX} * 2"),
    "weights that are changed": (CONTEXT, f"weights = weights * self.gate\n    {CONTEXT}"),
    "scores that are squared": (SCALED, "scores = scores * scores"),
    "scores as a denominator": (SCALED, "scores = self.scaling / scores"),
    "scores under a function": (SCALED, "scores = torch.tanh(scores)"),
    "scores that two paths make": (
        *(SCALED, f"if self.training:\n        {SCALED}\n    else:\n        scores = 2 * scores"),
    ),
    "a fill that is not the minimum": (SCALED, "scores = scores.masked_fill(scores.dtype.itemsize > 9, 0.0)"),
    "two products": (CONTEXT, f"{CONTEXT} + torch.matmul(weights, key_states)"),
    "no context": (CONTEXT, "context = value_states"),
}


def eager_llama():
    model, batch = build("llama", implementation="eager")
    for layer in model.layers:
        layer.self_attn.__class__ = EagerAttention
    return model, batch


@pytest.mark.parametrize("plan", ["other heads", "in part", "two sources"])
@pytest.mark.parametrize("change", USUAL)
@torch.no_grad()
def test_a_rewritten_forward_agrees_with_the_definition(monkeypatch, change, plan):
    monkeypatch.setattr(EagerAttention, "forward", rewritten(EagerAttention, *USUAL[change]))
    (eager, batch), (model, _) = eager_llama(), eager_llama()
    reference = defined_output(eager, batch, PLANS[plan])
    output = pickle.loads(pickle.dumps(mr.apply(model, PLANS[plan])))(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4


@pytest.mark.parametrize("change", UNUSUAL)
def test_an_unusual_softmax_is_refused(monkeypatch, change):
    monkeypatch.setattr(EagerAttention, "forward", rewritten(EagerAttention, *UNUSUAL[change]))
    with pytest.raises(Unsupported, match="EagerAttention: its forward does not go through transformers' attention"):
        read_attention(EagerAttention)


@pytest.mark.parametrize("length", [90, 91, 150])
@torch.no_grad()
def test_a_rewritten_forward_agrees_at_lengths_on_both_sides_of_the_switch_of_kernels(length):
    (eager, _), (model, _) = eager_llama(), eager_llama()
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    batch = {"input_ids": torch.randint(3, 50, (2, length)) * mask, "attention_mask": mask}
    reference = defined_output(eager, batch, PLANS["in part"])
    output = mr.apply(model, PLANS["in part"])(**batch).last_hidden_state
    assert disagreement(output, reference, mask.bool()) <= 1e-4
