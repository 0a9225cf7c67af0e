"""Decoders under a plan generate with a cache: tokens and logits are those of the definition without one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from decoders import (
    DECODERS,
    PLANS,
    PROMPTS,
    SIZE,
    continued,
    converted,
    defined,
    generated,
    inputs,
    original,
    plan_for,
)
from families import build
from tiny_models import tokenizer

import mapreuse as mr

GROUPS, IN_PART = PLANS["groups of 2"], PLANS["in part"]
FULL = mr.ReusePlan.full(4)
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def assert_generates(model, family, plan, prompt, **settings):
    tokens, logits = defined(family, plan, prompt)
    found, of_cached = generated(model, inputs(PROMPTS[prompt]), **settings)
    assert torch.equal(found, tokens)
    assert (of_cached - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.sample(7)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_is_that_of_the_definition(family, plan, prompt, cache):
    if family == "falcon-alibi" and cache == "static":
        pytest.skip("the original fails with a static cache, too")
    plan = plan_for(family, plan)
    assert_generates(converted(family, plan), family, plan, prompt, **CACHES[cache])


@pytest.mark.parametrize("family", DECODERS)
def test_a_plan_moves_the_logits_of_every_family(family):
    for plan in PLANS:
        moved = defined(family, plan_for(family, plan), "one text")[1]
        untouched = defined(family, FULL, "one text")[1]
        assert (moved[:, 0] - untouched[:, 0]).abs().max() > 0.05 * untouched.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_without_sharing_fills_the_cache_of_the_original(family):
    model = converted(family, FULL)
    batch, one = inputs(PROMPTS["one text"]), torch.tensor([[7]])
    cache = original(family)(**batch, use_cache=True).past_key_values
    whole = original(family)(torch.cat([batch["input_ids"], one], 1)).logits[:, -1]
    assert (model(one, past_key_values=cache).logits[:, -1] - whole).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_reusing_layer_stores_values_only_as_cache_bytes_says(family):
    by_heads = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, None, 1, 3]})
    model = converted(family, by_heads)
    cache = model(**inputs(torch.ones(1, 5, dtype=torch.int64)), use_cache=True).past_key_values
    stored = [(layer.keys.nbytes + layer.values.nbytes) // 5 for layer in cache.layers]
    found = mr.cache_bytes(model)
    assert list(found.layers) == stored
    assert found == mr.cache_bytes(original(family), by_heads)
    of_values = stored[0] // 2
    assert stored[1] == of_values
    # These classes cannot project the keys of some heads alone.
    whole = family in ("opt", "gpt-neox", "phi3", "olmo", "falcon", "falcon-alibi")
    assert stored[3] == of_values + (of_values if whole else 32)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [5] * 4


def test_the_table_of_a_plan_shows_bytes_for_each_token():
    lines = str(mr.cache_bytes(original("llama"), GROUPS)).splitlines()
    assert lines[1] == "cache: 384 bytes a token (512 without sharing: -25.0%)"
    assert lines[3] == "layer 1  reuses layer 0      64 bytes"
    assert mr.cache_bytes(original("llama")).summary() == "cache: 512 bytes a token"
    assert mr.cache_bytes(converted("llama", GROUPS).half()).layers == (64, 32, 64, 32)


def test_bytes_of_models_without_a_cache_are_refused():
    with pytest.raises(ValueError, match="BertEncoder keeps no cache; only decoders do"):
        mr.cache_bytes(build("bert")[0])
    with pytest.raises(ValueError, match="the model has another plan in force"):
        mr.cache_bytes(converted("llama", GROUPS), FULL)


@pytest.mark.parametrize("plan", [GROUPS, IN_PART], ids=["groups", "in part"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_other_ways_to_generate_give_the_tokens_that_they_give_without_a_cache(family, plan):
    model, batch = converted(family, plan), inputs(PROMPTS["padded on the left"])
    for settings in ({"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
        torch.manual_seed(0)
        tokens, logits = generated(model, batch, use_cache=False, **settings)
        torch.manual_seed(0)
        found, of_cached = generated(model, batch, **settings)
        assert torch.equal(found, tokens), settings
        assert (of_cached - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_same_tokens(family, helper):
    """It removes refused tokens from the cache."""
    model, prompt = converted(family, IN_PART), PROMPTS["one text"]
    tokens, _ = defined(family, IN_PART, "one text")
    assistant = {"assistant_model": converted(family, GROUPS)}
    more = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else assistant
    found = model.generate(**inputs(prompt), max_new_tokens=8, do_sample=False, **more)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("plan", [GROUPS, IN_PART], ids=["groups", "in part"])
def test_a_cache_is_continued_by_the_next_call(family, plan):
    model, batch = converted(family, plan), inputs(PROMPTS["padded on the left"])
    first = model.generate(**batch, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    question = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 11, dtype=torch.int64)], 1)
    tokens, logits = continued(original(family), plan, ids, mask)
    turn = {"input_ids": ids, "attention_mask": mask}
    found, of_cached = generated(model, turn, past_key_values=first.past_key_values)
    assert torch.equal(found, tokens)
    assert (of_cached - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("storage", ["recompute", "auto"])
@pytest.mark.parametrize("plan", [GROUPS, IN_PART], ids=["groups", "in part"])
def test_every_exact_storage_generates_the_defined_tokens(storage, plan):
    assert_generates(converted("llama", plan, storage=storage), "llama", plan, "padded on the left")


@torch.no_grad()
@pytest.mark.parametrize(("storage", "error"), [("dense8", 5e-3), ("dense16", 1e-3)])
def test_a_step_is_exact_also_if_a_storage_compresses_the_maps_of_the_prompt(storage, error):
    model, batch = converted("llama", GROUPS, storage=storage), inputs(PROMPTS["padded on the left"])
    exact = converted("llama", GROUPS)
    caches = [one(**batch, use_cache=True).past_key_values for one in (exact, exact)]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    one, other = (
        called(torch.full((3, 1), 7), attention_mask=mask, past_key_values=cache).logits
        for called, cache in zip((model, exact), caches, strict=True)
    )
    assert torch.equal(one, other)
    tokens = model.generate(
        **batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = defined("llama", GROUPS, "padded on the left")[1][:, 0]
    assert 0 < (tokens.logits[0] - logits).abs().max() <= error * logits.abs().max()


COMPILED = """
import torch
from decoders import PROMPTS, converted, defined, generated, inputs
from test_cache import GROUPS, IN_PART
for family, plan in (("llama", GROUPS), ("gpt2", IN_PART), ("mistral", IN_PART)):
    model = converted(family, plan)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    tokens, logits = defined(family, plan, "padded on the left")
    found, of_cached = generated(model, inputs(PROMPTS["padded on the left"]), cache_implementation="static")
    assert torch.equal(found, tokens), family
    assert (of_cached - logits).abs().max() <= 1e-4 * logits.abs().max(), family
