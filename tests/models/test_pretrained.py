"""Models that share maps are saved and opened by the ordinary calls of transformers, or refused by them."""

import copy
import json
import logging
import pickle
import re
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers as tf
from agreement import PLANS
from families import FAMILIES, build
from safetensors.torch import load_file
from saved_models import assert_same_model, clip, files_of, plans_in, sequence_to_sequence, task_head
from tiny_models import save_bert, save_wav2vec2, tokenizer

import mapreuse as mr

GROUPS, HEADS, IN_PART = PLANS["groups of 2"], PLANS["other heads"], PLANS["in part"]


@pytest.mark.sample(7)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["full", "groups of 2", "two sources", "in part"])
def test_from_pretrained_gives_the_saved_model_back(tmp_path, family, plan):
    model, batch = build(family)
    mr.apply(model, PLANS[plan], storage="recompute", memory_budget=10**9)
    model.save_pretrained(tmp_path)
    assert_same_model(type(model).from_pretrained(tmp_path), model, batch)
    assert_same_model(mr.load(tmp_path), model, batch)


@pytest.mark.parametrize(
    ("name", "stack", "auto"),
    [
        ("BertForMaskedLM", "bert.encoder", tf.AutoModelForMaskedLM),
        ("GPT2LMHeadModel", "transformer", tf.AutoModelForCausalLM),
        ("LlamaForCausalLM", "model", tf.AutoModelForCausalLM),
        ("ParakeetForCTC", "encoder", tf.AutoModelForCTC),
    ],
)
def test_auto_classes_open_a_model_with_a_head_and_its_base_model(tmp_path, name, stack, auto):
    model = mr.apply(task_head(name), IN_PART)
    model.save_pretrained(tmp_path)
    assert list(plans_in(model)) == [stack]
    assert_same_model(auto.from_pretrained(tmp_path), model)
    if name != "ParakeetForCTC":
        base = tf.AutoModel.from_pretrained(tmp_path, **{"add_pooling_layer": False} if "Bert" in name else {})
        assert_same_model(base, model.base_model)


def test_a_saved_base_model_can_get_a_head(tmp_path):
    model = mr.apply(tf.BertModel(task_head("BertForMaskedLM").config).eval(), GROUPS)
    model.save_pretrained(tmp_path)
    found = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert_same_model(found.bert, model)
    assert found.num_labels == 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("name", "stacks"), [("whisper", ["encoder"]), ("bart", ["encoder", "decoder"]), ("bart", ["decoder"])]
)
def test_a_model_with_converted_parts_is_saved_as_a_whole(tmp_path, name, stacks, whole):
    model, batch = sequence_to_sequence(name)
    model = model if whole else model.base_model
    for stack, plan in zip(stacks, (HEADS, GROUPS), strict=False):
        mr.apply(getattr(model.base_model, stack), plan)
    model.save_pretrained(tmp_path)
    auto = {"whisper": tf.AutoModelForSpeechSeq2Seq, "bart": tf.AutoModelForSeq2SeqLM}[name]
    if not whole:
        auto, batch = tf.AutoModel, None
    assert_same_model(auto.from_pretrained(tmp_path), model, batch)
    assert len(plans_in(model)) == len(stacks)


def test_each_stack_keeps_its_plan_storage_and_budget(tmp_path):
    model = clip()
    mr.apply(model.text_model, GROUPS, memory_budget=10**8)
    mr.apply(model.vision_model, IN_PART, storage="recompute")
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert sorted(budget or 0 for _, _, budget in plans_in(loaded).values()) == [0, 10**8]


def test_a_part_that_another_class_does_not_have_is_refused_by_name(tmp_path):
    model, _ = sequence_to_sequence("bart")
    mr.apply(model.model.encoder, GROUPS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its plan does not fit BartForCausalLM: it has no module 'model.encoder'"):
        tf.BartForCausalLM.from_pretrained(tmp_path)


def test_a_loaded_model_is_like_one_that_was_just_converted(tmp_path):
    model, _ = build("bert")
    mr.apply(model, GROUPS).save_pretrained(tmp_path / "first")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "first")
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path / "first")}
    loaded.half().float().save_pretrained(tmp_path / "second")
    again = tf.AutoModel.from_pretrained(tmp_path / "second", dtype=torch.float16)
    assert again.dtype == torch.float16
    assert plans_in(again) == plans_in(model)
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    assert loaded._keys_to_ignore_on_load_unexpected == model._keys_to_ignore_on_load_unexpected


