"""Saved models are loaded bit for bit, or refused with a message of one line."""

import hashlib
import json
import os
import re
from pathlib import Path

import jaxtyping
import pytest
import safetensors.torch
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, SIZE, build
from packed_encoders import encoder
from torch import nn
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.models import _files, applied_plans

GROUPS = PLANS["groups of 2"]


def save_and_load(model, path):
    mr.save(model, path)
    return mr.load(path)


def assert_same_model(loaded, model, batch=None):
    """The models have the same plan, classes, parameters and buffers bit by bit, and output for `batch`."""
    assert not loaded.training
    assert [str(type(module)) for module in loaded.modules()] == [str(type(module)) for module in model.modules()]
    assert {path: one.plan for path, one in applied_plans(loaded).items()} == {
        path: one.plan for path, one in applied_plans(model).items()
    }
    for named in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(loaded, named)()), dict(getattr(model, named)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    if batch is not None:
        with torch.no_grad():
            assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def task_head(name):
    """A model with a head around its stack."""
    torch.manual_seed(0)
    if name == "ParakeetForCTC":
        encoder = build("parakeet")[0].config.to_dict()
        return tf.ParakeetForCTC(tf.ParakeetCTCConfig(vocab_size=20, pad_token_id=19, encoder_config=encoder)).eval()
    cls = getattr(tf, name)
    family = "gpt2" if "GPT2" in name else "bert" if "Bert" in name else "llama"
    config = build(family)[0].config
    config.tie_word_embeddings = name != "LlamaForCausalLM"
    return cls(config).eval()


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["groups of 2", "two sources", "in part"])
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, family, plan):
    model, batch = build(family)
    mr.apply(model, PLANS[plan], storage=STORAGES[len(family) % 2])
    assert_same_model(save_and_load(model, tmp_path / "model"), model, batch)


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
    stored = safetensors.torch.load_file(weights_of(tmp_path))
    distinct = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in distinct.values())
    assert list(applied_plans(loaded)) == [stack]


def test_parameters_that_were_untied_stay_untied(tmp_path):
    model = task_head("GPT2LMHeadModel")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    assert_same_model(save_and_load(model, tmp_path), model)