"""


@pytest.mark.full
def test_a_step_with_a_static_cache_compiles_as_one_graph():
    """In a process of its own, because the checks of shapes during tests break graphs."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=os.environ | {"PYTHONPATH": path})


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_from_elsewhere_is_refused_on_one_line(family):
    model, batch, one = converted(family, GROUPS), inputs(PROMPTS["one text"]), torch.tensor([[7]])
    by_original = original(family)(**batch, use_cache=True).past_key_values
    under_plan = model(**batch, use_cache=True).past_key_values
    lengths = [by_original.get_seq_length(), under_plan.get_seq_length()]
    for other, cache, problem in (
        (model, by_original, "was filled without this plan"),
        (converted(family, IN_PART), under_plan, "was filled under another plan"),
        (converted(family, FULL), under_plan, "was filled under another plan"),
        (model, ((one, one),), "expected a cache of transformers, such as DynamicCache, got tuple"),
        (model, tf.QuantizedCache("fp8", model.config), "cannot use a cache with layers of Fp8QuantizedLayer"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            other(one, past_key_values=cache)
        assert "\n" not in str(error.value)
    assert [by_original.get_seq_length(), under_plan.get_seq_length()] == lengths
    assert copy.deepcopy(model)(one, past_key_values=copy.deepcopy(under_plan)).logits.isfinite().all()


@torch.no_grad()
def test_a_decoder_makes_a_cache_only_if_asked():
    model, batch = converted("llama", GROUPS), inputs(PROMPTS["one text"])
    assert model.config.use_cache
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values.get_seq_length() == 7
    cache = tf.DynamicCache()
    assert model(**batch, past_key_values=cache).past_key_values is cache


def test_a_saved_decoder_generates(tmp_path):
    tokens, _ = defined("llama", IN_PART, "one text")
    converted("llama", IN_PART).save_pretrained(tmp_path)
    for model in (tf.AutoModelForCausalLM.from_pretrained(tmp_path), mr.load(tmp_path)):
        assert torch.equal(generated(model, inputs(PROMPTS["one text"]))[0], tokens)


def test_pipelines_generate_text_and_transcripts(tmp_path):
    made = tokenizer()
    made.save_pretrained(tmp_path)
    config = tf.LlamaConfig(
        **SIZE, vocab_size=len(made), max_position_embeddings=40, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    mr.apply(tf.LlamaForCausalLM(config), GROUPS).save_pretrained(tmp_path)
    run = tf.pipeline("text-generation", model=str(tmp_path))
    settings = {"max_new_tokens": 6, "do_sample": False}
    texts = [one[0]["generated_text"] for one in run(["heads", "maps are alike"], batch_size=2, **settings)]
    without = [one[0]["generated_text"] for one in run(["heads", "maps are alike"], use_cache=False, **settings)]
    assert texts == without
    assert all(len(text.split()) > 4 for text in texts)