def test_the_configuration_is_that_of_the_original(tmp_path):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is tf.BertConfig
    assert config.num_hidden_layers == 4
    assert_same_model(tf.BertModel.from_pretrained(tmp_path, config=config), model)


@pytest.mark.parametrize("plan", [None, HEADS])
def test_a_model_that_was_built_from_the_configuration_alone_is_saved_with_its_own_plan(tmp_path, plan):
    mr.apply(build("bert")[0], GROUPS).save_pretrained(tmp_path)
    model = tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(tmp_path)).eval()
    assert mr.plan_of(model) is None
    if plan is not None:
        mr.apply(model, plan)
    model.save_pretrained(tmp_path / "its own")
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path / "its own"), model)


def test_a_model_without_a_pooler_is_opened_without_it(tmp_path):
    model = mr.apply(tf.BertModel(build("bert")[0].config, add_pooling_layer=False).eval(), GROUPS)
    model.save_pretrained(tmp_path)
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path), model)
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False), model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_reads_and_writes_the_same_files(tmp_path, copied):
    model = mr.apply(build("bert")[0], IN_PART)
    copied(model).save_pretrained(tmp_path)
    other = copied(mr.apply(build("bert", seed=1)[0], IN_PART))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same_model(other, model)
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path), model)


def test_accelerate_saves_and_offloads(tmp_path):
    model, batch = build("bert")
    mr.apply(model, IN_PART)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped = accelerator.prepare(model)
    weights = accelerator.get_state_dict(wrapped)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path, state_dict=weights, save_function=accelerator.save)
    places = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
    offloaded = tf.AutoModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert torch.equal(offloaded(**batch)[0], model(**batch)[0])
    with pytest.warns(UserWarning, match="offloaded modules"):
        offloaded.save_pretrained(tmp_path / "again")
    assert_same_model(tf.AutoModel.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("opener", [tf.AutoModel.from_pretrained, mr.load])
def test_a_directory_with_the_weights_of_another_plan_is_not_opened(tmp_path, opener):
    others = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [None, 0, 1, None]})
    for name, plan in {"2x2": GROUPS, "by heads": others}.items():
        directory = tmp_path / name
        mr.apply(build("bert")[0], GROUPS).save_pretrained(directory)
        accelerate.Accelerator(cpu=True).save_model(mr.apply(build("bert", seed=1)[0], plan), directory)
        with pytest.raises(ValueError, match=r"not saved with its plan: .*; save the model again by save_pretrained"):
            opener(directory)


def test_a_directory_that_lost_its_plan_is_not_opened_and_weights_alone_are_reported(tmp_path, caplog):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path / "config over")
    (tmp_path / "config over/config.json").write_text(model.config.to_json_string())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModel.from_pretrained(tmp_path / "config over")
    build("bert")[0].save_pretrained(tmp_path / "weights over")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "weights over")
    with pytest.raises(ValueError, match="was not saved with mapreuse"):
        mr.load(tmp_path / "weights over")
    logging.getLogger("transformers").addHandler(caplog.handler)
    tf.AutoModel.from_pretrained(tmp_path / "weights over")
    assert re.search(r"attention\.self\.query\.weight .*MISSING", caplog.text)


