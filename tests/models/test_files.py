"""`mapreuse.save` and `mapreuse.load` keep a model bit for bit, and refuse what they could not keep."""

import json
import os
import re
import sys
from pathlib import Path

import jaxtyping
import pytest
import safetensors.torch
import torch
import transformers as tf
from agreement import PLANS
from families import build
from packed_encoders import encoder
from saved_models import assert_same_model, clip, files_of, plans_in, task_head
from torch import nn
from vision_blocks import VisionTransformer

import mapreuse as mr

GROUPS, IN_PART = PLANS["groups of 2"], PLANS["in part"]


def save_and_load(model, path):
    mr.save(model, path)
    return mr.load(path)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_without_a_plan_is_loaded_bit_for_bit(tmp_path, implementation):
    model, batch = build("bert", implementation=implementation)
    loaded = save_and_load(model, tmp_path)
    assert_same_model(loaded, model, batch)
    assert loaded.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("ParakeetForCTC", "encoder"),
        ("BertForMaskedLM", "bert.encoder"),
        ("GPT2LMHeadModel", "transformer"),
        ("LlamaForCausalLM", "model"),
    ],
)
def test_a_model_with_a_head_is_loaded_bit_for_bit_and_its_tied_parameters_are_stored_once(tmp_path, name, stack):
    model = mr.apply(task_head(name), PLANS["in part"])
    loaded = save_and_load(model, tmp_path)
    assert_same_model(loaded, model)
    tied = [len({id(p) for _, p in m.named_parameters(remove_duplicate=False)}) for m in (model, loaded)]
    assert tied[0] == tied[1]
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    distinct = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in distinct.values())
    assert list(plans_in(loaded)) == [stack]


def test_parameters_that_were_untied_stay_untied(tmp_path):
    model = task_head("GPT2LMHeadModel")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    assert_same_model(save_and_load(model, tmp_path), model)


