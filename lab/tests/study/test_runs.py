"""Training runs are named after their settings, done once, and continued after an interruption."""

import json
from dataclasses import replace

import pytest
import torch
from mapreuse_lab.study import FullConfig, Recipe
from mapreuse_lab.study import _runs as internals
from mapreuse_lab.study._runs import Run, RunDirectory, perform_all
from mapreuse_lab.training import Recogniser, open_corpus

TINY = Recipe(num_layers=4, hidden_size=16, intermediate_size=32, subsampling_channels=8, steps=4, evaluate_every=2)


@pytest.fixture
def small_corpus(monkeypatch):
    corpus = open_corpus("prompts:en")
    splits = {"train": 16, "dev": 3, "test": 4}
    small = replace(corpus, **{name: getattr(corpus, name).subset(first=number) for name, number in splits.items()})
    monkeypatch.setattr(internals, "open_corpus", lambda name: small)
    return small


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "results", tmp_path / "work")


def run(technique="full", **settings):
    return Run(technique, "prompts:en", 0, replace(TINY, **settings))


def test_every_setting_of_a_run_changes_its_key():
    runs = [
        run(),
        run("window-16"),
        run(steps=5),
        run(learning_rate=1e-3),
        Run("full", "prompts:es", 0, TINY),
        Run("full", "prompts:en", 1, TINY),
    ]
    assert len({one.key for one in runs}) == len(runs)
    assert run().key == run().key
    assert run().key.startswith("full_prompts-en_0_")
    assert len(run("reuse-" + json.dumps({"layers": list(range(300))})).key) < 120, "a valid file name"


def test_a_finished_run_is_kept_and_not_repeated(small_corpus, directory, monkeypatch):
    perform_all([run("window-2+reuse-2x2")], directory)
    result = directory.finished(run("window-2+reuse-2x2"))
    assert [line["step"] for line in result["learning_curve"]] == [2, 4]
    assert result["steps"] == 4
    assert result["test"]["references"] == [cut.supervisions[0].text for cut in small_corpus.test]
    assert len(result["test"]["hypotheses"]) == 4
    assert result["machine"]["torch"]
    weights = directory.weights(run("window-2+reuse-2x2"))
    assert Recogniser.is_saved_in(weights)
    assert not list(weights.parent.glob("checkpoint-*"))
    assert directory.progress(run("window-2+reuse-2x2")) == 1.0
    monkeypatch.setattr(internals, "train", None)
    perform_all([run("window-2+reuse-2x2")], directory)


def test_a_run_that_fails_keeps_its_error_and_the_others_continue(small_corpus, directory):
    bad, good = run("reuse-9x9"), run("diagonal")
    perform_all([bad, good], directory)
    assert "the plan has 81 layers" in directory.failed(bad)["error"]
    assert directory.finished(bad) is None
    assert directory.finished(good) is not None
    assert directory.failed(good) is None
    directory.forget_failures([bad])
    assert directory.failed(bad) is None


def test_a_run_that_another_worker_has_locked_is_skipped(small_corpus, directory):
    other = RunDirectory(directory.results, directory.work)
    with directory.lock(run().key):
        perform_all([run(), run("diagonal")], other)
        assert directory.finished(run()) is None
        assert directory.finished(run("diagonal")) is not None
    perform_all([run()], other)
    assert directory.finished(run()) is not None


def test_a_killed_run_continues_from_its_checkpoint_with_the_same_result(small_corpus, tmp_path, monkeypatch):
    unbroken = RunDirectory(tmp_path / "unbroken", tmp_path / "work")
    perform_all([run(steps=6)], unbroken)

    broken = RunDirectory(tmp_path / "broken", tmp_path / "other")
    take, calls = torch.optim.AdamW.step, iter(range(10))

    def interrupted(optimizer, *args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return take(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            perform_all([run(steps=6)], broken)
    assert broken.finished(run(steps=6)) is None
    assert broken.progress(run(steps=6)) == pytest.approx(1 / 3)
    log = tmp_path / "other" / run(steps=6).key / "log.jsonl"
    log.write_text(log.read_text() + log.read_text().replace('"step": 2', '"step": 4') + '{"step": 5, "lo')
    perform_all([run(steps=6)], broken)
    one, other = (d.finished(run(steps=6)) for d in (unbroken, broken))
    assert one["test"] == other["test"]
    curves = [[(line["step"], line["loss"], line["dev_cer"]) for line in d["learning_curve"]] for d in (one, other)]
    assert curves[0] == curves[1]


def test_the_runs_of_a_study_are_unique_and_the_repeated_techniques_come_first():
    config = FullConfig()
    runs = config.runs()
    assert len({one.key for one in runs}) == len(runs)
    assert [one.technique for one in runs[:4]] == list(config.repeated)
    count = len(config.techniques)
    assert len(runs) == count + config.seeds * len(config.elsewhere) + (config.seeds - 1) * len(config.repeated)
    assert {one.technique for one in runs} == set(config.techniques)
