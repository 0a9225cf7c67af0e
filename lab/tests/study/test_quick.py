"""The quick study with a tiny recogniser on a few utterances."""

import itertools
import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from mapreuse_lab import cli
from mapreuse_lab.study import QuickConfig, Recipe, read_results, report, run_quick, summary_tables, verdict
from mapreuse_lab.study import _quick as internals
from mapreuse_lab.training import Recogniser, open_corpus

from mapreuse import ReusePlan
from mapreuse.measure import Similarity


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    corpus = open_corpus("prompts:en")
    directory = tmp_path_factory.mktemp("quick")
    letters = (letter for cut in corpus.train for letter in cut.supervisions[0].text)
    tiny = Recogniser.create(letters, num_layers=4, hidden_size=16, num_heads=2, intermediate_size=32)
    tiny.save(directory / "tiny")
    settings = {"recovery_seconds": 0.2, "lengths": (20, 40), "repeats": 1, "pretrained": None}
    return QuickConfig(corpus="prompts:en", baseline=str(directory / "tiny"), **settings)


@pytest.fixture
def small(monkeypatch):
    """A few utterances, and a narrow encoder in place of Conformer-M."""
    corpus = open_corpus("prompts:en")
    splits = {"train": 16, "dev": 4, "test": 6}
    few = replace(corpus, **{name: getattr(corpus, name).subset(first=number) for name, number in splits.items()})
    monkeypatch.setattr(internals, "open_corpus", lambda name: few)
    narrow = Recipe(num_layers=16, hidden_size=16, intermediate_size=32, subsampling_channels=8)
    monkeypatch.setattr(internals, "conformer_m", lambda num_mels: narrow.create("en", None, 0).model.encoder.eval())


@pytest.fixture
def timed(monkeypatch):
    """Titles of what was timed; neither timing nor report take time."""
    done = []

    def encoder(title, encoders, features, **settings):
        done.append(title)
        return {name: {"median": 1.0, "spread": 0.0} for name in encoders}

    def attention(title, encoder, features, **settings):
        done.append(title)
        return {name: {"median": 1.0, "spread": 0.0} for name in ("sdpa", "computing", "reusing")}

    monkeypatch.setattr(internals, "encoder_variants", lambda encoder, plans, optimized: {"sdpa": 0, **plans})
    monkeypatch.setattr(internals, "encoder_latency", encoder)
    monkeypatch.setattr(internals, "attention_latency", attention)
    monkeypatch.setattr(internals, "write_report", lambda *results: None)
    return done


def run(config, directory):
    return run_quick(config, directory / "out", directory / "work")


def test_the_study_writes_all_results_and_a_report(config, small, tmp_path):
    results = run(config, tmp_path)
    names = ["groups of 2", "groups of 4", "all from one", "most alike"]
    assert [variant["name"] for variant in results["variants"]] == names
    for variant in results["variants"]:
        for stage in ("by_index", "aligned", "recovered"):
            low, high = variant[stage]["wer_interval"]
            assert 0 <= low <= variant[stage]["wer"] <= high
        assert variant["parameters"] < results["baseline"]["parameters"]
    for encoder, plans in (("recogniser", {"full", *names}), ("conformer-m", {"full", *names[:3]})):
        assert list(results["latency"][encoder]) == ["20", "40"]
        optimized = {f"{name}+optimize" for name in ("sdpa", "full", *names[:2])}
        assert set(results["latency"][encoder]["20"]) == {"sdpa", *plans, *optimized}
        assert all(one["median"] > 0 for one in results["latency"][encoder]["20"].values())
    assert set(results["attention"]["40"]) == {"sdpa", "computing", "reusing"}

    assert read_results(tmp_path / "out") == json.loads(json.dumps(results))
    text = (tmp_path / "out" / "report.md").read_text()
    for table in summary_tables(results):
        assert table.markdown() in text
    assert all(sentence in text for sentence in verdict(results))
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    for plot in ("error.png", "latency.png", "similarity.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_repeats_nothing_and_another_machine_repeats_the_timing(
    config, small, tmp_path, monkeypatch, timed, capsys
):
    config = replace(config, lengths=(20,))
    results = run(config, tmp_path)
    first = list(timed)
    assert first == ["latency-recogniser, T = 20", "latency-conformer-m, T = 20", "attention, T = 20"]

    for name in ("evaluate", "analyze", "train"):
        monkeypatch.setattr(internals, name, None)
    capsys.readouterr()
    assert run(config, tmp_path) == results
    assert timed == first
    assert capsys.readouterr().out.count("finished before") == 9

    elsewhere = internals.timing_environment() | {"threads": 64}
    monkeypatch.setattr(internals, "timing_environment", lambda: elsewhere)
    run(config, tmp_path)
    assert timed == first * 2


