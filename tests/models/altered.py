"""Attention modules with a forward that differs from the usual pattern in one place."""

from __future__ import annotations

import inspect
import linecache
import textwrap
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention


class FaithfulAttention(LlamaAttention):
    """The usual pattern."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self, query_states, key_states, value_states, attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


VALUES = "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
ROTARY = "cos, sin = position_embeddings"
OUTPUT = "attn_output = self.o_proj(attn_output)"
RETURN = "return attn_output, attn_weights"
CALL = "attn_output, attn_weights = attention_interface("

ALTERATIONS = {
    "values of an unknown shape": (
        *(VALUES, VALUES.replace("hidden_shape", "attention_mask")),
        "its values depend on attention_mask",
    ),
    "values that depend on keys and values together": (
        *(ROTARY, f"{ROTARY}\n    key_states, value_states = key_states + cos, cos * value_states"),
        "its values depend on position_embeddings",
    ),
    "an output that depends on a mask made before": (
        *(OUTPUT, f"{OUTPUT} * __debug_mask__"),
        "its output depends on __debug_mask__",
    ),
    "values of a grid": (
        "input_shape = hidden_states",
        "batch, height, width, _ = hidden_states.shape\n    input_shape = hidden_states",
        r"its hidden states have 4 dimensions, expected 3: \(batch, positions, width\)",
    ),
    "no values": (
        *("value_states, attention_mask,", "attention_mask=attention_mask,"),
        "attention_interface is called without value",
    ),
    "a loop before attention": (
        *(ROTARY, f"{ROTARY}\n    for _ in range(2):\n        query_states = query_states * 2"),
        "unexpected step before attention: for _ in range",
    ),
    "an early return": (
        *(ROTARY, f"{ROTARY}\n    if self.training:\n        return hidden_states, None"),
        "unexpected step before attention: return",
    ),
    "attention under a condition": (
        *(CALL, f"if self.training:\n     {CALL}"),
        "does not always call attention_interface",
    ),
    "attention twice": (
        "attn_output = attn_output.reshape",
        "attn_output, _ = attention_interface(self, query_states, key_states, value_states, None, **kwargs)\n"
        "    attn_output = attn_output.reshape",
        "calls attention_interface 2 times",
    ),
    "another interface": (
        *("self.config._attn_implementation", "self.implementation"),
        "not chosen by self.config._attn_implementation",
    ),
    "an argument that changes the map": (
        *("scaling=self.scaling,", "scaling=self.scaling, indices=self.indices,"),
        "its attention takes indices",
    ),
    "context and weights in one": (
        *(CALL, "attn_output = attention_interface("),
        "attention_interface is not unpacked into context and weights",
    ),
    "no return": (f"    {RETURN}\n", "", "it returns nothing after attention"),
    "an unknown statement": (RETURN, "pass", "it returns nothing after attention"),
}
"""Text of `FaithfulAttention.forward`, its replacement, and the message of the refusal."""

SERVED = {
    "values scaled": (VALUES, VALUES.replace("= ", "= 2 * ")),
    "values scaled in place": (ROTARY, f"{ROTARY}\n    value_states *= 2"),
    "values clamped in place": (ROTARY, f"{ROTARY}\n    value_states.clamp_(min=-0.5, max=0.5)"),
    "values scaled under a condition": (
        *(ROTARY, f"{ROTARY}\n    if not self.training:\n        value_states = value_states * 2"),
    ),
    "values of scaled hidden states": (
        *("input_shape = hidden_states", "hidden_states = 2 * hidden_states\n    input_shape = hidden_states"),
    ),
    "values from the key projection": ("self.v_proj(hidden_states)", "self.k_proj(hidden_states)"),
    "values in another order of rows": (VALUES, VALUES.replace("hidden_states)", "hidden_states).flip(-1)")),
    "values from two projections": (
        *("self.v_proj(hidden_states).view", "(self.v_proj(hidden_states) + self.k_proj(hidden_states)).view"),
    ),
    "a gated output": (OUTPUT, f"{OUTPUT} * torch.sigmoid(self.q_proj(hidden_states))"),
    "an output scaled under a condition": (
        *(OUTPUT, f"if not self.training:\n        attn_output = attn_output * 2\n    {OUTPUT}"),
    ),
    "a context of heads that are scaled": (
        "attn_output = attn_output.reshape",
        "attn_output = attn_output * torch.arange(1, 5)[:, None]\n    attn_output = attn_output.reshape",
    ),
    "an unused shape": (OUTPUT, f"scale = attn_output.size() + self.k_proj(attn_output).size()\n    {OUTPUT}"),
    "an output without its projection": (OUTPUT, OUTPUT.replace("attn_output =", "projected =")),
}
"""Text of `FaithfulAttention.forward` and its replacement: a reusing layer runs what remains of the forward."""


def rewritten(cls: type, old: str, new: str) -> Callable:
    """The forward of a class with a part of its source replaced; `inspect` finds the new source."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    source = source[source.index("def forward") :]
    assert source.count(old) >= 1, source
    changed = source.replace(old, new)
    filename = f"<{cls.__name__} with {new!r} for {old!r}>"
    linecache.cache[filename] = (len(changed), None, changed.splitlines(keepends=True), filename)
    namespace = dict(vars(inspect.getmodule(cls)))
    exec(compile(changed, filename, "exec"), namespace)
    return namespace["forward"]


class AlteredParakeetAttention(ParakeetEncoderAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return super().forward(hidden_states, 2 * position_embeddings, attention_mask, **kwargs)


class AlteredModernBertAttention(ModernBertAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return super().forward(2 * hidden_states, position_embeddings, attention_mask, **kwargs)


class NoSource(nn.Module):
    forward = torch.sum
