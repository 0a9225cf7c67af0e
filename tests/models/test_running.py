"""Models under a plan return their maps, and can be copied, pickled, run in threads and used inside larger models."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, SIZE, build
from oracle import softmax_follows, valid_rows
from packed_encoders import encoder
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.models import copy_with_same_weights, find_stack, output_projection

GROUPS = PLANS["groups of 2"]
SAMPLE = ["parakeet", "wav2vec2-conformer-relative", "bert", "modernbert", "gpt2", "llama"]
"""One family for each way of computing."""


def run(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.sample(7)
@pytest.mark.parametrize("plan", ["groups of 2", "two sources", "in part"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions_are_the_maps_in_effect_in_the_original_order_of_heads(family, plan):
    """Without gradients, so that computing layers reuse the memory of earlier maps."""
    eager, batch = build(family, implementation="eager")
    attentions = [layer.attention for layer in find_stack(eager).layers]
    with torch.no_grad(), softmax_follows(PLANS[plan], attentions) as in_effect:
        rows = valid_rows(eager, batch, eager(**batch))
    for storage in STORAGES:
        model = mr.apply(build(family)[0], PLANS[plan], storage=storage)
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        assert len(attentions) == 4
        for found, expected in zip(attentions, in_effect, strict=True):
            expected = expected[..., : found.shape[-1]]  # without sinks
            found, expected = found.transpose(1, 2)[rows], expected.transpose(1, 2)[rows]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "parakeet", "llama"])
def test_the_config_can_request_attentions_after_applying(family):
    model, batch = build(family, implementation="eager")
    mr.apply(model, GROUPS)
    model.config.output_attentions = True
    with torch.no_grad():
        attentions = model(**batch).attentions
    assert [weights.shape[1] for weights in attentions] == [4] * 4
    assert torch.equal(attentions[0], attentions[1])
    assert not torch.equal(attentions[1], attentions[2])


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_under_a_plan_returns_as_many_hidden_states_as_before(family):
    model, batch = build(family)
    expected = len(model(**batch, output_hidden_states=True).hidden_states)
    mr.apply(model, GROUPS)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == expected
    assert torch.equal(output.last_hidden_state, run(model, batch))
    assert len({tuple(state.flatten()[:5].tolist()) for state in output.hidden_states[:4]}) == 4


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", SAMPLE)
def test_threads_can_run_one_model_at_once_on_different_inputs(family):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"])
    floats = next(name for name in batch if "mask" not in name)
    batches = [batch | {floats: batch[floats].flip(0).roll(shift, 1)} for shift in range(4)]
    expected = [run(model, one) for one in batches]
    wrong, barrier = [], threading.Barrier(4)

    def work(index):
        barrier.wait()
        outputs = [run(model, batches[index]) for _ in range(15)]
        wrong.extend(index for output in outputs if not torch.allclose(output, expected[index], atol=1e-6))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not wrong
    assert not torch.allclose(expected[0], expected[1])


def test_a_model_can_run_inside_a_layer_of_another():
    model, batch = build("bert")
    mr.apply(model, PLANS["all from one"])
    other, _ = build("bert", seed=1)
    mr.apply(other, PLANS["groups of 2"])
    expected, expected_other = run(model, batch), run(other, batch)
    inner = []
    model.encoder.layer[2].register_forward_pre_hook(lambda *_: inner.append(run(other, batch)))
    assert torch.equal(run(model, batch), expected)
    assert torch.equal(inner[0], expected_other)


def test_an_interrupted_pass_does_not_affect_the_next():
    model, batch = build("bert")
    mr.apply(model, PLANS["all from one"])
    expected = run(model, batch)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.encoder.layer[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, {name: tensor.flip(0) for name, tensor in batch.items()})
    handle.remove()
    assert torch.equal(run(model, batch), expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize("copying", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["parakeet", "bert", "modernbert", "gpt2", "llama"])
def test_a_copy_gives_the_same_output_and_shares_nothing(family, copying):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"])
    expected = run(model, batch)
    copied = copy.deepcopy(model) if copying == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(run(copied, batch), expected)
    assert mr.plan_of(copied) == PLANS["in part"]
    assert [type(a) for a in copied.modules()] == [type(b) for b in model.modules()]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(run(model, batch), expected)


MODELS = {
    **{family: lambda family=family: build(family) for family in FAMILIES},
    "torch": lambda: (encoder(batch_first=True), {"src": torch.randn(3, 9, 32)}),
    "timm": lambda: (VisionTransformer().eval(), {"pixel_values": torch.randn(4, 3, 16, 16)}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_plan_applied_to_a_copy_with_the_same_weights_leaves_the_model_as_it_was(make):
    model, batch = make()
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    classes = [type(module) for module in model.modules()]
    copied = copy_with_same_weights(model)
    assert [name for name, _ in copied.named_parameters()] == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in copied.named_parameters())
    assert not {id(buffer) for buffer in copied.buffers()} & {id(buffer) for buffer in model.buffers()}

    mr.apply(copied, PLANS["other heads"])
    with torch.no_grad():
        copied(**batch)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] and torch.equal(after[name], values[name]) for name in after)
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert mr.plan_of(model) is None


def test_an_attention_module_stays_an_instance_of_its_class():
    """`transformers` finds the modules whose outputs it returns by their class."""
    model, _ = build("bert")
    attentions = [layer.attention for layer in find_stack(model).layers]
    mr.apply(model, PLANS["in part"])
    for attention in attentions:
        assert type(attention).__name__ == "BertSelfAttention"
        assert isinstance(attention, tf.models.bert.modeling_bert.BertSelfAttention)


def test_another_model_with_the_same_config_object_stays_as_it_is():
    torch.manual_seed(0)
    config = build("bert")[0].config
    first, second = tf.BertModel(config).eval(), tf.BertModel(config).eval()
    _, batch = build("bert")
    expected = run(second, batch)
    mr.apply(first, GROUPS)
    assert torch.equal(run(second, batch), expected)
    assert second.config._attn_implementation == first.config._attn_implementation == "sdpa"


def test_a_decoder_generates_from_an_encoder_that_shares_maps():
    """From the same encoder output it generates the same tokens."""
    torch.manual_seed(0)
    model = tf.WhisperForConditionalGeneration(build("whisper-encoder")[0].config).eval()
    features = torch.randn(2, 8, 40)
    with torch.no_grad():
        encoded = model.model.encoder(features)
    arguments = {"encoder_outputs": encoded, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**arguments)
    mr.apply(model.model.encoder, GROUPS)
    assert torch.equal(model.generate(**arguments), tokens)
    with torch.no_grad():
        assert not torch.equal(model.model.encoder(features).last_hidden_state, encoded.last_hidden_state)
    assert model.generate(features, max_new_tokens=6, do_sample=False).shape[0] == 2


def clip():
    torch.manual_seed(0)
    text = SIZE | {"vocab_size": 50, "max_position_embeddings": 40, "eos_token_id": 2, "bos_token_id": 1}
    config = tf.CLIPConfig(text_config=text, vision_config=SIZE | {"image_size": 16, "patch_size": 4})
    batch = {"input_ids": torch.randint(3, 50, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    return tf.CLIPModel(config).eval(), batch


def test_the_other_tower_stays_as_it_is():
    model, batch = clip()
    with torch.no_grad():
        before = model(**batch)
        mr.apply(model.text_model, GROUPS)
        after = model(**batch)
    assert torch.equal(before.image_embeds, after.image_embeds)
    assert not torch.equal(before.text_embeds, after.text_embeds)


def test_each_tower_can_have_a_plan_of_its_own():
    model, batch = clip()
    mr.apply(model.text_model, GROUPS)
    assert mr.plan_of(model) == GROUPS
    mr.apply(model.vision_model, PLANS["all from one"])
    model(**batch)
    assert mr.plan_of(model.text_model) == GROUPS
    assert mr.plan_of(model.vision_model) == PLANS["all from one"]
    with pytest.raises(ValueError, match=r"'text_model.*'vision_model"):
        mr.plan_of(model)


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("olmo", "deepseek-v3")])
def test_the_input_of_the_output_projection_is_the_map_times_the_values(family):
    model, batch = build(family)
    mr.apply(model, GROUPS)
    layer = find_stack(model).layers[1]
    seen = []
    projection = output_projection(layer)
    projection.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    value = layer.attention.get_submodule(layer.attention._form.value)
    value.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[1]
    values, context = seen
    heads = values.unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(4 * 8 // values.shape[-1], 1)
    torch.testing.assert_close(context, (weights @ heads).transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    assert output_projection(find_stack(build(family)[0]).layers[1]).weight.shape == projection.weight.shape
