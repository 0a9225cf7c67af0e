"""Saved models are loaded bit for bit, or refused with a message of one line."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import jaxtyping
import pytest
import safetensors.torch
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, build
from torch import nn

import mapreuse as mr
from mapreuse.models import _files, applied_plans

GROUPS = PLANS["groups of 2"]


def assert_same_model(ours, theirs):
    """The models have the same classes, and the same names, types and bits of all parameters and buffers."""
    assert not ours.training
    assert [str(type(module)) for module in ours.modules()] == [str(type(module)) for module in theirs.modules()]
    for named in ("named_parameters", "named_buffers"):
        ours_named, theirs_named = dict(getattr(ours, named)()), dict(getattr(theirs, named)())
        assert ours_named.keys() == theirs_named.keys()
        for name, tensor in ours_named.items():
            assert tensor.dtype == theirs_named[name].dtype, name
            assert torch.equal(tensor, theirs_named[name]), name


def task_head(name):
    """Models with a head around the stack, or parameters that are tied."""
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
    mr.save(model, tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert mr.plan_of(loaded) == PLANS[plan]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_without_a_plan_is_loaded_bit_for_bit(tmp_path, implementation):
    model, batch = build("bert", implementation=implementation)
    mr.save(model, tmp_path)
    loaded = mr.load(tmp_path)
    assert_same_model(loaded, model)
    assert mr.plan_of(loaded) is None
    assert loaded.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["ParakeetForCTC", "BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_model_with_a_head_around_its_stack_is_loaded_bit_for_bit(tmp_path, name):
    model = mr.apply(task_head(name), PLANS["in part"])
    mr.save(model, tmp_path)
    loaded = mr.load(tmp_path)
    assert_same_model(loaded, model)
    tied = [len({id(p) for _, p in m.named_parameters(remove_duplicate=False)}) for m in (model, loaded)]
    assert tied[0] == tied[1], "what was tied is tied again"
    stored = safetensors.torch.load_file(next(tmp_path.glob("*.safetensors")))
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        tensor.numel() for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {"ParakeetForCTC": "encoder", "BertForMaskedLM": "bert.encoder", "GPT2LMHeadModel": "transformer"}
    assert config["reuse"][0]["stack"] == wanted.get(name, "model")


def test_each_of_two_stacks_keeps_its_plan(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 16, "patch_size": 4})
    model = tf.CLIPModel(config).eval()
    mr.apply(model.text_model, GROUPS)
    mr.apply(model.vision_model, PLANS["in part"], storage="recompute")
    mr.save(model, tmp_path)
    loaded = mr.load(tmp_path)
    assert_same_model(loaded, model)
    assert mr.plan_of(loaded.text_model) == GROUPS
    assert mr.plan_of(loaded.vision_model) == PLANS["in part"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_file_and_changes_nothing_else(tmp_path, dtype):
    model = mr.apply(build("parakeet")[0], GROUPS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mr.save(model, tmp_path / "whole")
    mr.save(model, tmp_path / "half", dtype=dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    stored = safetensors.torch.load_file(next((tmp_path / "half").glob("*.safetensors")))
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    loaded = mr.load(tmp_path / "half")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == before[name].dtype
        rounded = before[name].to(dtype) if tensor.is_floating_point() else before[name]
        assert torch.equal(tensor, rounded.to(tensor.dtype)), name


@pytest.mark.parametrize("how", ["made in half precision", "converted to half precision", "some parts in float32"])
def test_every_tensor_gets_its_own_type_back(tmp_path, how):
    """Rotary frequencies stay in float32 in a model made in half precision, and are rounded in a converted one."""
    model, batch = build("llama")
    if how == "made in half precision":
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = tf.LlamaModel(model.config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    elif how == "converted to half precision":
        model.bfloat16()
    else:
        model.bfloat16()
        model.norm.float()
    mr.apply(model, GROUPS)
    mr.save(model, tmp_path)
    loaded = mr.load(tmp_path)
    assert_same_model(loaded, model)
    if how != "some parts in float32":
        with torch.no_grad():
            assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_generation_settings_are_kept(tmp_path):
    model = task_head("ParakeetForCTC")
    model.generation_config.max_length = 77
    mr.save(model, tmp_path)
    assert mr.load(tmp_path).generation_config.max_length == 77


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    model, _ = build("bert")
    mr.save(model, tmp_path)
    loaded = mr.load(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert_same_model(loaded, model)


def test_a_pipeline_takes_a_loaded_model(tmp_path):
    import tokenizers

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[MASK]", "the", "cat", "sat"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    )
    model = mr.apply(task_head("BertForMaskedLM"), GROUPS)
    tokenizer.save_pretrained(tmp_path)
    mr.save(model, tmp_path)
    with torch.no_grad():
        logits = model(**tokenizer("the [MASK] sat", return_tensors="pt")).logits[0, 1]
    fill = tf.pipeline("fill-mask", model=mr.load(tmp_path), tokenizer=tokenizer, device="cpu", top_k=1)
    assert fill("the [MASK] sat")[0]["token"] == logits.argmax().item()
    assert tf.AutoTokenizer.from_pretrained(tmp_path).vocab == words, "the tokenizer beside the model still opens"


class TestPlainTransformers:
    """A saved model opened without `mapreuse` must be refused, never filled with random projections."""

    @pytest.fixture
    def saved(self, tmp_path):
        mr.save(mr.apply(build("bert")[0], GROUPS), tmp_path)
        return tmp_path

    def test_auto_model_refuses(self, saved):
        with pytest.raises(ValueError, match="mapreuse"):
            tf.AutoModel.from_pretrained(saved)

    def test_the_models_own_class_refuses(self, saved):
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            tf.BertModel.from_pretrained(saved)

    def test_a_pipeline_of_the_directory_refuses(self, saved):
        with pytest.raises((ValueError, OSError)):
            tf.pipeline("fill-mask", model=str(saved))


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


def test_a_truncated_file_is_refused(saved):
    size = weights_of(saved).stat().st_size
    os.truncate(weights_of(saved), size - 1)
    assert_refused(saved, "truncated or damaged: its checksum is not the one in config.json")
    os.truncate(weights_of(saved), 0)
    assert_refused(saved, "truncated or damaged")


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_refused(saved, position):
    data = bytearray(weights_of(saved).read_bytes())
    data[int(position * len(data))] ^= 4
    weights_of(saved).write_bytes(data)
    assert_refused(saved, "truncated or damaged")


def test_missing_weights_are_refused(saved):
    weights_of(saved).unlink()
    assert_refused(saved, r"mapreuse-\w+.safetensors is missing; copy the whole directory")


def test_a_missing_config_is_refused(saved, tmp_path):
    (saved / "config.json").unlink()
    assert_refused(saved, "is not a saved model: it holds no config.json")
    assert_refused(tmp_path / "nowhere", "is not a saved model")


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "mapre', "\x00\x01", "not json"])
def test_a_corrupt_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    assert_refused(saved, "is not JSON: it is truncated or damaged")


def test_a_config_that_is_no_text_is_refused(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\xff")
    assert_refused(saved, "is not JSON: it is truncated or damaged")


def test_a_foreign_directory_is_refused(tmp_path):
    build("bert")[0].save_pretrained(tmp_path)
    assert_refused(tmp_path, "was not written by mapreuse.save; open it with transformers' from_pretrained")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert_refused(tmp_path, "was not written by mapreuse.save")


@pytest.mark.parametrize("version", [4, "2", -1])
def test_another_version_is_refused(saved, version):
    edit(saved, version=version)
    assert_refused(saved, f"format version {version!r} is not supported; this mapreuse reads versions 1 to 3")


def test_a_directory_that_mapreuse_0_1_0_saved_still_opens(tmp_path):
    model = mr.load(Path(__file__).parent / "saved_by_0_1_0")
    assert mr.plan_of(model) == mr.ReusePlan.from_sources([0, 0, 2], {1: [1, 0]})
    (applied,) = applied_plans(model).values()
    assert (applied.storage, applied.memory_budget) == ("recompute", 10**6)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0, :, 0]
    torch.testing.assert_close(states, torch.tensor([-1.5749, 0.0597, 0.1603, -0.3018]), atol=1e-4, rtol=0)
    mr.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["version"], config["reuse"][0]["storage"]) == (3, "recompute")
    assert_same_model(mr.load(tmp_path), model)


def test_the_first_version_is_read_where_heads_are_in_the_same_order(tmp_path):
    for name, plan in (("whole", PLANS["groups of 2"]), ("by heads", PLANS["in part"])):
        mr.save(mr.apply(build("bert")[0], plan), tmp_path / name)
        edit(tmp_path / name, version=1)
    mr.load(tmp_path / "whole")
    assert_refused(
        tmp_path / "by heads", "format version 1 stored the heads of this plan in another order; convert the original"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"class": "NoSuchModel"}, "has no model class 'NoSuchModel'"),
        ({"class": "BertConfig"}, "has no model class 'BertConfig'"),
        ({"class": "torch"}, "has no model class 'torch'"),
        ({"module": "os", "class": "system"}, "os.system is not a model class that transformers defines"),
        ({"module": "transformers.models.nothing"}, "has no model class"),
        ({"class": 3}, "'class' must be a str, got 3"),
        ({"class": None}, "'class' is missing"),
        ({"dtype": None}, "'dtype' is missing"),
        ({"dtype": "nn"}, "'nn' is not a floating-point type"),
        ({"dtypes": {"embeddings.word_embeddings.weight": "float"}}, None),
        ({"dtypes": {"embeddings.word_embeddings.weight": 3}}, "config.json: 3 is not a floating-point type"),
        ({"sha256": "0"}, "truncated or damaged"),
        ({"config": []}, r"'config' must be a dict, got \[\]"),
        ({"config": {"model_type": "bert", "num_attention_heads": 5}}, "config.json does not describe a BertModel"),
        ({"config": {"model_type": "bert", "hidden_size": "wide"}}, "config.json does not describe a BertModel"),
        ({"weights": "../other.safetensors"}, "'weights' must name a file in the same directory"),
        ({"weights": "other.safetensors"}, "other.safetensors is missing"),
        ({"attn_implementation": "no_such"}, "config.json does not describe a BertModel"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(saved, changes, problem):
    edit(saved, **changes)
    if problem is None:
        mr.load(saved)
    else:
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
        ({"storage": 3}, "storage 3 or memory_budget None is of a wrong type"),
        ({"memory_budget": "1 GB"}, "memory_budget '1 GB' is of a wrong type"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(saved, changes, problem):
    reuse = json.loads((saved / "config.json").read_text())["reuse"]
    edit(saved, reuse=[reuse[0] | changes])
    assert_refused(saved, problem)


@pytest.mark.parametrize("reuse", [[{}], [3], ["encoder"], [[]]])
def test_a_plan_of_another_kind_is_refused(saved, reuse):
    edit(saved, reuse=reuse)
    assert_refused(saved, "its plan does not fit BertModel")


def test_weights_of_another_plan_are_refused(saved):
    edit(saved, reuse=[])
    assert_refused(
        saved, "does not hold the weights of this BertModel: encoder.layer.1.attention.self.key.bias is missing and 7"
    )


def put(path, tensors, **changes):
    """Replace the stored weights, checksum included."""
    safetensors.torch.save_file(tensors, weights_of(path))
    edit(path, sha256=hashlib.sha256(weights_of(path).read_bytes()).hexdigest(), **changes)


def test_weights_of_other_names_or_shapes_are_refused(saved):
    tensors = safetensors.torch.load_file(weights_of(saved))
    name = "pooler.dense.weight"
    put(saved, tensors | {"extra": torch.zeros(2)})
    assert_refused(saved, "does not hold the weights of this BertModel: extra is not part of it")
    put(saved, {key: tensor for key, tensor in tensors.items() if key != name})
    assert_refused(saved, f"does not hold the weights of this BertModel: {name} is missing")
    put(saved, tensors | {name: torch.zeros(3, 2)})
    assert_refused(saved, rf"{name} is \(3, 2\), not \(32, 32\)")


def test_a_file_that_is_no_safetensors_file_is_refused_though_its_checksum_is_right(saved):
    weights_of(saved).write_bytes(b"pickle, say")
    edit(saved, sha256=hashlib.sha256(b"pickle, say").hexdigest())
    assert_refused(saved, "is not a safetensors file")


def test_only_models_that_transformers_defines_are_saved(tmp_path):
    class Own(tf.BertModel):
        pass

    with pytest.raises(
        ValueError, match="only a whole model of a class that transformers defines can be saved, got Own"
    ):
        mr.save(Own(build("bert")[0].config), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def without_pooler(model):
    built = tf.BertModel(model.config, add_pooling_layer=False).eval()
    return mr.apply(built, GROUPS)


def with_pooler_removed(model):
    model.pooler = None
    return mr.apply(model, GROUPS)


@pytest.mark.parametrize("change", [without_pooler, with_pooler_removed])
def test_a_model_without_its_pooler_is_saved_without_it(tmp_path, change):
    model, batch = build("bert")
    model = change(model)
    mr.save(model, tmp_path / "new")
    loaded = mr.load(tmp_path / "new")
    assert loaded.pooler is None
    assert mr.plan_of(loaded) == GROUPS
    assert_same_model(loaded, model)
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_an_absent_module_that_the_model_does_not_have_is_refused(saved):
    edit(saved, absent=["encoder.pooler"])
    assert_refused(saved, "lists 'encoder.pooler' as absent, but BertModel has no such module")


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


DIFFERENT = {
    "a buffer": (with_a_buffer, "seen is not part of it"),
    "a wrapped output": (with_a_wrapped_output, r"attention.output.dense.bias is missing.* and 1 others"),
    "a wider output": (with_a_wider_output, r"pooler.dense.bias is \(48,\), not \(32,\)"),
    "an untied head": (with_its_head_untied, "cls.predictions.decoder.weight is not part of it"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path, difference):
    change, problem = DIFFERENT[difference]
    model = change(build("bert")[0])
    with pytest.raises(
        ValueError, match=f"cannot be saved, because it is not the model that its .*{problem}"
    ) as error:
        mr.save(model, tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_refused_save_leaves_the_old_model(saved):
    before = {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ValueError, match="cannot be saved"):
        mr.save(with_a_buffer(build("bert", seed=1)[0]), saved)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_a_model_without_numbers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"embeddings\.\w+\.weight of this BertModel is on the meta device") as error:
        mr.save(build("bert")[0].to("meta"), tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_configuration_that_is_no_json_is_not_saved(tmp_path):
    model, _ = build("bert")
    model.config.extra = object()
    with pytest.raises(ValueError, match="the configuration of this BertModel cannot be written as JSON"):
        mr.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ["parakeet", "vit"])
def test_saving_draws_no_random_numbers(tmp_path, family):
    model, _ = build(family)
    before = torch.get_rng_state()
    mr.save(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_transformers_wrote_are_not_left_beside_a_saved_model(tmp_path):
    """Plain `from_pretrained` would open them and never know of the plan."""
    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    mr.apply(model, PLANS["groups of 2"])
    with pytest.raises(ValueError, match=r"another model's weights \(model.safetensors\)"):
        mr.save(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("loaded", [False, True])
def test_save_pretrained_of_a_model_that_shares_maps_is_refused(tmp_path, loaded):
    model = tf.BertForMaskedLM(build("bert")[0].config)
    mr.apply(model, PLANS["groups of 2"])
    if loaded:
        mr.save(model, tmp_path / "ours")
        model = mr.load(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"mapreuse\.save"):
        model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("dtype", [torch.int8, "float16", 16])
def test_weights_are_stored_as_floating_point_numbers(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside tests
    with pytest.raises(ValueError, match=re.escape(f"got {dtype!r}")) as error:
        mr.save(build("bert")[0], tmp_path / "new", dtype=dtype)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_model_whose_parameters_were_untied_stays_untied(tmp_path):
    model = task_head("GPT2LMHeadModel")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    mr.save(model, tmp_path)
    assert_same_model(mr.load(tmp_path), model)


def test_saving_over_a_directory_keeps_its_other_files_and_drops_the_old_weights(saved):
    (saved / "tokenizer.json").write_text("{}")
    old = weights_of(saved)
    model = mr.apply(build("bert", seed=1)[0], PLANS["in part"])
    mr.save(model, saved)
    assert sorted(file.name for file in saved.iterdir()) == sorted(
        ["config.json", "tokenizer.json", weights_of(saved).name]
    )
    assert weights_of(saved).name != old.name
    assert_same_model(mr.load(saved), model)
    mr.save(model, saved)
    assert_same_model(mr.load(saved), model)


@pytest.mark.parametrize("moment", ["writing weights", "describing", "moving weights", "moving config"])
def test_an_interrupted_save_leaves_the_old_model(monkeypatch, saved, moment):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    replace, moved = os.replace, []

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def interrupted_move(source, target):
        if Path(target).suffix == (".json" if moment == "moving config" else ".safetensors"):
            raise KeyboardInterrupt
        moved.append(target)
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
    for name, data in before.items():
        assert (saved / name).read_bytes() == data
    assert not list(saved.glob(".saving-*"))
    assert mr.plan_of(mr.load(saved)) == GROUPS


def test_a_directory_can_be_moved_and_copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(saved)
    assert mr.plan_of(mr.load(tmp_path / "copy")) == GROUPS
    assert mr.plan_of(mr.load(str(tmp_path / "copy"))) == GROUPS
