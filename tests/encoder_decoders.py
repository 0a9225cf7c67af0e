"""Tiny encoder–decoders, plans for their attentions, and generation by the definition, which keeps no cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import agreement
import torch
import transformers as tf
from agreement import PLANS
from decoders import IDS
from oracle import softmax_follows
from torch import Tensor, nn

import mapreuse as mr
from mapreuse.models import find_stack

SIZES = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
SHARED: dict[str, dict[str, mr.ReusePlan]] = {
    "self": {"self": PLANS["in part"]},
    "cross": {"cross": PLANS["groups of 2"]},
    "cross, other heads": {"cross": PLANS["other heads"]},
    "all": {"encoder": PLANS["groups of 2"], "self": PLANS["groups of 2"], "cross": PLANS["all from one"]},
}
"""Plans for the self-attention of the encoder, and for the self-attention and the cross-attention of the decoder."""

NEW = 6
"""Number of tokens to generate."""

Built = tuple[Any, dict[str, Tensor]]


def _tokens() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": mask}


def _text(config: type, model: type, **more: Any) -> Built:
    return model(config(**SIZES, **HEADS, **IDS, max_position_embeddings=40, **more)), _tokens()


def _whisper() -> Built:
    suppress: dict[str, Any] = {"suppress_tokens": [], "begin_suppress_tokens": []}
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    config = tf.WhisperConfig(**SIZES, **HEADS, **IDS, **lengths, **suppress)
    return tf.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 40)}


def _t5(config: type, model: type) -> Built:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
    return model(config(**sizes, decoder_start_token_id=1, **IDS)), _tokens()


def _moonshine() -> Built:
    """Heads of width 8 are padded to 12. The second recording is shorter."""
    config = tf.MoonshineConfig(
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=4,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=40,
        pad_head_dim_to_multiple_of=6,
        decoder_start_token_id=1,
        **IDS,
    )
    mask = torch.tensor([[1] * 6400, [1] * 3000 + [0] * 3400])
    batch = {"input_values": torch.randn(2, 6400) * mask, "attention_mask": mask}
    return tf.MoonshineForConditionalGeneration(config), batch


FAMILIES: dict[str, Callable[[], Built]] = {
    "whisper": _whisper,
    "bart": lambda: _text(tf.BartConfig, tf.BartForConditionalGeneration, forced_eos_token_id=None),
    "t5": lambda: _t5(tf.T5Config, tf.T5ForConditionalGeneration),
    "moonshine": _moonshine,
}
"""Families that differ in their attention."""

ALIKE: dict[str, Callable[[], Built]] = {
    "mbart": lambda: _text(tf.MBartConfig, tf.MBartForConditionalGeneration, forced_eos_token_id=None),
    "marian": lambda: _text(tf.MarianConfig, tf.MarianMTModel, forced_eos_token_id=None),
    "pegasus": lambda: _text(tf.PegasusConfig, tf.PegasusForConditionalGeneration, forced_eos_token_id=None),
    "m2m_100": lambda: _text(tf.M2M100Config, tf.M2M100ForConditionalGeneration),
    "mt5": lambda: _t5(tf.MT5Config, tf.MT5ForConditionalGeneration),
    "umt5": lambda: _t5(tf.UMT5Config, tf.UMT5ForConditionalGeneration),
}
"""Families whose attention is like that of one of `FAMILIES`."""


@functools.cache
@torch.no_grad()
def original(family: str) -> Built:
    """An eager model with peaked maps, and a batch. Do not change them."""
    torch.manual_seed(0)
    model, batch = (FAMILIES | ALIKE)[family]()
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.45)
    agreement.randomize_biases(model)
    model.generation_config.eos_token_id = None
    return model.eval(), batch


def converted(family: str, plans: dict[str, mr.ReusePlan]) -> Any:
    model = copy.deepcopy(original(family)[0])
    model.set_attn_implementation("sdpa")
    for attention, plan in plans.items():
        if attention == "encoder":
            mr.apply(model.get_encoder(), plan)
        else:
            mr.apply(model.get_decoder(), plan, attention=attention)
    return model


@contextmanager
def following(model: Any, plans: dict[str, mr.ReusePlan]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, an untouched eager model follows the plans. Yields its maps in effect, layer by layer."""
    with ExitStack() as stack:
        maps = {}
        for attention, plan in plans.items():
            part = model.get_encoder() if attention == "encoder" else model.get_decoder()
            layers = find_stack(part, "cross" if attention == "cross" else "self").layers
            maps[attention] = stack.enter_context(softmax_follows(plan, [layer.attention for layer in layers]))
        yield maps


@torch.no_grad()
def defined(family: str, plans: dict[str, mr.ReusePlan]) -> tuple[Tensor, Tensor]:
    """Greedy tokens and their logits of the original with its softmax replaced, which keeps no cache."""
    model, batch = original(family)
    tokens, logits = torch.full((2, 1), 1), []
    for _ in range(NEW):
        with following(model, plans):
            logits.append(model(**batch, decoder_input_ids=tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(logits, 1)


def generated(model: Any, batch: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The same by `generate`."""
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    output = model.generate(**batch, return_dict_in_generate=True, output_logits=True, **settings)
    return output.sequences[:, -NEW:], torch.stack(output.logits, 1)


def decoder_batches(family: str, number: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random inputs of the decoder, padded on the right, with random states of an encoder, also padded."""
    torch.manual_seed(seed)
    mask = torch.tensor([[1] * 9, [1] * 9, [1] * 6 + [0] * 3])
    of_states = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    return [
        {
            "input_ids": torch.randint(3, 50, (3, 9)) * mask,
            "attention_mask": mask,
            "encoder_hidden_states": torch.randn(3, 7, 32),
            **({} if family == "whisper" else {"encoder_attention_mask": of_states}),
        }
        for _ in range(number)
    ]
