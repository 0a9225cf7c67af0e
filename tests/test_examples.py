"""Every file of examples/ runs: without arguments on its own small model, and with them on files."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from tiny_models import SENTENCES, SIZE, tokenizer

import mapreuse as mr

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_tested():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files if len(file.read_text().splitlines()) >= 60] == []
    tests = Path(__file__).read_text()
    assert [file.name for file in files if f'example("{file.stem}")' not in tests] == []


def test_embeddings(tmp_path):
    embeddings = example("embeddings")
    model, sentences = embeddings.small_model()
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    given = [model, str(tmp_path / "sentences.txt"), "--plan", "2x3", "--out", str(tmp_path / "out")]
    assert embeddings.main([]) > 0.9
    assert embeddings.main(given) > 0.9
    assert mr.plan_of(mr.load(tmp_path / "out")).reuses(5)


def test_the_long_audio_example_transcribes_as_the_original_model_does(tmp_path):
    torch.manual_seed(0)
    long_audio = example("long_audio")
    model, processor = long_audio.small_model()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", samples, 16000, subtype="FLOAT")
    with torch.inference_mode():
        logits = model(**processor(samples, sampling_rate=16000, return_tensors="pt")).logits
    (expected,) = processor.batch_decode(logits.argmax(-1))
    assert len(expected) > 10
    assert long_audio.main([str(tmp_path / "model"), str(tmp_path / "noise.wav")]) == expected
    assert long_audio.main([])


def test_trainer(tmp_path):
    trainer = example("trainer")
    tf.BertForSequenceClassification(tf.BertConfig(**SIZE, vocab_size=40)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    labelled = tmp_path / "labelled.tsv"
    labelled.write_text("\n".join(f"{number % 2}\t{text}" for number, text in enumerate(SENTENCES * 8)))
    given = [str(tmp_path / "model"), str(labelled), "--plan", "1x1,2x1", "--out", str(tmp_path / "out")]
    assert 0 < trainer.main(given) < 1
    assert 0 < trainer.main([]) < 1
    assert mr.plan_of(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")).reuses(2)
    assert tf.pipeline("text-classification", model=str(tmp_path / "out"))(SENTENCES[0])


def test_generate(tmp_path):
    generate = example("generate")
    original, batches, turns = generate.small_model()
    plan = mr.ReusePlan.parse("1x2,2x1")
    model, text = mr.convert(original, plan, batches), torch.empty(1, 0, dtype=torch.int64)
    for turn in turns:
        text = torch.cat([text, turn], 1)
        text = model.generate(
            text, attention_mask=torch.ones_like(text), use_cache=False, max_new_tokens=8, do_sample=False
        )
    assert torch.equal(generate.main(["--out", str(tmp_path / "out")]), text)
    assert mr.plan_of(mr.load(tmp_path / "out")) == mr.plan_of(model)


@pytest.mark.usefixtures("regular_times")
def test_search_budget(tmp_path):
    model = example("search_budget").main(["--error", "0.1", "--out", str(tmp_path / "out")])
    assert not mr.plan_of(model).is_full
    assert mr.plan_of(mr.load(tmp_path / "out")) == mr.plan_of(model)