def test_a_pretrained_recogniser_is_recovered_with_its_first_plan_and_timed_with_all(
    config, small, tmp_path, monkeypatch, timed, small_moonshine
):
    corpus = internals.open_corpus("prompts:en")
    monkeypatch.setattr("mapreuse_lab.models._speech.open_corpus", lambda name: corpus)
    monkeypatch.setattr(internals, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))
    config = replace(
        config,
        pretrained=str(small_moonshine),
        pretrained_plans=("2x2", "1x4", "decoder 2x2"),
        pretrained_recovery_seconds=0.2,
        pretrained_lengths=(1,),
        lengths=(20,),
    )
    results = run(config, tmp_path)
    quality = results["pretrained"]["quality"]
    assert list(quality["2x2"]) == ["original", "by index", "aligned", "refitted", "recovered"]
    for name in ("1x4", "decoder 2x2"):
        assert list(quality[name]) == ["original", "by index", "aligned", "refitted"]
    ((_, found),) = results["pretrained"]["latency"]["batches"].items()
    names = {"sdpa", "mapreuse full", "mapreuse 2x2", "mapreuse 1x4"}
    assert names <= {name for name, one in found["contestants"].items() if "median" in one}

    *_, table = summary_tables(results)
    assert [row[0] for row in table.rows] == ["full (original)", "2x2", "1x4", "decoder 2x2"]
    assert set(results["pretrained"]["transcription"]) == {"full", "2x2", "1x4", "decoder 2x2"}
    assert "2x2 " in table.notes[0]
    assert table.markdown() in report(results)
    assert "whole transcription" in report(results)
    assert "of recovery" in verdict(results)[0]


@pytest.mark.parametrize("seed", range(3))
def test_plans_by_similarity_are_the_best_of_all(seed):
    measured = Similarity(torch.rand(6, 3, 6, 3, generator=torch.Generator().manual_seed(seed)), 100)
    plan = internals.most_similar_heads(measured, ReusePlan.from_sources([0, 0, 2, 2, 2, 5]))
    for layer, source in ((1, 0), (3, 2), (4, 2)):
        for head, (from_layer, from_head) in enumerate(plan.heads(layer, 3)):
            alike = measured.heads[source, :, layer, head]
            assert (from_layer, alike[from_head]) == (source, alike.max())

    def total(plan):
        return sum(measured.layers[plan.sources(m)[0], m].item() for m in range(6) if plan.reuses(m))

    cuts = itertools.product((True, False), repeat=5)
    firsts = [[0, *(m for m, cut in enumerate(one, start=1) if cut)] for one in cuts if sum(one) == 2]
    plans = [ReusePlan.from_sources([max(f for f in starts if f <= m) for m in range(6)]) for starts in firsts]
    assert total(internals.most_similar_groups(measured, 3)) == max(map(total, plans))


def test_a_recogniser_without_the_letters_of_the_corpus_is_refused_with_a_command_that_works(
    config, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="Train one first: mapreuse-lab train --corpus prompts:ru") as error:
        run(replace(config, corpus="prompts:ru"), tmp_path)
    command = shlex.split(str(error.value).partition("Train one first: ")[2].partition(", then")[0])

    budgets = []
    monkeypatch.setattr(
        "mapreuse_lab.training.train", lambda recogniser, corpus, config, out: budgets.append(config.seconds)
    )
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code, budgets) == (0, [3600])
