"""Share mode "corrected" in real classes: results by the definition, caches, files, refits and refusals."""

import copy
from contextlib import contextmanager

import decoders
import pytest
import torch
import transformers as tf
from families import build
from oracle import disagreement, valid_rows
from torch import nn

import mapreuse as mr
from mapreuse.maps.reference import corrected_map
from mapreuse.models import MapRecorder, find_stack

HEADS = mr.ReusePlan((None, 0, None, ((2, 1), (2, 0), (2, 3), (2, 3))), "corrected", rank=6)
FAMILIES = ("bert", "parakeet", "modernbert", "gpt2", "qwen2", "vit", "t5-encoder", "gemma2", "gpt-oss")
PLANS = {"by layers": mr.ReusePlan.parse("2x2", share="corrected", rank=4), "by heads": HEADS}


def with_corrections(model):
    """The same model with random corrections, which are large enough to be seen."""
    for layer in find_stack(model).layers:
        if "correction" in layer.attention._modules:
            for index, parameter in enumerate(layer.attention.correction.parameters()):
                generator = torch.Generator().manual_seed(index)
                values = torch.randn(parameter.shape, generator=generator) * (3 / parameter.shape[1]) ** 0.5
                parameter.data.copy_(values)
    return model


@contextmanager
def softmax_corrected(eager, converted, plan):
    """While open, reusing layers of an eager model apply the definition to the scores of their sources."""
    original, scores, inputs = nn.functional.softmax, [], []

    def record(module, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def softmax(given, *args, **kwargs):
        layer = len(scores)
        if len(inputs) == layer:  # of experts
            return original(given, *args, **kwargs)
        scores.append(given)
        if plan.layers[layer] is None:
            return original(given, *args, **kwargs)
        correction, states = find_stack(converted).layers[layer].attention.correction, inputs[layer]
        query, key = (
            nn.functional.linear(states, one.weight).unflatten(-1, (-1, plan.rank)).transpose(1, 2)
            for one in (correction.query, correction.key)
        )
        heads = plan.heads(layer, given.shape[1])
        source = torch.stack([scores[source][:, head] for source, head in heads], 1)
        key = key.repeat_interleave(len(heads) // key.shape[1], 1)
        with_sinks = source.shape[-1] > source.shape[-2]
        sink = source[..., -1:] if with_sinks else source[..., :0]
        return corrected_map(source[..., : key.shape[-2]], query, key, sink)

    layers = find_stack(eager).layers
    hooks = [layer.attention.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    nn.functional.softmax = softmax
    try:
        yield
    finally:
        nn.functional.softmax = original
        for hook in hooks:
            hook.remove()
    assert len(scores) == plan.num_layers


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_corrected_scores_match_the_definition_in_every_kind_of_attention(family, plan):
    eager, batch = build(family, implementation="eager")
    model = with_corrections(mr.apply(build(family)[0], plan))
    with torch.no_grad():
        untouched = eager(**batch)
        rows = valid_rows(eager, batch, untouched)
        with softmax_corrected(eager, model, plan):
            expected = eager(**batch).last_hidden_state
        assert disagreement(untouched.last_hidden_state, expected, rows) > 1e-3
        assert disagreement(model(**batch).last_hidden_state, expected, rows) < 1e-4


@pytest.mark.parametrize("length", [1, 90, 200])
def test_lengths_on_both_sides_of_the_kernels_match_the_definition(length):
    plan, model = PLANS["by heads"], copy.deepcopy(decoders.original("llama").model)
    model.set_attn_implementation("sdpa")
    with_corrections(mr.apply(model, plan))
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(0))
    eager = decoders.original("llama").model
    with torch.no_grad():
        with softmax_corrected(eager, model, plan):
            expected = eager(ids).last_hidden_state
        rows = torch.ones(ids.shape, dtype=torch.bool)
        assert disagreement(model(ids).last_hidden_state, expected, rows) < 1e-4


def test_without_a_refit_a_corrected_plan_is_a_plan_of_maps():
    batch = decoders.inputs(decoders.PROMPTS["padded on the left"])
    by_maps = decoders.converted("llama", mr.ReusePlan.parse("2x2"))
    model = decoders.converted("llama", PLANS["by layers"])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, by_maps(**batch).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", decoders.PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_tokens_with_a_cache_are_those_without_one(family, prompt, cache):
    plan = PLANS["by heads"]
    model = with_corrections(decoders.converted(family, plan))
    batch = decoders.inputs(decoders.PROMPTS[prompt])
    tokens, logits = decoders.generated(model, batch, cache_implementation=cache)
    length = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(tokens), tokens.shape[1] - length).long()], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        uncached = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, uncached[:, length - 1 : -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens[:, length:], uncached[:, length - 1 : -1].argmax(-1))