def test_each_of_two_stacks_keeps_its_plan(tmp_path):
    model = clip()
    mr.apply(model.text_model, GROUPS)
    mr.apply(model.vision_model, PLANS["in part"], storage="recompute")
    loaded = save_and_load(model, tmp_path)
    assert_same_model(loaded, model)
    assert [storage for _, storage, _ in plans_in(loaded).values()] == ["dense", "recompute"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_stored_numbers_and_changes_nothing_else(tmp_path, dtype):
    model = mr.apply(build("parakeet")[0], GROUPS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mr.save(model, tmp_path, dtype=dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    for name, tensor in mr.load(tmp_path).state_dict().items():
        assert tensor.dtype == before[name].dtype
        rounded = before[name].to(dtype) if tensor.is_floating_point() else before[name]
        assert torch.equal(tensor, rounded.to(tensor.dtype)), name


@pytest.mark.parametrize("how", ["made in half precision", "converted to half precision", "some parts in float32"])
def test_every_tensor_keeps_its_type(tmp_path, how):
    """Rotary frequencies stay in float32 in a model made in half precision, and are rounded in a converted one."""
    model, batch = build("llama")
    if how == "made in half precision":
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = tf.LlamaModel(model.config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        model.bfloat16()
    if how == "some parts in float32":
        model.norm.float()
        batch = None  # such a model does not run without autocast
    mr.apply(model, GROUPS)
    assert_same_model(save_and_load(model, tmp_path), model, batch)


def test_generation_settings_are_kept(tmp_path):
    model = task_head("ParakeetForCTC")
    model.generation_config.max_length = 77
    assert save_and_load(model, tmp_path).generation_config.max_length == 77


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    model, _ = build("bert")
    loaded = save_and_load(model, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert_same_model(loaded, model)


@pytest.mark.parametrize("removed", ["before applying", "when the model was made"])
def test_a_model_without_its_pooler_is_saved_without_it(tmp_path, removed):
    model, batch = build("bert")
    if removed == "before applying":
        model.pooler = None
    else:
        model = tf.BertModel(model.config, add_pooling_layer=False).eval()
    loaded = save_and_load(mr.apply(model, GROUPS), tmp_path)
    assert loaded.pooler is None
    assert_same_model(loaded, model, batch)


@pytest.mark.parametrize("family", ["parakeet", "vit"])
def test_saving_draws_no_random_numbers(tmp_path, family):
    model, _ = build(family)
    before = torch.get_rng_state()
    mr.save(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_directory_that_mapreuse_0_1_0_saved_still_opens(tmp_path):
    model = mr.load(Path(__file__).parent / "saved_by_0_1_0")
    assert mr.plan_of(model) == mr.ReusePlan.from_sources([0, 0, 2], {1: [1, 0]})
    (applied,) = plans_in(model).values()
    assert applied[1:] == ("recompute", 10**6)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0, :, 0]
    torch.testing.assert_close(states, torch.tensor([-1.5749, 0.0597, 0.1603, -0.3018]), atol=1e-4, rtol=0)
    assert_same_model(save_and_load(model, tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["version"] == 5


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved model."""
    path = tmp_path / "model"
    mr.save(mr.apply(build("bert")[0], GROUPS), path)
    return path


def with_a_buffer(model):
    mr.apply(model, GROUPS).register_buffer("seen", torch.zeros(3))
    return model


def with_a_wrapped_output(model):
    dense = mr.apply(model, GROUPS).encoder.layer[1].attention.output
    dense.dense = nn.Sequential(dense.dense)
    return model


def with_a_wider_output(model):
    mr.apply(model, GROUPS).pooler.dense = nn.Linear(32, 48)
    return model


def with_its_head_untied(model):
    whole = task_head("BertForMaskedLM")
    whole.cls.predictions.decoder.weight = nn.Parameter(whole.cls.predictions.decoder.weight.detach() + 1)
    return mr.apply(whole, GROUPS)


def with_a_config_that_is_not_json(model):
    model.config.extra = object()
    return model


class OwnModel(tf.BertModel):
    pass


NOT_ITS_CONFIG = "cannot be saved, because it is not the model that its .*"
NOT_OF_TRANSFORMERS = "only a whole model of a class that transformers defines can be saved"
UNSAVABLE = {
    "a buffer": (with_a_buffer, f"{NOT_ITS_CONFIG}seen is not part of it"),
    "a wrapped output": (
        with_a_wrapped_output,
        f"{NOT_ITS_CONFIG}attention.output.dense.bias is missing.* and 1 others",
    ),
    "a wider output": (with_a_wider_output, rf"{NOT_ITS_CONFIG}pooler.dense.bias is \(48,\), not \(32,\)"),
    "an untied head": (with_its_head_untied, f"{NOT_ITS_CONFIG}cls.predictions.decoder.weight is not part of it"),
    "no numbers": (
        lambda model: model.to("meta"),
        r"embeddings\.\w+\.weight of this BertModel is on the meta device",
    ),
    "a config that is not JSON": (
        with_a_config_that_is_not_json,
        "the configuration of this BertModel cannot be written as JSON",
    ),
    "a subclass": (lambda model: OwnModel(model.config), f"{NOT_OF_TRANSFORMERS}, got OwnModel"),
    "torch's encoder": (lambda model: encoder(batch_first=True), NOT_OF_TRANSFORMERS),
    "timm's style": (lambda model: mr.apply(VisionTransformer(), GROUPS), NOT_OF_TRANSFORMERS),
}


@pytest.mark.parametrize(("change", "problem"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path, change, problem):
    model = change(build("bert")[0])
    with pytest.raises(ValueError, match=problem) as error:
        mr.save(model, tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.int8, "float16", 16])
def test_a_type_that_is_not_floating_point_is_refused(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside tests
    with pytest.raises(ValueError, match=re.escape(f"got {dtype!r}")) as error:
        mr.save(build("bert")[0], tmp_path / "new", dtype=dtype)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_refused_save_leaves_the_old_model(saved):
    before = files_of(saved)
    with pytest.raises(ValueError, match="cannot be saved"):
        mr.save(with_a_buffer(build("bert", seed=1)[0]), saved)
    assert files_of(saved) == before


def test_a_saved_model_replaces_the_one_in_the_directory_and_keeps_other_files(tmp_path):
    original, _ = build("bert")
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    for old in (3, 4):  # versions
        if old == 3:
            (tmp_path / "mapreuse-0123456789ab.safetensors").write_text("of version 3")
        model = mr.apply(build("bert", seed=old)[0], IN_PART)
        assert_same_model(save_and_load(model, tmp_path), model)
        assert set(files_of(tmp_path)) == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("call", [mr.save, tf.BertModel.save_pretrained])
def test_an_existing_file_is_kept_and_refused(tmp_path, call):
    model = mr.apply(build("bert")[0], GROUPS)
    file = tmp_path / "model"
    file.write_text("something else")
    for path in (file, file / "inside" / "it"):
        with pytest.raises(ValueError, match=f"{file} is a file; save to a directory") as error:
            call(model, path)
        assert "\n" not in str(error.value)
    assert file.read_text() == "something else"


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


INTERRUPTED = {"describing": "_describe", "writing weights": "_save_pretrained"}


@pytest.mark.parametrize("name", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupted_save_leaves_the_old_model_and_nothing_new(monkeypatch, saved, tmp_path, name):
    before = files_of(saved)
    monkeypatch.setattr(sys.modules["mapreuse.models._save_pretrained"], name, interrupt)
    for path in (saved, tmp_path / "new" / "directory"):
        with pytest.raises(KeyboardInterrupt):
            mr.save(build("bert", seed=1)[0], path)
    assert files_of(saved) == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("moved", [0, 1])
def test_an_interruption_while_files_are_moved_leaves_no_mixture_of_two_models(monkeypatch, saved, moved):
    replace, sources = os.replace, []

    def interrupted_move(source, target):
        sources.append(source)
        (replace if len(sources) <= moved else interrupt)(source, target)

    monkeypatch.setattr(os, "replace", interrupted_move)
    with pytest.raises(KeyboardInterrupt):
        mr.save(mr.apply(build("bert", seed=1)[0], IN_PART), saved)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"is not a saved model: it contains no config.json"):
        mr.load(saved)
    assert not list(saved.glob(".saving-*"))


def test_a_directory_can_be_moved(saved, tmp_path):
    saved.rename(tmp_path / "moved")
    assert mr.plan_of(mr.load(str(tmp_path / "moved"))) == GROUPS