def test_each_of_two_stacks_keeps_its_plan(tmp_path):
    config = tf.CLIPConfig(text_config=SIZE, vision_config=SIZE | {"image_size": 16, "patch_size": 4})
    model = tf.CLIPModel(config).eval()
    mr.apply(model.text_model, GROUPS)
    mr.apply(model.vision_model, PLANS["in part"], storage="recompute")
    loaded = save_and_load(model, tmp_path)
    assert_same_model(loaded, model)
    assert [one.storage for one in applied_plans(loaded).values()] == ["dense", "recompute"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_stored_numbers_and_changes_nothing_else(tmp_path, dtype):
    model = mr.apply(build("parakeet")[0], GROUPS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mr.save(model, tmp_path, dtype=dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    stored = safetensors.torch.load_file(weights_of(tmp_path))
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
    with weights_of(tmp_path).open("r+b") as file:
        file.write(bytes(weights_of(tmp_path).stat().st_size))
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
    (applied,) = applied_plans(model).values()
    assert (applied.storage, applied.memory_budget) == ("recompute", 10**6)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0, :, 0]
    torch.testing.assert_close(states, torch.tensor([-1.5749, 0.0597, 0.1603, -0.3018]), atol=1e-4, rtol=0)
    assert_same_model(save_and_load(model, tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["version"], config["reuse"][0]["storage"]) == (3, "recompute")


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved model."""
    path = tmp_path / "model"
    mr.save(mr.apply(build("bert")[0], GROUPS), path)
    return path


def edit(path, **changes):
    """Change entries of `config.json`; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def weights_of(path):
    return next(path.glob("*.safetensors"))


def assert_refused(path, problem):
    with pytest.raises(ValueError, match=problem) as error:
        mr.load(path)
    assert "\n" not in str(error.value)


def test_transformers_alone_refuses_a_saved_model_and_fills_no_projection_with_random_numbers(saved):
    with pytest.raises(ValueError, match="mapreuse"):
        tf.AutoModel.from_pretrained(saved)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        tf.BertModel.from_pretrained(saved)
    with pytest.raises((ValueError, OSError)):
        tf.pipeline("fill-mask", model=str(saved))


NOT_THE_STORED_WEIGHTS = "truncated or damaged: its checksum is not the one in config.json"


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"4" + b[1:], lambda b: b[:-1] + b"4"])
def test_damaged_weights_are_refused(saved, damage):
    weights = weights_of(saved).read_bytes()
    weights_of(saved).write_bytes(damage(weights))
    assert weights_of(saved).read_bytes() != weights
    assert_refused(saved, NOT_THE_STORED_WEIGHTS)


@pytest.mark.parametrize("config", [b"", b'{"model_type": "mapre', b"\xff\xfe\xff"])
def test_a_damaged_config_is_refused(saved, config):
    (saved / "config.json").write_bytes(config)
    assert_refused(saved, "is not JSON: it is truncated or damaged")


def test_a_directory_without_all_its_files_is_refused(saved):
    weights_of(saved).unlink()
    assert_refused(saved, r"mapreuse-\w+.safetensors is missing; copy the whole directory")
    (saved / "config.json").unlink()
    assert_refused(saved, "is not a saved model: it holds no config.json")
    saved.rmdir()
    assert_refused(saved, "is not a saved model")


def replace_weights(path, data):
    """Replace the stored weights and their checksum."""
    weights_of(path).write_bytes(data)
    edit(path, sha256=hashlib.sha256(data).hexdigest())


OTHER_WEIGHTS = "does not hold the weights of this BertModel: "


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("extra", torch.zeros(2), f"{OTHER_WEIGHTS}extra is not part of it"),
        ("pooler.dense.weight", None, f"{OTHER_WEIGHTS}pooler.dense.weight is missing"),
        ("pooler.dense.weight", torch.zeros(3, 2), r"pooler.dense.weight is \(3, 2\), not \(32, 32\)"),
    ],
)
def test_weights_of_other_names_or_shapes_are_refused(saved, name, tensor, problem):
    tensors = safetensors.torch.load_file(weights_of(saved)) | {name: tensor}
    replace_weights(saved, safetensors.torch.save({key: one for key, one in tensors.items() if one is not None}))
    assert_refused(saved, problem)


def test_weights_in_another_format_are_refused(saved):
    replace_weights(saved, b"pickle, say")
    assert_refused(saved, "is not a safetensors file")


def test_a_directory_that_transformers_wrote_is_refused(tmp_path):
    build("bert")[0].save_pretrained(tmp_path)
    assert_refused(tmp_path, "was not written by mapreuse.save; open it with transformers' from_pretrained")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert_refused(tmp_path, "was not written by mapreuse.save")


