"""What people do with a model: look at its maps, copy it, pickle it, run it in threads, compile and export it."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, build
from oracle import softmax_follows, valid_rows

import mapreuse as mr
from mapreuse.models import MapRecorder, find_stack, output_projection

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
    """Without gradients, where the memory of a map is handed to the next computing layer."""
    eager, batch = build(family, implementation="eager")
    with torch.no_grad(), softmax_follows(PLANS[plan]) as in_effect:
        rows = valid_rows(eager, batch, eager(**batch))
    for storage in STORAGES:
        model = mr.apply(build(family)[0], PLANS[plan], storage=storage)
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        assert len(attentions) == 4
        for ours, theirs in zip(attentions, in_effect, strict=True):
            ours, theirs = ours.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "parakeet", "llama"])
def test_the_config_can_ask_for_attentions_after_applying(family):
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
def test_hidden_states_are_captured_as_before(family):
    model, batch = build(family)
    expected = len(model(**batch, output_hidden_states=True).hidden_states)
    mr.apply(model, GROUPS)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == expected
    assert torch.equal(output.last_hidden_state, run(model, batch))
    assert len({tuple(state.flatten()[:5].tolist()) for state in output.hidden_states[:4]}) == 4


@pytest.mark.parametrize("family", SAMPLE)
def test_threads_run_one_model_with_inputs_of_their_own(family):
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


def test_two_models_run_in_turns_layer_by_layer():
    """The second model runs whole inside the first one's third layer."""
    model, batch = build("bert")
    mr.apply(model, PLANS["all from one"])
    other, _ = build("bert", seed=1)
    mr.apply(other, PLANS["groups of 2"])
    expected, expected_other = run(model, batch), run(other, batch)
    inner = []
    model.encoder.layer[2].register_forward_pre_hook(lambda *_: inner.append(run(other, batch)))
    assert torch.equal(run(model, batch), expected)
    assert torch.equal(inner[0], expected_other)


def test_a_pass_that_fails_half_way_leaves_nothing_behind():
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
@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("family", ["parakeet", "bert", "modernbert", "gpt2", "llama"])
def test_a_copy_gives_the_same_output_and_shares_nothing(family, copying):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"])
    expected = run(model, batch)
    if copying == "deepcopy":
        copied = copy.deepcopy(model)
    elif copying == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(run(copied, batch), expected)
    assert mr.plan_of(copied) == PLANS["in part"]
    assert [type(a) for a in copied.modules()] == [type(b) for b in model.modules()]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(run(model, batch), expected)


def test_a_converted_module_keeps_its_class_name_and_is_still_one():
    """So that `transformers` finds the modules whose outputs it captures, by class."""
    model, _ = build("bert")
    attentions = [layer.attention for layer in find_stack(model).layers]
    mr.apply(model, PLANS["in part"])
    for attention in attentions:
        assert type(attention).__name__ == "BertSelfAttention"
        assert isinstance(attention, tf.models.bert.modeling_bert.BertSelfAttention)


def test_another_model_of_the_same_config_stays_as_it_is():
    torch.manual_seed(0)
    config = build("bert")[0].config
    first, second = tf.BertModel(config).eval(), tf.BertModel(config).eval()
    _, batch = build("bert")
    expected = run(second, batch)
    mr.apply(first, GROUPS)
    assert torch.equal(run(second, batch), expected)
    assert second.config._attn_implementation == first.config._attn_implementation == "sdpa"


def test_the_decoder_beside_an_encoder_that_reuses_maps_works_as_before():
    """From the same encoder output come the same tokens, cross-attention and cache included."""
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
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 40, "eos_token_id": 2, "bos_token_id": 1}
    config = tf.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 4})
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
    assert {type(m).__mro__[1].__name__ for m in model.vision_model.modules() if "Attention" in type(m).__name__} == {
        "Module"
    }


def test_each_tower_can_have_a_plan_of_its_own():
    model, batch = clip()
    mr.apply(model.text_model, GROUPS)
    assert mr.plan_of(model) == GROUPS
    mr.apply(model.vision_model, PLANS["all from one"])
    with torch.no_grad():
        model(**batch)
    assert mr.plan_of(model.text_model) == GROUPS
    assert mr.plan_of(model.vision_model) == PLANS["all from one"]
    with pytest.raises(ValueError, match=r"'text_model.*'vision_model"):
        mr.plan_of(model)


def test_a_speech_recogniser_transcribes_without_a_cache():
    torch.manual_seed(0)
    encoder = build("parakeet")[0].config
    config = tf.ParakeetCTCConfig(vocab_size=20, pad_token_id=19, encoder_config=encoder.to_dict())
    model = tf.ParakeetForCTC(config).eval()
    _, batch = build("parakeet")
    untouched = model.generate(**batch)
    mr.apply(model, mr.ReusePlan.full(4))
    assert torch.equal(model.generate(**batch), untouched)
    model = mr.apply(tf.ParakeetForCTC(config).eval(), GROUPS)
    assert model.generate(**batch).shape == untouched.shape


def test_compiled_and_exported_models_give_the_same_output():
    """In a process without the checks of shapes, which the compiler does not trace."""
    families = ["parakeet", "llama"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compiling.py"), *families],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [line.split() for line in done.stdout.splitlines()]
    ways = ["compiled", "compiled-training", "exported", "over-budget"]
    assert [(family, way) for family, way, _ in errors] == list(itertools.product(families, ways))
    assert all(float(error) < 1e-4 for _, _, error in errors), errors


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2", "modernbert"])
def test_a_recorder_returns_the_models_own_maps_and_leaves_it_alone(family):
    eager, batch = build(family, implementation="eager")
    with torch.no_grad(), softmax_follows(mr.ReusePlan.full(4)) as own:
        rows = valid_rows(eager, batch, eager(**batch))
    model, _ = build(family)
    maps, valid, _ = MapRecorder(model)(batch)
    assert torch.equal(valid, rows)
    for ours, theirs in zip(maps, own, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows], atol=2e-5, rtol=1e-4)
    assert mr.plan_of(model) is None


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_projection_is_what_the_context_passes_through(family):
    """Its input is the context: the map in effect times the values, head by head."""
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
