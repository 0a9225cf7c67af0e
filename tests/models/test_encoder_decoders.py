"""Decoders of encoder–decoders share the maps of self-attention, of cross-attention, or of both, and generate."""

import copy
import functools
import string
from contextlib import ExitStack

import agreement
import numpy as np
import pytest
import torch
import transformers as tf
from agreement import PLANS
from decoders import IDS
from oracle import softmax_follows
from torch import nn

import mapreuse as mr
from mapreuse.models import find_stack

SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
GROUPS, OTHER_HEADS, IN_PART = PLANS["groups of 2"], PLANS["other heads"], PLANS["in part"]
SHARED = {
    "self": {"self": IN_PART},
    "cross": {"cross": GROUPS},
    "cross, other heads": {"cross": OTHER_HEADS},
    "both": {"self": GROUPS, "cross": PLANS["all from one"]},
}
NEW = 6


def _whisper():
    suppress = {"suppress_tokens": [], "begin_suppress_tokens": []}
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    config = tf.WhisperConfig(**SIZES, **HEADS, **IDS, **lengths, **suppress)
    return tf.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 40)}


def _bart():
    config = tf.BartConfig(**SIZES, **HEADS, **IDS, max_position_embeddings=40, forced_eos_token_id=None)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return tf.BartForConditionalGeneration(config), {
        "input_ids": torch.randint(3, 50, (2, 9)),
        "attention_mask": mask,
    }


@functools.cache
@torch.no_grad()
def original(family):
    torch.manual_seed(0)
    model, batch = {"whisper": _whisper, "bart": _bart}[family]()
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.45)
    agreement.randomize_biases(model)
    model.generation_config.eos_token_id = None
    return model.eval(), batch


def converted(family, plans):
    model = copy.deepcopy(original(family)[0])
    model.set_attn_implementation("sdpa")
    for attention, plan in plans.items():
        mr.apply(model.get_decoder(), plan, attention=attention)
    return model


@torch.no_grad()
def defined(family, plans):
    """Greedy tokens and their logits of the original with its softmax replaced, which keeps no cache."""
    model, batch = original(family)
    tokens, logits = torch.full((2, 1), 1), []
    for _ in range(NEW):
        with ExitStack() as stack:
            for attention, plan in plans.items():
                layers = find_stack(model.get_decoder(), attention).layers
                stack.enter_context(softmax_follows(plan, [layer.attention for layer in layers]))
            logits.append(model(**batch, decoder_input_ids=tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(logits, 1)


def generated(model, batch, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    output = model.generate(**batch, return_dict_in_generate=True, output_logits=True, **settings)
    logits = torch.stack(output.logits, 1)
    return output.sequences[:, -NEW:], logits


@pytest.mark.sample(3)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_an_encoder_decoder_generates_what_the_definition_does(family, shared, cache):
    plans = SHARED[shared]
    tokens, logits = defined(family, plans)
    untouched = defined(family, {})[1]
    assert (logits[:, 0] - untouched[:, 0]).abs().max() > 0.03 * untouched.abs().max() or "self" in plans
    more = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    found, of_model = generated(converted(family, plans), original(family)[1], **more)
    assert torch.equal(found, tokens[:, 1:])
    assert (of_model - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_beams_reorder_both_parts_of_the_cache(family):
    model, batch = converted(family, SHARED["both"]), original(family)[1]
    settings = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, use_cache=False, **settings))


@torch.no_grad()
def test_a_reusing_cross_attention_stores_the_values_of_the_encoder_only():
    model, batch = converted("bart", {"cross": GROUPS}), original("bart")[1]
    cache = model(**batch, decoder_input_ids=torch.tensor([[1], [1]]), use_cache=True).past_key_values
    layers = cache.cross_attention_cache.layers
    assert [(layer.keys.numel(), layer.values.numel()) for layer in layers] == [(576, 576), (576, 0)] * 2
    with pytest.raises(
        ValueError, match="BartDecoder: the cache was filled under another plan; start with a new cache"
    ):
        converted("bart", {"cross": OTHER_HEADS})(
            **batch, decoder_input_ids=torch.tensor([[1], [1]]), past_key_values=cache
        )


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_plans_of_both_attentions_are_saved(tmp_path, family):
    model, batch = converted(family, SHARED["both"]), original(family)[1]
    model.save_pretrained(tmp_path)
    for opened in (type(model).from_pretrained(tmp_path), mr.load(tmp_path)):
        decoder = opened.get_decoder()
        assert mr.plan_of(decoder) == GROUPS
        assert mr.plan_of(decoder, "cross") == PLANS["all from one"]
        assert torch.equal(generated(opened, batch)[0], generated(model, batch)[0])


def test_what_cross_attention_cannot_share_is_refused_on_one_line():
    model = converted("bart", {})
    for part, plan, attention, problem in (
        (model, IN_PART, "cross", "layer 1: in cross-attention, the heads of a layer must all compute or all reuse"),
        (model.get_encoder(), GROUPS, "cross", "holds no list of layers with cross-attention in every layer"),
        (model, GROUPS, "both", "attention must be 'self' or 'cross', got 'both'"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            mr.apply(part, plan, attention=attention)
        assert "\n" not in str(error.value)
    mr.apply(model, GROUPS, attention="cross")
    with pytest.raises(ValueError, match="shares attention maps already"):
        mr.apply(model, GROUPS, attention="cross")


def test_the_pipeline_for_speech_recognition_runs_with_a_shared_decoder():
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    letters = {letter: number for number, letter in enumerate(string.ascii_letters[:47])}
    vocabulary = letters | {special: 47 + number for number, special in enumerate(specials)}
    made, model = tf.WhisperTokenizer(vocab=vocabulary, merges=[]), converted("whisper", SHARED["both"])
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400, n_fft=400)
    run = tf.pipeline(
        "automatic-speech-recognition", model=model, tokenizer=made, feature_extractor=extractor, ignore_warning=True
    )
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    text = run(sound.copy(), generate_kwargs=settings)["text"]
    assert text == run(sound.copy(), generate_kwargs=settings | {"use_cache": False})["text"]
    assert text
