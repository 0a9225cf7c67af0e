"""Tiny decoders with a language-model head, and generation by the definition, which keeps no cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import agreement
import torch
import transformers as tf
from oracle import softmax_follows
from torch import Tensor, nn

import mapreuse as mr
from mapreuse.models import find_stack

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SLIDING = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
}
NEW = 8
"""Number of tokens to generate."""

PLANS = {name: agreement.PLANS[name] for name in ("groups of 2", "all from one", "in part")}

PROMPTS = {
    "one text": torch.tensor([[1] * 7]),
    "padded on the left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 7 + [1] * 2]),
    "longer than a window": torch.tensor([[0] * 2 + [1] * 14, [1] * 16]),
}
"""Attention masks of prompts, by name."""


def _text(config: type, model: type, **more: Any) -> Callable[[], nn.Module]:
    settings: dict[str, Any] = SIZE | IDS | {"max_position_embeddings": 40} | more
    return lambda: model(config(**settings))


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _text(tf.LlamaConfig, tf.LlamaForCausalLM, num_key_value_heads=2),
    "qwen2": _text(tf.Qwen2Config, tf.Qwen2ForCausalLM, num_key_value_heads=2),
    "qwen3": _text(tf.Qwen3Config, tf.Qwen3ForCausalLM, num_key_value_heads=2, head_dim=8),
    "mistral": _text(tf.MistralConfig, tf.MistralForCausalLM, num_key_value_heads=2, head_dim=8, sliding_window=6),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=40, **IDS)),
    "mixtral": _text(
        tf.MixtralConfig, tf.MixtralForCausalLM, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "opt": _text(tf.OPTConfig, tf.OPTForCausalLM, ffn_dim=64, word_embed_proj_dim=32),
    "phi": _text(tf.PhiConfig, tf.PhiForCausalLM),
    "gemma": _text(tf.GemmaConfig, tf.GemmaForCausalLM, num_key_value_heads=2, head_dim=8),
    "gpt-neox": _text(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM),
    "phi3": _text(tf.Phi3Config, tf.Phi3ForCausalLM, num_key_value_heads=2),
    "olmo": _text(tf.OlmoConfig, tf.OlmoForCausalLM, clip_qkv=4.0),
    "falcon": _text(tf.FalconConfig, tf.FalconForCausalLM, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": _text(
        tf.FalconConfig, tf.FalconForCausalLM, new_decoder_architecture=False, multi_query=False, alibi=True
    ),
    "gemma2": _text(
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        **_SLIDING,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
    ),
    "gpt-oss": _text(
        tf.GptOssConfig,
        tf.GptOssForCausalLM,
        **_SLIDING,
        num_local_experts=2,
        num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "gemma3": _text(
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        **_SLIDING,
    ),
}


@functools.cache
def original(family: str) -> nn.Module:
    """An eager model with peaked maps. Do not change it."""
    torch.manual_seed(0)
    model = DECODERS[family]()
    model.config._attn_implementation = "eager"  # Falcon has no setter
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.35 if "emb" in name or "wte" in name else 0.45)
            if name.endswith("q_norm.weight"):
                parameter.fill_(4.0)
    agreement.randomize_biases(model)
    model.generation_config.eos_token_id = None  # every text has the same length
    return model.eval()


def converted(family: str, plan: mr.ReusePlan, **settings: Any) -> nn.Module:
    model = copy.deepcopy(original(family))
    if model._supports_sdpa and family != "falcon-alibi":  # its eager attention adds ALiBi twice, unlike its sdpa
        model.config._attn_implementation = "sdpa"
    return mr.apply(model, plan, **settings)


def plan_for(family: str, name: str) -> mr.ReusePlan:
    """A plan by its name. One source for all layers is impossible if layers differ in their windows."""
    if family in ("gemma2", "gemma3", "gpt-oss") and name == "all from one":
        return mr.ReusePlan.parse("1x2,2x1")
    return PLANS[name]


def inputs(mask: Tensor) -> dict[str, Tensor]:
    """Random tokens for an attention mask, always the same."""
    generator = torch.Generator().manual_seed(mask.numel())
    return {"input_ids": torch.randint(3, 50, mask.shape, generator=generator) * mask, "attention_mask": mask}


@functools.cache
@torch.no_grad()
def defined(family: str, plan: mr.ReusePlan, prompt: str) -> tuple[Tensor, Tensor]:
    """Greedy tokens, prompt included, and the logits of each: the whole text runs again for every token."""
    model, batch = original(family), inputs(PROMPTS[prompt])
    return continued(model, plan, **batch)


@torch.no_grad()
def continued(
    model: Any, plan: mr.ReusePlan, input_ids: Tensor, attention_mask: Tensor, **more: Any
) -> tuple[Tensor, Tensor]:
    """`defined` for any prompt."""
    attentions = [layer.attention for layer in find_stack(model).layers]
    logits = []
    for _ in range(NEW):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        with softmax_follows(plan, attentions):
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
            logits.append(model(**batch, use_cache=False, **more).logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], 1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), 1)], 1)
    return input_ids, torch.stack(logits, 1)


def generated(model: Any, batch: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The same by `generate`."""
    output = model.generate(
        **batch,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False} | settings,
    )
    return output.sequences, torch.stack(output.logits, 1)
