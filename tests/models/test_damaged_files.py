"""Damaged files of saved models are refused with a message of one line."""

import json

import jaxtyping
import pytest
import safetensors.torch
import torch
import transformers as tf
from agreement import PLANS
from families import build
from saved_models import assert_same_model

import mapreuse as mr

GROUPS = PLANS["groups of 2"]


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved model."""
    path = tmp_path / "model"
    mr.save(mr.apply(build("bert")[0], GROUPS), path)
    return path


DESCRIPTION = ("version", "config")
"""Top-level entries of `config.json`. Others are in the quantization_config of the original's configuration."""


def edit(path, **changes):
    """Change entries of `config.json`; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        entries = config if name in DESCRIPTION else config["config"]["quantization_config"]
        entries[name] = value
        if value is None:
            del entries[name]
    file.write_text(json.dumps(config))


def weights_of(path):
    return path / "model.safetensors"


def assert_refused(path, problem):
    with pytest.raises(ValueError, match=problem) as error:
        mr.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"4" + b[1:], lambda b: b"pickle"])
def test_damaged_weights_are_refused(saved, damage):
    weights_of(saved).write_bytes(damage(weights_of(saved).read_bytes()))
    assert_refused(saved, "the weights are truncated or damaged")


@pytest.mark.parametrize("config", [b"", b'{"model_type": "mapre', b"\xff\xfe\xff"])
def test_a_damaged_config_is_refused(saved, config):
    (saved / "config.json").write_bytes(config)
    assert_refused(saved, "is not JSON: it is truncated or damaged")


def test_a_directory_without_all_its_files_is_refused(saved):
    weights_of(saved).unlink()
    assert_refused(saved, r"no file named model.safetensors.*; copy the whole directory")
    (saved / "config.json").unlink()
    assert_refused(saved, "is not a saved model: it contains no config.json")
    saved.rmdir()
    assert_refused(saved, "is not a saved model")


OTHER_WEIGHTS = "does not contain the weights of this BertModel: "


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
    safetensors.torch.save_file({key: one for key, one in tensors.items() if one is not None}, weights_of(saved))
    assert_refused(saved, problem)


def test_a_missing_shard_is_refused(saved):
    mr.load(saved).save_pretrained(saved, max_shard_size="20KB")
    next(saved.glob("model-00002-*")).unlink()
    assert_refused(saved, "model-00002-of-.* copy the whole directory")


def test_a_directory_that_transformers_wrote_is_refused(tmp_path):
    build("bert")[0].save_pretrained(tmp_path)
    assert_refused(tmp_path, "was not saved with mapreuse; open it with transformers' from_pretrained")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert_refused(tmp_path, "was not saved with mapreuse")


def as_version(path, version):
    """Rewrite a directory as an earlier version of the format."""
    file = path / "config.json"
    config = json.loads(file.read_text())["config"]
    entries = config.pop("quantization_config") | {"model_type": "mapreuse", "version": version, "config": config}
    del entries["quant_method"], config["transformers_weights"], config["dtype"]
    file.write_text(json.dumps(entries | {"weights": "mapreuse-0123456789ab.safetensors", "sha256": ""}))
    tensors = safetensors.torch.load_file(weights_of(path))
    weights_of(path).unlink()
    safetensors.torch.save_file(
        {name: tensor for name, tensor in tensors.items() if tensor.numel()},
        path / "mapreuse-0123456789ab.safetensors",
    )


@pytest.mark.parametrize("version", [2, 3])
def test_earlier_versions_are_read(tmp_path, version):
    model, batch = build("bert")
    mr.save(mr.apply(model, PLANS["groups of 2"]), tmp_path, dtype=torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    as_version(tmp_path, version)
    assert_same_model(mr.load(tmp_path), model, batch)
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path), model, batch)


def test_the_first_version_is_read_if_the_heads_are_in_the_same_order(tmp_path):
    for plan in ("groups of 2", "in part"):
        mr.save(mr.apply(build("bert")[0], PLANS[plan]), tmp_path / plan)
        as_version(tmp_path / plan, 1)
    mr.load(tmp_path / "groups of 2")
    problem = "format version 1 stored the heads of this plan in another order; convert the original"
    assert_refused(tmp_path / "in part", problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 6}, "format version 6 is not supported; this mapreuse reads versions 1 to 5"),
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
        ({"config": []}, r"'config' must be a dict, got \[\]"),
        ({"config": {"model_type": "no_such"}}, "has no model type 'no_such'"),
        ({"config": {"model_type": "bert"}}, "'quantization_config' must be a dict, got None"),
        ({"attn_implementation": "no_such"}, 'attn_implementation="no_such"` is not supported'),
        ({"absent": ["encoder.pooler"]}, "lists 'encoder.pooler' as absent, but BertModel has no such module"),
        ({"reuse": []}, rf"{OTHER_WEIGHTS}encoder.layer.1.attention.self.key.bias is \(0,\), .* and 5"),
        ({"reuse": [{}]}, "its plan does not fit BertModel"),
        ({"reuse": [3]}, "its plan does not fit BertModel"),
    ],
)
def test_an_invalid_config_is_refused(saved, changes, problem):
    edit(saved, **changes)
    assert_refused(saved, problem)


@pytest.mark.parametrize("changes", [{"hidden_size": -3}, {"hidden_size": "wide"}, {"hidden_size": [1]}])
def test_a_configuration_that_makes_no_model_is_refused(saved, changes):
    config = json.loads((saved / "config.json").read_text())["config"]
    edit(saved, config=config | changes)
    assert_refused(saved, "config.json does not describe a BertModel")


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
        ({"memory_budget": "1 GB"}, "memory_budget, in bytes, must be a whole number, at least 1, got '1 GB'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(monkeypatch, saved, changes, problem):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside tests
    reuse = json.loads((saved / "config.json").read_text())["config"]["quantization_config"]["reuse"]
    edit(saved, reuse=[reuse[0] | changes])
    assert_refused(saved, problem)