def test_the_first_version_is_read_if_the_heads_are_in_the_same_order(tmp_path):
    for plan in ("groups of 2", "in part"):
        mr.save(mr.apply(build("bert")[0], PLANS[plan]), tmp_path / plan)
        edit(tmp_path / plan, version=1)
    mr.load(tmp_path / "groups of 2")
    problem = "format version 1 stored the heads of this plan in another order; convert the original"
    assert_refused(tmp_path / "in part", problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 4}, "format version 4 is not supported; this mapreuse reads versions 1 to 3"),
        ({"version": "2"}, "format version '2' is not supported"),
        ({"class": "BertConfig"}, "has no model class 'BertConfig'"),
        ({"class": "torch"}, "has no model class 'torch'"),
        ({"module": "os", "class": "system"}, "os.system is not a model class that transformers defines"),
        ({"module": "transformers.models.nothing"}, "has no model class"),
        ({"class": 3}, "'class' must be a str, got 3"),
        ({"class": None}, "'class' is missing"),
        ({"dtype": None}, "'dtype' is missing"),
        ({"dtype": "nn"}, "'nn' is not a floating-point type"),
        ({"dtypes": {"embeddings.word_embeddings.weight": 3}}, "config.json: 3 is not a floating-point type"),
        ({"sha256": "0"}, "truncated or damaged"),
        ({"config": []}, r"'config' must be a dict, got \[\]"),
        ({"config": {"model_type": "bert", "num_attention_heads": 5}}, "config.json does not describe a BertModel"),
        ({"config": {"model_type": "bert", "hidden_size": "wide"}}, "config.json does not describe a BertModel"),
        ({"weights": "../other.safetensors"}, "'weights' must name a file in the same directory"),
        ({"weights": "other.safetensors"}, "other.safetensors is missing"),
        ({"attn_implementation": "no_such"}, "config.json does not describe a BertModel"),
        ({"absent": ["encoder.pooler"]}, "lists 'encoder.pooler' as absent, but BertModel has no such module"),
        ({"reuse": []}, f"{OTHER_WEIGHTS}encoder.layer.1.attention.self.key.bias is missing; .* and 5"),
        ({"reuse": [{}]}, "its plan does not fit BertModel"),
        ({"reuse": [3]}, "its plan does not fit BertModel"),
    ],
)
def test_an_invalid_config_is_refused(saved, changes, problem):
    edit(saved, **changes)
    assert_refused(saved, problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"plan": json.loads(mr.ReusePlan.grouped(5, 2).to_json())}, "the plan has 5 layers, but BertEncoder has 4"),
        ({"plan": {"format": "other"}}, "not a plan"),
        ({"plan": None}, "not a plan"),
        ({"stack": "decoder"}, "its plan does not fit BertModel: .*decoder"),
        ({"stack": 3}, "its plan does not fit BertModel"),
        ({"storage": "sparse"}, "storage must be one of"),
        ({"storage": 3}, "storage must be one of .*, got 3"),
        ({"memory_budget": "1 GB"}, "memory_budget must be a positive integer .*, got '1 GB'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(monkeypatch, saved, changes, problem):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside tests
    reuse = json.loads((saved / "config.json").read_text())["reuse"]
    edit(saved, reuse=[reuse[0] | changes])
    assert_refused(saved, problem)


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


def test_a_model_is_not_saved_beside_weights_of_transformers(tmp_path):
    """Plain `from_pretrained` would open those without the plan."""
    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    mr.apply(model, GROUPS)
    with pytest.raises(ValueError, match=r"another model's weights \(model.safetensors\)"):
        mr.save(model, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("loaded", [False, True])
def test_save_pretrained_of_a_model_that_shares_maps_is_refused(tmp_path, loaded):
    model = mr.apply(task_head("BertForMaskedLM"), GROUPS)
    if loaded:
        model = save_and_load(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"mapreuse\.save"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_into_a_directory_keeps_its_other_files_and_replaces_the_old_weights(saved):
    (saved / "tokenizer.json").write_text("{}")
    old = weights_of(saved)
    model = mr.apply(build("bert", seed=1)[0], PLANS["in part"])
    for _ in range(2):
        assert_same_model(save_and_load(model, saved), model)
        assert set(files_of(saved)) == {"config.json", "tokenizer.json", weights_of(saved).name}
    assert weights_of(saved).name != old.name


@pytest.mark.parametrize("moment", ["writing weights", "describing", "moving weights", "moving config"])
def test_an_interrupted_save_leaves_the_old_model(monkeypatch, saved, moment):
    before, replace = files_of(saved), os.replace

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def interrupted_move(source, target):
        if Path(target).suffix == (".json" if moment == "moving config" else ".safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    if moment == "writing weights":
        monkeypatch.setattr(_files, "save_file", interrupted)
    elif moment == "describing":
        monkeypatch.setattr(_files, "_describe", interrupted)
    else:
        monkeypatch.setattr(os, "replace", interrupted_move)
    with pytest.raises(KeyboardInterrupt):
        mr.save(build("bert", seed=1)[0], saved)
    monkeypatch.undo()
    assert before.items() <= files_of(saved).items()
    assert not list(saved.glob(".saving-*"))
    assert mr.plan_of(mr.load(saved)) == GROUPS


def test_a_directory_can_be_moved(saved, tmp_path):
    saved.rename(tmp_path / "moved")
    assert mr.plan_of(mr.load(str(tmp_path / "moved"))) == GROUPS
