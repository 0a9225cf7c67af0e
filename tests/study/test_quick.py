"""The quick study, small: a tiny recogniser on real test prompts."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mapreuse.speech import LanguageModel, Recogniser, open_corpus
from mapreuse.study import QuickConfig, run_quick


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


def run(config, directory):
    output = StringIO()
    results = run_quick(config, directory / "out", directory / "work", Console(file=output, width=200))
    return results, output.getvalue()


def test_a_corpus_in_letters_that_the_recogniser_lacks_is_refused_at_once(config, tmp_path):
    with pytest.raises(ValueError, match="train one first: mapreuse train --corpus prompts:ru"):
        run(replace(config, corpus="prompts:ru"), tmp_path)


def test_cuda_without_a_gpu_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        run(replace(config, device="cuda"), tmp_path)
