"""Every file of examples/ runs, on tiny models in place of those that its first lines name."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_models import SENTENCES, SIZE, tokenizer

import mapreuse as mr

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def sentences(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join(SENTENCES * 11))
    return file


def save_model(directory, model_class):
    torch.manual_seed(0)
    model_class(tf.BertConfig(**SIZE, vocab_size=40)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def test_every_example_is_short_and_tested():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files if len(file.read_text().splitlines()) >= 60] == []
    tests = Path(__file__).read_text()
    assert [file.name for file in files if f'main_of("{file.stem}")' not in tests] == []


def test_embeddings(tmp_path, sentences):
    directory = save_model(tmp_path / "bert", tf.BertModel)
    transformer = Transformer(str(directory))
    SentenceTransformer(modules=[transformer, Pooling(SIZE["hidden_size"])], device="cpu").save(
        str(tmp_path / "model")
    )
    out = tmp_path / "out"
    similarity = main_of("embeddings")([str(tmp_path / "model"), str(sentences), str(out), "--plan", "1x1,2x1"])
    assert similarity > 0.9
    assert mr.plan_of(mr.load(out)).reuses(2)


def test_long_audio_prints_what_the_untouched_model_does(tmp_path):
    torch.manual_seed(0)
    front = {"conv_dim": (16, 16), "conv_stride": (16, 16), "conv_kernel": (16, 16), "num_feat_extract_layers": 2}
    config = tf.Wav2Vec2ConformerConfig(
        **SIZE,
        **front,
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=3,
        layerdrop=0.0,
        vocab_size=4,
    )
    directory = tmp_path / "model"
    model = tf.Wav2Vec2ConformerForCTC(config).eval()
    model.save_pretrained(directory)
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "|": 1, "a": 2, "b": 3}')
    letters = tf.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", pad_token="<pad>", unk_token="<pad>")
    processor = tf.Wav2Vec2Processor(tf.Wav2Vec2FeatureExtractor(sampling_rate=16000), letters)
    processor.save_pretrained(directory)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", samples, 16000, subtype="FLOAT")
    with torch.inference_mode():
        logits = model(**processor(samples, sampling_rate=16000, return_tensors="pt")).logits
    (expected,) = processor.batch_decode(logits.argmax(-1))
    assert len(expected) > 10
    assert main_of("long_audio")([str(directory), str(tmp_path / "noise.wav")]) == expected


def test_trainer(tmp_path):
    directory = save_model(tmp_path / "model", tf.BertForSequenceClassification)
    labelled = tmp_path / "labelled.tsv"
    labelled.write_text("\n".join(f"{number % 2}\t{text}" for number, text in enumerate(SENTENCES * 8)))
    loss = main_of("trainer")([str(directory), str(labelled), str(tmp_path / "out"), "--plan", "1x1,2x1"])
    assert 0 < loss < 1
    assert mr.plan_of(mr.load(tmp_path / "out")).reuses(2)


@pytest.mark.usefixtures("regular_times")
def test_search_budget(tmp_path):
    model = main_of("search_budget")(["--error", "0.1", "--out", str(tmp_path / "out")])
    assert not mr.plan_of(model).is_full
    assert mr.plan_of(mr.load(tmp_path / "out")) == mr.plan_of(model)
