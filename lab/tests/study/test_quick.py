"""The quick study, small: a tiny recogniser on real test prompts."""

import json
import shlex
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from mapreuse_lab import cli
from mapreuse_lab.study import FullConfig, QuickConfig, Recipe, error_table, latency_table, page_results, run_quick
from mapreuse_lab.study import _quick as internals
from mapreuse_lab.study import _results as full_internals
from mapreuse_lab.training import Recogniser, open_corpus
from rich.console import Console


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    corpus = open_corpus("prompts:en")
    directory = tmp_path_factory.mktemp("quick")
    letters = (letter for cut in corpus.train for letter in cut.supervisions[0].text)
    tiny = Recogniser.create(letters, num_layers=4, hidden_size=16, num_heads=2, intermediate_size=32)
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
    monkeypatch.setattr("mapreuse_lab.study._quick.open_corpus", lambda name: small_corpus)
    results, _ = run(config, tmp_path)

    assert [variant["name"] for variant in results["variants"]] == [
        "groups of 2",
        "groups of 4",
        "all from one",
        "most alike",
    ]
    for variant in results["variants"]:
        for stage in ("by_index", "aligned", "recovered"):
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


@pytest.fixture
def timed(monkeypatch):
    """What was timed: the clock has tests of its own."""
    done = []

    def encoder(model, plans, features, **settings):
        done.append(len(plans))
        return {name: {"median": 1.0, "spread": 0.0} for name in ("transformers", *plans)}

    def attention(model, features, **settings):
        done.append("attention")
        return {name: {"median": 1.0, "spread": 0.0} for name in ("transformers", "computing", "reusing")}

    monkeypatch.setattr(internals, "encoder_latency", encoder)
    monkeypatch.setattr(internals, "attention_latency", attention)
    return done


def test_times_are_taken_again_on_another_machine_and_nothing_else(
    config, small_corpus, tmp_path, monkeypatch, timed
):
    config = replace(config, recovery_seconds=0.1, lengths=(20,))
    monkeypatch.setattr(internals, "open_corpus", lambda name: small_corpus)
    monkeypatch.setattr("mapreuse_lab.study._steps.source_digest", lambda sources: "this code")
    results, _ = run(config, tmp_path)

    assert results["command"] == f"mapreuse-lab study --preset quick --corpus prompts:en --model {config.baseline}"
    assert page_results(results)["commands"] == [results["command"]]

    first = list(timed)
    assert sorted(map(str, first)) == ["4", "5", "attention"]
    run(config, tmp_path)
    assert timed == first
    elsewhere = internals.where() | {"threads": 64}
    monkeypatch.setattr(internals, "where", lambda: elsewhere)
    _, output = run(config, tmp_path)
    assert timed == first * 2
    assert not [doing for doing in ("scoring", "comparing", "fine-tuning") if doing in output]


def test_a_study_by_default_is_what_make_study_runs():
    command = "mapreuse-lab study --preset quick --corpus prompts:en"
    assert internals._command(QuickConfig()) == command
    assert internals._command(replace(QuickConfig(device="cpu"), corpus="cuts:my cuts", baseline="runs/mine")) == (
        "mapreuse-lab study --preset quick --corpus 'cuts:my cuts' --model runs/mine"
    )
    committed = json.loads((Path(__file__).parents[3] / "lab/results/study/quick/results.json").read_text())
    assert committed["command"] == command
    assert page_results(committed)["commands"] == ["make study"]


def test_a_study_on_a_gpu_says_so_in_its_command():
    assert internals._command(QuickConfig(device="cuda")).endswith("--corpus prompts:en --device cuda")


def test_the_full_studys_commands_are_those_of_its_settings():
    committed = json.loads((Path(__file__).parents[3] / "lab/results/study/full/results.json").read_text())
    assert full_internals._command(FullConfig()) == committed["command"]
    assert full_internals._commands(FullConfig()) == committed["commands"]
    other = FullConfig(corpus="librispeech:my data", other_corpus="prompts:fr", recipe=Recipe(steps=7))
    command = "mapreuse-lab study --preset full --corpus 'librispeech:my data' --other-corpus prompts:fr --steps 7"
    assert full_internals._command(other) == command
    commands = full_internals._commands(other)
    assert commands
    assert all(one.startswith(f"{command} --") for one in commands)


def test_the_full_studys_command_on_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    commands = full_internals._commands(FullConfig(device="cuda"))
    assert all(one.startswith("mapreuse-lab study --preset full --device cuda --") for one in commands)
    assert all(one.count("--device") == 1 for one in commands)


def test_a_corpus_in_letters_that_the_recogniser_lacks_is_refused_with_the_command_that_trains_one(
    config, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="train one first: mapreuse-lab train --corpus prompts:ru") as error:
        run(replace(config, corpus="prompts:ru"), tmp_path)
    command = shlex.split(str(error.value).partition("train one first: ")[2].partition(", then")[0])

    budgets = []
    monkeypatch.setattr(
        "mapreuse_lab.training.train", lambda recogniser, corpus, config, out: budgets.append(config.seconds)
    )
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code, budgets) == (0, [3600])


def test_cuda_without_a_gpu_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        run(replace(config, device="cuda"), tmp_path)
