"""Attention modules whose forward was changed in one place each: a reader must notice, or get it right."""

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
    """The pattern, written anew."""

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


ALTERATIONS = {
    "values scaled": (
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "value_states = 2 * self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "values are computed as",
    ),
    "values negated": (
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "value_states = -self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "values are computed as",
    ),
    "values scaled in place": (
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings\n    value_states *= 2",
        "values are computed as <value_states, after value_states \\*= 2>",
    ),
    "values clamped in place": (
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings\n    value_states.clamp_(-1, 1)",
        "values are computed as",
    ),
    "values replaced under a condition": (
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings\n    if self.training:\n        value_states = value_states * 2",
        "values are computed as",
    ),
    "every second value": (
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)[:, ::2]",
        "values are computed as",
    ),
    "heads interleaved": (
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "value_states = self.v_proj(hidden_states).view(*input_shape, self.head_dim, -1).transpose(1, 2)",
        "values are computed as",
    ),
    "other axes swapped": (
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 3)",
        "values are computed as",
    ),
    "values of another tensor": (
        "value_states = self.v_proj(hidden_states)",
        "value_states = self.v_proj(position_embeddings[0])",
        "values are computed as",
    ),
    "hidden states normed first": (
        "input_shape = hidden_states.shape[:-1]",
        "input_shape = hidden_states.shape[:-1]\n    hidden_states = self.norm(hidden_states)",
        "values are computed as self.v_proj\\(self.norm\\(hidden_states\\)\\)",
    ),
    "values from the key projection": (
        "self.v_proj(hidden_states)",
        "self.k_proj(hidden_states)",
        "k_proj projects queries or keys together with values",
    ),
    "values from two projections": (
        "self.v_proj(hidden_states).view",
        "(self.v_proj(hidden_states) + self.k_proj(hidden_states)).view",
        "values are computed as",
    ),
    "a loop before attention": (
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings\n    for _ in range(2):\n        query_states = query_states * 2",
        "unexpected step before attention: for _ in range",
    ),
    "an early return": (
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings\n    if self.training:\n        return hidden_states, None",
        "unexpected step before attention: return",
    ),
    "attention under a condition": (
        "attn_output, attn_weights = attention_interface(",
        "if self.training:\n     attn_output, attn_weights = attention_interface(",
        "does not always call attention_interface",
    ),
    "attention twice": (
        "attn_output = attn_output.reshape",
        "attn_output, _ = attention_interface(self, query_states, key_states, value_states, None, **kwargs)\n"
        "    attn_output = attn_output.reshape",
        "calls attention_interface 2 times",
    ),
    "another interface": (
        "self.config._attn_implementation",
        "self.implementation",
        "not chosen by self.config._attn_implementation",
    ),
    "an argument that changes the map": (
        "scaling=self.scaling,",
        "scaling=self.scaling, s_aux=self.sinks,",
        "its attention takes s_aux",
    ),
    "the output gated": (
        "attn_output = self.o_proj(attn_output)",
        "attn_output = self.o_proj(attn_output) * self.gate",
        "unexpected step after attention",
    ),
    "the output normed under a condition": (
        "attn_output = self.o_proj(attn_output)",
        "if self.training:\n        attn_output = self.norm(attn_output)\n    attn_output = self.o_proj(attn_output)",
        "a step after attention is conditional",
    ),
    "the output projected with an extra argument": (
        "self.o_proj(attn_output)",
        "self.o_proj(attn_output, scale=2)",
        "unexpected step after attention",
    ),
    "values of a grid": (
        "input_shape = hidden_states.shape[:-1]",
        "batch, height, width, _ = hidden_states.shape\n    input_shape = hidden_states.shape[:-1]",
        r"its hidden states have 4 dimensions, expected 3: \(batch, positions, width\)",
    ),
    "an interface that other names do not reach": (
        "ALL_ATTENTION_FUNCTIONS.get_interface(\n        self",
        "getattr(\n        ALL_ATTENTION_FUNCTIONS, self",
        "is not chosen by self.config._attn_implementation from ALL_ATTENTION_FUNCTIONS",
    ),
    "the output under another name, and the old one returned": (
        "attn_output = self.o_proj(attn_output)",
        "projected = self.o_proj(attn_output)",
        "unexpected step after attention: attn_output",
    ),
    "the weights projected": (
        "attn_output = self.o_proj(attn_output)",
        "attn_weights = self.o_proj(attn_output)",
        "unexpected step after attention: attn_weights = ",
    ),
    "a projection after dropout of the output": (
        "attn_output = self.o_proj(attn_output)",
        "attn_output = nn.functional.dropout(attn_output, p=self.dropout, training=self.training)\n"
        "    attn_output = self.o_proj(attn_output)",
        "unexpected step after dropout of the output",
    ),
    "dropout of the output that is not for training alone": (
        "attn_output = self.o_proj(attn_output)",
        "attn_output = self.o_proj(attn_output)\n"
        "    attn_output = nn.functional.dropout(attn_output, p=self.dropout)",
        "unexpected step after attention",
    ),
    "a shape that is not only a shape": (
        "attn_output = self.o_proj(attn_output)",
        "scale = attn_output.size() + self.norm(attn_output)\n    attn_output = self.o_proj(attn_output)",
        "unexpected step after attention",
    ),
    "values not handed over": (
        "value_states, attention_mask,",
        "attention_mask=attention_mask,",
        "attention_interface is called without value",
    ),
    "values not split into heads": (
        "self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "self.v_proj(hidden_states).transpose(1, 2)",
        "values are computed as",
    ),
    "values of an unknown shape": (
        "self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        "self.v_proj(hidden_states).view(position_embeddings).transpose(1, 2)",
        "values are computed as",
    ),
    "context and weights in one": (
        "attn_output, attn_weights = attention_interface(",
        "attn_output = attention_interface(",
        "attention_interface is not unpacked into context and weights",
    ),
    "no return": ("    return attn_output, attn_weights\n", "", "it returns nothing after attention"),
    "three things returned": (
        "return attn_output, attn_weights",
        "return attn_output, attn_weights, None",
        "it returns",
    ),
    "nothing returned": ("return attn_output, attn_weights", "pass", "unexpected step after attention: pass"),
}
"""What to replace in `FaithfulAttention.forward`, by what, and what the refusal says."""


def rewritten(cls: type, old: str, new: str) -> Callable:
    """The forward of a class with one piece of its source replaced; `inspect` can read the result."""
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
