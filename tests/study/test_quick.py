"""The quick study, small: a tiny recogniser on real test prompts."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mapreuse.speech import LanguageModel, Recogniser, open_corpus
from mapreuse.study import QuickConfig, error_table, latency_table, run_quick


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    corpus = open_corpus("prompts:en")
    directory = tmp_path_factory.mktemp("quick")
    texts = [cut.supervisions[0].text for cut in corpus.train]
    letters = (letter for text in texts for letter in text)
    tiny = Recogniser.create(letters, num_layers=4, hidden_size=16, num_heads=2, intermediate_size=32)
    tiny.language_model = LanguageModel.train(texts, tiny.vocabulary, "en", num_words=100)
    tiny.save(directory / "tiny")
    return QuickConfig(
        corpus="prompts:en",
        baseline=str(directory / "tiny"),
        recovery_seconds=1.0,
        lengths=(20, 40),
        repeats=1,
    )


@pytest.fixture(scope="module")
def small_corpus():
    corpus = open_corpus("prompts:en")
    splits = {"train": 16, "dev": 4, "test": 6}
    return replace(corpus, **{name: getattr(corpus, name).subset(first=number) for name, number in splits.items()})


def run(config, directory):
    output = StringIO()
    results = run_quick(config, directory / "out", directory / "work", Console(file=output, width=200))
    return results, output.getvalue()


def test_the_study_writes_every_figure_and_repeats_nothing(config, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mapreuse.study._quick.open_corpus", lambda name: small_corpus)
    results, _ = run(config, tmp_path)

    assert [variant["name"] for variant in results["variants"]] == [
        "groups of 2",
        "groups of 4",
        "all from one",
        "most alike",
    ]
    for variant in results["variants"]:
        for stage in ("by_index", "aligned", "recovered", "recovered_beam+lm"):
            low, high = variant[stage]["wer_interval"]
            assert 0 <= low <= variant[stage]["wer"] <= high
        assert variant["parameters"] < results["baseline"]["parameters"]
    for encoder in ("recogniser", "conformer-m"):
        assert list(results["latency"][encoder]) == ["20", "40"]
        assert all(taken["median"] > 0 for taken in results["latency"][encoder]["20"].values())
    assert set(results["attention"]["40"]) == {"transformers", "computing", "reusing"}
    assert {"machine", "config", "command", "similarity"} <= set(results)

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    text = (tmp_path / "out" / "report.md").read_text()
    for row in (*error_table(results), *latency_table(results["attention"])):
        assert row in text
    page = (tmp_path / "out" / "report.html").read_text()
    for variant in results["variants"]:
        assert f"reuse, {variant['name']}" in page
    for plot in ("error.png", "latency.png", "similarity.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")

    again, output = run(config, tmp_path)
    assert "done before" in output
    assert not [doing for doing in ("scoring", "comparing", "timing", "fine-tuning") if doing in output]
    assert again["variants"] == results["variants"]
    assert again["latency"] == results["latency"]


def test_a_corpus_in_letters_that_the_recogniser_lacks_is_refused_at_once(config, tmp_path):
    with pytest.raises(ValueError, match="train one first: mapreuse train --corpus prompts:ru"):
        run(replace(config, corpus="prompts:ru"), tmp_path)


def test_cuda_without_a_gpu_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        run(replace(config, device="cuda"), tmp_path)
