"""Decoders of encoder–decoders share the maps of self-attention, of cross-attention, or of both, and generate."""

import string

import numpy as np
import pytest
import torch
import transformers as tf
from agreement import PLANS
from encoder_decoders import (
    ALIKE,
    FAMILIES,
    NEW,
    SHARED,
    converted,
    decoder_batches,
    defined,
    following,
    generated,
    original,
)

import mapreuse as mr
from mapreuse.models import MapRecorder, find_stack

GROUPS, OTHER_HEADS, IN_PART = PLANS["groups of 2"], PLANS["other heads"], PLANS["in part"]
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


def assert_generates(family, plans, cache):
    tokens, logits = defined(family, plans)
    untouched = defined(family, {})[1]
    assert (logits[:, 0] - untouched[:, 0]).abs().max() > 30 * 1e-4 * untouched.abs().max() or "self" in plans
    found, of_model = generated(converted(family, plans), original(family)[1], **CACHES[cache])
    assert torch.equal(found, tokens[:, 1:])
    assert (of_model - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.sample(3)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_decoder_generates_what_the_definition_does(family, shared, cache):
    assert_generates(family, SHARED[shared], cache)


@pytest.mark.parametrize("family", ALIKE)
def test_families_with_the_same_attention_share_the_maps_of_cross_attention(family):
    assert_generates(family, SHARED["cross, other heads"], "dynamic")


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_reorder_both_parts_of_the_cache(family):
    model, batch = converted(family, SHARED["all"]), original(family)[1]
    settings = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, use_cache=False, **settings))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_inputs_may_be_padded_on_the_left(family):
    """With a cache, and with maps of several queries."""
    model = converted(family, SHARED["cross"]).get_decoder()
    (batch,) = decoder_batches(family, 1)
    batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    if family == "bart":
        batch.pop("attention_mask")  # its positions do not follow the mask
    whole = model(**batch, use_cache=False).last_hidden_state
    cut = {name: value[:, :5] for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    first = model(**batch | cut, use_cache=True)
    rest = batch | {"input_ids": batch["input_ids"][:, 5:]}
    second = model(**rest, past_key_values=first.past_key_values).last_hidden_state
    assert (second - whole[:, 5:]).abs().max() <= 1e-4 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reusing_cross_attention_stores_the_values_of_the_encoder_only(family):
    model, (batch,) = converted(family, {"cross": GROUPS}).get_decoder(), decoder_batches(family, 1)
    cache = model(**batch, use_cache=True).past_key_values
    layers = cache.cross_attention_cache.layers
    size = 3 * 7 * 32
    assert [(layer.keys.numel(), layer.values.numel()) for layer in layers] == [(size, size), (size, 0)] * 2
    other = converted(family, {"cross": OTHER_HEADS}).get_decoder()
    with pytest.raises(ValueError, match="the cache was filled under another plan; start with a new cache"):
        other(**batch, past_key_values=cache)


@pytest.mark.parametrize("family", ["whisper", "moonshine"])
def test_plans_of_all_attentions_are_saved(tmp_path, family):
    model, batch = converted(family, SHARED["all"]), original(family)[1]
    model.save_pretrained(tmp_path)
    for opened in (type(model).from_pretrained(tmp_path), mr.load(tmp_path)):
        decoder = opened.get_decoder()
        assert mr.plan_of(opened.get_encoder()) == GROUPS
        assert mr.plan_of(decoder) == GROUPS
        assert mr.plan_of(decoder, "cross") == PLANS["all from one"]
        assert torch.equal(generated(opened, batch)[0], generated(model, batch)[0])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_may_be_applied_in_any_order(family):
    plans = SHARED["all"]
    (batch,) = decoder_batches(family, 1)
    one, other = (converted(family, dict(order)) for order in (plans.items(), reversed(plans.items())))
    outputs = [model.get_decoder()(**batch).last_hidden_state for model in (one, other)]
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorder_returns_the_maps_of_cross_attention(family):
    (batch,) = decoder_batches(family, 1)
    with following(original(family)[0], {"cross": mr.ReusePlan.full(4)}) as expected:
        original(family)[0].get_decoder()(**batch, use_cache=False)
    recorded = MapRecorder(converted(family, {}).get_decoder(), attention="cross")(batch)
    assert torch.equal(recorded.valid, batch["attention_mask"].bool())
    for one, other in zip(recorded.maps, expected["cross"], strict=True):
        rows = recorded.valid
        torch.testing.assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows], atol=2e-5, rtol=1e-4)
    states = batch["encoder_hidden_states"]
    for values, layer in zip(
        recorded.values, find_stack(original(family)[0].get_decoder(), "cross").layers, strict=True
    ):
        projection = getattr(layer.attention, "v" if family == "t5" else "v_proj")
        torch.testing.assert_close(values, projection(states).view(3, 7, 4, 8).transpose(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_shared_cross_attention(family):
    """Also with checkpointing, which runs layers again."""
    (batch,) = decoder_batches(family, 1)
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"].double()
    found = []
    for checkpointing in (False, True):
        model = converted(family, SHARED["all"])
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        decoder = model.get_decoder().train().double()
        torch.manual_seed(0)  # for dropout
        decoder(**batch).last_hidden_state[..., 0].sum().backward()
        gradients = {name: one.grad for name, one in decoder.named_parameters() if one.grad is not None}
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    assert any(gradient.abs().max() > 0.1 for name, gradient in found[0].items() if ".q" in name)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_what_cross_attention_cannot_share_is_refused_on_one_line():
    model = converted("bart", {})
    by_keys = mr.ReusePlan.parse("2x2", share="keys", keys=2)
    for part, plan, attention, problem in (
        (model, IN_PART, "cross", "layer 1: in cross-attention, the heads of a layer must all compute or all reuse"),
        (model, by_keys, "cross", 'share mode "keys" serves self-attention only; use share="map"'),
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
    made, model = tf.WhisperTokenizer(vocab=vocabulary, merges=[]), converted("whisper", SHARED["all"])
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400, n_fft=400)
    run = tf.pipeline(
        "automatic-speech-recognition", model=model, tokenizer=made, feature_extractor=extractor, ignore_warning=True
    )
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    text = run(sound.copy(), generate_kwargs=settings)["text"]
    assert text == run(sound.copy(), generate_kwargs=settings | {"use_cache": False})["text"]
    assert text