def test_a_reusing_layer_caches_low_rank_keys_and_values():
    plan = PLANS["by layers"]
    model = decoders.converted("llama", plan)
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert [layer.keys.shape[1:] for layer in cache.layers] == [(2, 5, 8), (2, 5, 4)] * 2
    assert [layer.values.shape[1:] for layer in cache.layers] == [(2, 5, 8)] * 4
    stored = sum(one.numel() * 4 for layer in cache.layers for one in (layer.keys, layer.values))
    assert sum(mr.cache_bytes(model).layers) == stored // 5
    with pytest.raises(ValueError, match="the cache was filled under another plan") as refused:
        decoders.converted("llama", HEADS)(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("save", ["mr.save", "save_pretrained"])
def test_a_saved_model_keeps_its_corrections(tmp_path, save):
    model = with_corrections(decoders.converted("llama", HEADS))
    if save == "mr.save":
        mr.save(model, tmp_path / "saved")
        loaded = mr.load(tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert mr.plan_of(loaded) == HEADS
    batch = decoders.inputs(decoders.PROMPTS["padded on the left"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_gradients_reach_the_corrections_and_the_source():
    eager, batch = build("qwen2", implementation="eager")
    plan = PLANS["by layers"]
    model = with_corrections(mr.apply(build("qwen2")[0], plan))
    expected = copy.deepcopy(model)
    with softmax_corrected(eager, expected, plan):
        eager(**batch).last_hidden_state.square().mean().backward()
    model(**batch).last_hidden_state.square().mean().backward()
    found, own = dict(model.named_parameters()), dict(eager.named_parameters())
    for name in own.keys() & found.keys():
        torch.testing.assert_close(found[name].grad, own[name].grad, atol=1e-4, rtol=1e-3, msg=name)
    for name, parameter in expected.named_parameters():
        if "correction" in name:
            torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_recorded_maps_are_those_in_effect():
    model = with_corrections(decoders.converted("llama", HEADS)).model
    batch = decoders.inputs(decoders.PROMPTS["one text"])
    recorded = MapRecorder(model, under_plan=True)(batch).maps
    model.set_attn_implementation("eager")
    with torch.no_grad():
        returned = model(**batch, output_attentions=True).attentions
    for one, other in zip(recorded, returned, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_corrected_is_refused_in_one_line():
    plan = mr.ReusePlan.parse("2x2", share="corrected")
    decoder = tf.WhisperModel(
        tf.WhisperConfig(d_model=36, decoder_layers=4, encoder_layers=1, vocab_size=50, pad_token_id=0)
    ).get_decoder()
    cases = [
        (lambda: mr.apply(decoder, plan, attention="cross"), "serves self-attention only"),
        (lambda: mr.apply(decoder, plan, memory_budget=10**9), "memory_budget counts shared maps"),
        (lambda: mr.apply(build("deepseek-v3")[0], plan), "needs values that are outputs of one projection"),
    ]
    for call, problem in cases:
        with pytest.raises(ValueError, match=problem) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_corrected_model_can_be_exported_by_torch():
    model = with_corrections(mr.apply(build("bert")[0], PLANS["by layers"]))
    batch = build("bert")[1]
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        exported = torch.export.export(model, (), dict(batch)).module()
        torch.testing.assert_close(exported(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