@pytest.mark.parametrize("plan", [GROUPS, mr.ReusePlan.parse("2x2", share="keys", keys=4)], ids=["map", "keys"])
def test_a_configuration_does_not_replace_that_of_a_model_with_plans_but_another_model_does(tmp_path, plan):
    model = mr.apply(build("bert")[0], plan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would lose its plans; call save_pretrained of the model") as error:
        model.config.save_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert mr.plan_of(tf.AutoModel.from_pretrained(tmp_path)) == plan
    build("bert")[0].save_pretrained(tmp_path)
    assert mr.plan_of(tf.AutoModel.from_pretrained(tmp_path)) is None


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    mr.apply(build("bert", seed=1)[0], IN_PART).save_pretrained(tmp_path, is_main_process=False)
    assert files_of(tmp_path) == before


def test_a_model_is_saved_in_shards(tmp_path):
    model, batch = sequence_to_sequence("bart")
    mr.apply(model.model.encoder, IN_PART)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path), model, batch)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert_same_model(tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path), model, batch)


def test_a_variant_is_saved_beside_the_model(tmp_path):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="small")
    for variant in (None, "small"):
        assert_same_model(tf.AutoModel.from_pretrained(tmp_path, variant=variant), model)


def test_the_files_that_are_uploaded_are_those_that_are_saved(tmp_path, monkeypatch):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path / "saved")
    uploads = []

    def upload(self, directory, repository, *args, **options):
        uploads.append((repository, options["create_pr"], files_of(type(tmp_path)(directory))))

    class Hub:
        def create_repo(self, name, **options):
            return type("Repository", (), {"repo_id": f"me/{name}"})

    monkeypatch.setattr(tf.PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(sys.modules["transformers.utils.hub"], "hf_api", Hub)
    card = type("Card", (), {"save": lambda self, path: None})
    monkeypatch.setattr(sys.modules["transformers.utils.hub"], "create_and_tag_model_card", lambda *a, **k: card())
    model.push_to_hub("fast")
    model.save_pretrained(tmp_path / "faster", push_to_hub=True, create_pr=True)
    assert uploads == [
        ("me/fast", False, files_of(tmp_path / "saved")),
        ("me/faster", True, files_of(tmp_path / "faster")),
    ]


@pytest.mark.parametrize("task", ["text", "audio", "sentences"])
def test_a_pipeline_opens_the_directory(tmp_path, task):
    if task == "audio":
        save_wav2vec2(tmp_path / "original")
        files = tf.AutoFeatureExtractor.from_pretrained(tmp_path / "original")
        name, auto, given = "audio-classification", tf.AutoModelForAudioClassification, torch.randn(16000).numpy()
    else:
        save_bert(tmp_path / "original")
        files, given = tokenizer(), "one head is alike the next"
        name, auto = "text-classification", tf.AutoModelForSequenceClassification
    plan, model = mr.ReusePlan.grouped(3, 3), auto.from_pretrained(tmp_path / "original").eval()
    mr.apply(model.base_model, plan)
    if task == "sentences":
        from sentence_transformers import SentenceTransformer

        model.base_model.save_pretrained(tmp_path / "faster")
        files.save_pretrained(tmp_path / "faster")
        encoder = SentenceTransformer(str(tmp_path / "faster"), device="cpu")
        encoder.save_pretrained(str(tmp_path / "again"))
        again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
        assert mr.plan_of(again[0].model) == plan
        assert (encoder.encode(given) == again.encode(given)).all()
        return
    model.save_pretrained(tmp_path / "faster")
    files.save_pretrained(tmp_path / "faster")
    with torch.inference_mode():
        inputs = files(given, return_tensors="pt", **{"sampling_rate": 16000} if task == "audio" else {})
        scores = model(**inputs).logits.softmax(-1)[0]
    pipeline = tf.pipeline(name, model=str(tmp_path / "faster"), device="cpu")
    assert mr.plan_of(pipeline.model) == plan
    found = {one["label"]: one["score"] for one in pipeline(given, top_k=None)}
    assert found == pytest.approx({f"LABEL_{n}": score.item() for n, score in enumerate(scores)}, abs=1e-6)


OPENED = {
    "bert": [
        "tf.AutoConfig.from_pretrained(path)",
        "tf.AutoModel.from_pretrained(path)",
        "tf.AutoModelForMaskedLM.from_pretrained(path)",
        "tf.pipeline('fill-mask', model=path)",
        "tf.BertModel.from_pretrained(path)",
        "tf.BertForMaskedLM.from_pretrained(path, ignore_mismatched_sizes=True)",
        "tf.BertModel.from_pretrained(path, config=config)",
        "tf.BertForMaskedLM.from_pretrained(path, config=config)",
        "tf.BertForMaskedLM(config).load_state_dict(load_file(path + '/model.safetensors'), strict=False)",
    ],
    "whisper": [
        "tf.AutoModelForSpeechSeq2Seq.from_pretrained(path)",
        "tf.WhisperForConditionalGeneration.from_pretrained(path)",
        "tf.WhisperModel.from_pretrained(path)",
        "tf.WhisperModel.from_pretrained(path, config=config)",
    ],
    "clip": [
        "tf.CLIPModel.from_pretrained(path)",
        "tf.CLIPTextModel.from_pretrained(path)",
        "tf.CLIPModel.from_pretrained(path, config=config)",
    ],
}
ALONE = """
import json, sys
import transformers as tf
from safetensors.torch import load_file
errors = {}
for name, calls in json.loads(sys.argv[2]).items():
    path = f"{sys.argv[1]}/{name}"
    config = tf.AutoConfig.from_pretrained(f"{path}-original")
    for call in calls:
        try:
            eval(call)
            errors[call] = None
        except Exception as error:
            errors[call] = str(error)
assert "mapreuse" not in sys.modules
print(json.dumps(errors))
"""
MESSAGE = "this model shares attention maps, import mapreuse before opening it"


def test_a_process_without_mapreuse_opens_no_saved_model(tmp_path):
    models = {"bert": task_head("BertForMaskedLM"), "whisper": sequence_to_sequence("whisper")[0], "clip": clip()}
    parts = {"bert": "bert.encoder", "whisper": "model.encoder", "clip": "text_model"}
    for name, model in models.items():
        model.config.save_pretrained(tmp_path / f"{name}-original")
        mr.apply(model.get_submodule(parts[name]), GROUPS)
        model.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", ALONE, str(tmp_path), json.dumps(OPENED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    errors = json.loads(done.stdout)
    assert [call for call, error in errors.items() if error is None] == []
    for call, error in errors.items():
        if "config=config" in call:
            assert "ignore_mismatched_sizes" in error
        elif "load_state_dict" in call:
            assert "size mismatch" in error
        else:
            assert ("model type `mapreuse`" if "Auto" in call or "pipeline" in call else MESSAGE) in error


def test_the_original_class_refuses_the_weights_even_if_it_is_given_a_plain_configuration(tmp_path):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.BertModel.from_pretrained(tmp_path, config=tf.BertConfig(**model.config.to_dict()))


def test_saved_weights_are_read_into_a_converted_model_without_a_remark(tmp_path):
    model = mr.apply(build("bert")[0], GROUPS)
    model.save_pretrained(tmp_path)
    other = mr.apply(build("bert", seed=1)[0], GROUPS)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() > other.state_dict().keys()
    found = other.load_state_dict(stored, strict=True)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert_same_model(other, model)


def test_a_model_without_a_plan_is_saved_as_always(tmp_path):
    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True does not save plans"),
        ({"state_dict": {"pooler.dense.bias": torch.zeros(32)}}, "state_dict lacks .*embeddings.* and .* others"),
    ],
)
def test_arguments_that_would_save_less_than_the_model_are_refused(tmp_path, options, problem):
    model = mr.apply(build("bert")[0], GROUPS)
    with pytest.raises(ValueError, match=problem):
        model.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_class_of_ones_own_opens_what_it_saved(tmp_path):
    class Own(tf.BertModel):
        def save_pretrained(self, *args, **options):
            super().save_pretrained(*args, **options)

    model = mr.apply(Own(build("bert")[0].config).eval(), GROUPS)
    model.save_pretrained(tmp_path)
    assert_same_model(Own.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match=r"is not a model class that transformers defines; call its own from_pre"):
        mr.load(tmp_path)
