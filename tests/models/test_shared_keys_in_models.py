"""Share mode "keys" in real classes: results by the definition, padding, gradients, files and refusals."""

import copy
import functools

import pytest
import torch
import transformers as tf
from families import SIZE, build
from oracle import disagreement, softmax_follows, valid_rows
from torch import nn

import mapreuse as mr
from mapreuse.models import find_stack

PLAN = mr.ReusePlan.parse("2x2", share="keys", keys=2, window=2, block=3)
LENGTHS = (1, 2, 12, 90, 150)
"""On both sides of the lengths at which keys are gathered."""


@functools.cache
def decoder(implementation):
    torch.manual_seed(0)
    sizes = SIZE | {"vocab_size": 50, "max_position_embeddings": 300, "num_key_value_heads": 2}
    model = tf.LlamaModel(tf.LlamaConfig(**sizes, attn_implementation=implementation, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model.eval()


def tokens(length, padding):
    """Three sequences, of which two are padded on this side unless they would be empty."""
    mask = torch.ones(3, length, dtype=torch.long)
    for item, share in ((1, 2), (2, 3)):
        padded = length // share
        if padding == "left":
            mask[item, :padded] = 0
        elif padding == "right":
            mask[item, length - padded :] = 0
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 50, (3, length), generator=generator) * mask
    return {"input_ids": ids} | ({} if padding is None else {"attention_mask": mask})


def allowed_by(batch, length, *, causal):
    valid = batch.get("attention_mask", torch.ones(len(batch["input_ids"]), length)).bool()
    allowed = valid[:, None, :].expand(-1, length, -1)
    return allowed & torch.ones(length, length, dtype=torch.bool).tril() if causal else allowed


def defined(model, batch, allowed, plan):
    with torch.no_grad(), softmax_follows(plan, allowed=allowed):
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_decoder_attends_to_the_published_keys(implementation, length, padding):
    batch = tokens(length, padding)
    rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected = defined(decoder("eager"), batch, allowed_by(batch, length, causal=True), PLAN)
    converted = mr.apply(copy.deepcopy(decoder(implementation)), PLAN)
    with torch.no_grad():
        assert disagreement(converted(**batch).last_hidden_state, expected, rows) < 1e-4


@pytest.mark.parametrize("family", ["bert", "parakeet", "modernbert", "gpt2", "qwen2", "vit"])
def test_keys_match_the_definition_in_every_kind_of_attention(family):
    eager, batch = build(family, implementation="eager")
    with torch.no_grad():
        untouched = eager(**batch)
    rows = valid_rows(eager, batch, untouched)
    length = untouched.last_hidden_state.shape[1]
    is_causal = family in ("gpt2", "qwen2")
    allowed = rows[:, None, :].expand(-1, length, -1)
    if family == "parakeet":
        allowed = allowed & rows[:, :, None]
    if is_causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    expected = defined(eager, batch, allowed, PLAN)
    assert disagreement(untouched.last_hidden_state, expected, rows) > 1e-3
    model = mr.apply(build(family)[0], PLAN)
    with torch.no_grad():
        assert disagreement(model(**batch).last_hidden_state, expected, rows) < 1e-4


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("length", [12, 150])
def test_as_many_keys_as_the_context_has_are_full_attention(length, padding):
    batch = tokens(length, padding)
    rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    plan = mr.ReusePlan.parse("2x2", share="keys", keys=length, window=1, block=8)
    converted = mr.apply(copy.deepcopy(decoder("sdpa")), plan)
    with torch.no_grad():
        expected = decoder("sdpa")(**batch).last_hidden_state
        assert disagreement(converted(**batch).last_hidden_state, expected, rows) < 1e-5


def test_gradients_are_those_of_attention_to_the_same_keys():
    batch = tokens(90, None)
    eager = copy.deepcopy(decoder("eager"))
    with softmax_follows(PLAN, allowed=allowed_by(batch, 90, causal=True)):
        eager(**batch).last_hidden_state.square().mean().backward()
    model = mr.apply(copy.deepcopy(decoder("sdpa")), PLAN)
    model(**batch).last_hidden_state.square().mean().backward()
    expected = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3, msg=name)


def test_maps_that_the_caller_asks_for_are_those_in_effect():
    batch = tokens(12, None)
    with torch.no_grad(), softmax_follows(PLAN, allowed=allowed_by(batch, 12, causal=True)) as in_effect:
        decoder("eager")(**batch)
    model = mr.apply(copy.deepcopy(decoder("eager")), PLAN)
    with torch.no_grad():
        found = model(**batch, output_attentions=True).attentions
    for own, expected in zip(found, in_effect, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_a_saved_model_keeps_its_keys_plan(tmp_path):
    model = mr.apply(copy.deepcopy(decoder("sdpa")), PLAN)
    mr.save(model, tmp_path / "saved")
    loaded = mr.load(tmp_path / "saved")
    assert mr.plan_of(loaded) == PLAN
    batch = tokens(90, None)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_layers_that_share_keys_keep_all_their_weights():
    model = mr.apply(copy.deepcopy(decoder("sdpa")), PLAN)
    assert model.state_dict().keys() == decoder("sdpa").state_dict().keys()


def test_converting_to_a_keys_plan_changes_no_weight():
    model = mr.convert(decoder("sdpa"), PLAN, [tokens(12, None)] * 4)
    for name, parameter in decoder("sdpa").named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert mr.plan_of(model) == PLAN


def test_one_plan_may_share_maps_in_one_group_and_keys_in_another():
    plan = mr.ReusePlan((None, 0, None, 2), ("map", "map", "keys", "keys"), 2, 2, 3)
    batch = tokens(30, None)
    expected = defined(decoder("eager"), batch, allowed_by(batch, 30, causal=True), plan)
    model = mr.apply(copy.deepcopy(decoder("sdpa")), plan)
    rows = torch.ones(3, 30, dtype=torch.bool)
    with torch.no_grad():
        assert disagreement(model(**batch).last_hidden_state, expected, rows) < 1e-4
    assert not hasattr(find_stack(model).layers[1].attention, "q_proj")
    assert hasattr(find_stack(model).layers[3].attention, "q_proj")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_a_step_with_a_cache_is_a_block_of_one_query(padding, cache):
    plan = mr.ReusePlan.parse("2x2", share="keys", keys=2, window=2, block=1)
    model = tf.LlamaForCausalLM(decoder("sdpa").config).eval()
    model.model.load_state_dict(decoder("sdpa").state_dict())
    mr.apply(model, plan)
    batch = tokens(24, padding)
    length = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        **batch, **settings, cache_implementation=cache, output_logits=True, return_dict_in_generate=True
    )
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(3, 12)], 1)
    with torch.no_grad():
        uncached = model(found.sequences, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.stack(found.logits, 1), uncached[:, length - 1 : -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.sequences[:, length:], uncached[:, length - 1 : -1].argmax(-1))
