"""The full study with tiny recognisers and a few utterances."""

import functools
import json
import shutil
from dataclasses import asdict, replace

import jiwer
import pytest
from mapreuse_lab.study import FullConfig, Recipe, papers_page, read_results, run_full
from mapreuse_lab.study import _findings as findings
from mapreuse_lab.study import _full as internals
from mapreuse_lab.study import _runs as runs_internals
from mapreuse_lab.study._runs import LongRecipe
from mapreuse_lab.training import open_corpus

from mapreuse.conversion import MIN_CONVERSION_BATCHES, Candidate
from mapreuse.models import plan_of
from mapreuse.plan import ReusePlan

RECIPE = Recipe(num_layers=4, hidden_size=16, intermediate_size=32, subsampling_channels=8, steps=2, evaluate_every=1)
CONFIG = FullConfig(
    techniques=("full", "reuse-2x2", "diagonal"),
    repeated=("full", "reuse-2x2"),
    elsewhere=("full",),
    other_corpus="prompts:ru",
    shown=("full", "reuse-2x2"),
    seeds=2,
    recipe=RECIPE,
    longer=("full", "diagonal"),
    longer_seeds=1,
    longer_recipe=LongRecipe(**(asdict(RECIPE) | {"steps": 3, "synthetic_utterances": 0})),
    lengths=(20, 40),
    memory_length=40,
    repeats=1,
)
MEMORY = {}
"""Results of `in_this_process`, by technique."""


def found(original, batches, *, error, cache):
    """Replaces the search: plans of several sizes, for a model without a plan."""
    assert plan_of(original) is None
    assert len(batches) >= MIN_CONVERSION_BATCHES
    plans = [ReusePlan.parse(text) for text in ("4x1", "[0, 0, 0, 3]", "[0, 1, 1, 3]")]
    return [Candidate(plan, error, 1.0, 1.0, 1.0, 1, None, lambda plan: original) for plan in plans]


def in_this_process(function, request):
    """Replaces the fresh process of a memory measurement, which would import everything again."""
    name = request["technique"]
    MEMORY[name] = 1000 * (len(MEMORY) + 1) + function(**request)
    return MEMORY[name]


@functools.cache
def small_corpus(name):
    corpus = open_corpus(name)
    splits = {"train": 64, "dev": 8, "test": 6}
    return replace(corpus, **{split: getattr(corpus, split).subset(first=n) for split, n in splits.items()})


def perform_here(study, left):
    """Replaces the worker processes."""
    runs_internals.perform_all(left, study.runs)
    return [0]


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        for module in (internals, runs_internals, findings):
            patch.setattr(module, "open_corpus", small_corpus)
        patch.setattr(internals._Full, "_perform", perform_here)
        patch.setattr(internals, "FLOPS_LENGTH", 50)
        patch.setattr(findings, "_PHONEME_SENTENCES", 4)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, small):
    """Results, and the directory that they are in."""
    place = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "search", found)
        patch.setattr(internals, "memory_in_fresh_process", in_this_process)
        yield run_full(CONFIG, place / "out", place / "work"), place


def refused(*args, **settings):
    raise AssertionError("this was done before")


def by_name(results):
    return {technique["name"]: technique for technique in results["techniques"]}


def test_every_run_is_finished_and_has_its_own_file(done):
    results, place = done
    expected = [one.key for one in CONFIG.runs()]
    assert [run["key"] for run in results["runs"]][: len(expected)] == expected
    assert [run["key"] for run in results["longer"]["runs"]] == [one.key for one in CONFIG.longer_runs()]
    for run in [*results["runs"], *results["longer"]["runs"]]:
        assert run["state"] == "finished"
        assert (place / "out/runs" / f"{run['key']}.json").is_file()


def test_a_searched_plan_is_one_of_the_techniques(done):
    results, place = done
    searched = results["techniques"][-1]
    assert (searched["kind"], searched["title"]) == ("reuse", "reuse 3x1,1x1, searched")
    assert searched["name"] == "reuse-3x1,1x1", "as many reusing heads as 2x2"
    assert results["runs"][-1]["technique"] == searched["name"]
    assert list((place / "out" / "runs").glob("full_*.search.json"))


def test_every_technique_is_evaluated_timed_and_compared(done):
    results, _ = done
    techniques = by_name(results)
    assert techniques["full"]["scores"]["prompts:en"]["seeds"] == [0, 1]
    assert techniques["diagonal"]["scores"]["prompts:en"]["seeds"] == [0]
    assert set(techniques["full"]["scores"]) == {"prompts:en", "prompts:ru"}
    assert "against_full" not in techniques["full"]["scores"]["prompts:en"]
    for name, technique in techniques.items():
        assert set(technique["latency"]) == {"20", "40"}
        assert set(technique["training_step"]) == {"utterances", "50"}
        assert technique["memory"]["40"] == MEMORY[name]
        if name != "full":
            compared = technique["scores"]["prompts:en"]["against_full"]["cer"]
            assert compared["interval"][0] <= compared["difference"] <= compared["interval"][1]
    flops = {name: technique["flops"]["50"] for name, technique in techniques.items()}
    assert flops["diagonal"] < flops["reuse-2x2"] < flops["full"]
    assert techniques["reuse-2x2"]["parameters"] < techniques["full"]["parameters"]
    assert set(results["references"]) == {"sdpa", "sdpa+optimize"}
    assert results["config"] == asdict(CONFIG)


def test_runs_with_the_longer_recipe_are_compared_with_each_other(done):
    results, place = done
    full, diagonal = results["longer"]["techniques"]
    assert [full["name"], diagonal["name"]] == ["full", "diagonal"]
    for one in (full, diagonal):
        key = next(run["key"] for run in results["longer"]["runs"] if run["technique"] == one["name"])
        recorded = json.loads((place / "out" / "runs" / f"{key}.json").read_text())
        assert recorded["steps"] == 3
        rate = jiwer.cer(recorded["test"]["references"], recorded["test"]["hypotheses"])
        assert one["scores"]["prompts:en"]["cer"] == pytest.approx(rate)
    loss = diagonal["scores"]["prompts:en"]["against_full"]["cer"]["difference"]
    assert loss == pytest.approx(diagonal["scores"]["prompts:en"]["cer"] - full["scores"]["prompts:en"]["cer"])


def test_findings_in_the_trained_models_are_part_of_the_results(done):
    results, _ = done
    assert len(results["similarity"]["layers"]) == len(results["similarity"]["diagonality"]) == 4
    maps = results["maps"]["techniques"]
    assert maps["full"]["source_layers"] == [0, 1, 2, 3]
    assert maps["reuse-2x2"]["source_layers"] == [0, 0, 2, 2]
    assert maps["reuse-2x2"]["layers"][0] == maps["reuse-2x2"]["layers"][1] != maps["reuse-2x2"]["layers"][2]
    assert set(results["phonemes"]["matrices"]) == {"full", "reuse-2x2"}
    assert set(results["breakdown"]["contestants"]) == {"full", "reuse-2x2"}
    assert papers_page(results).count("not measured") == 1, "only the techniques that this study lacks"


def test_results_and_report_are_written(done):
    results, place = done
    assert read_results(place / "out") == json.loads(json.dumps(results))
    text = (place / "out/report.md").read_text()
    for technique in results["techniques"]:
        assert technique["title"] in text
    assert "diagonal maps" in (place / "out/report.html").read_text()
    assert not list((place / "out").glob(".*.[0-9]*"))


def test_a_second_call_repeats_nothing(done, monkeypatch):
    results, place = done
    monkeypatch.setattr(runs_internals, "perform_all", refused)
    monkeypatch.setattr(internals, "write_report", lambda *results: None)
    for name in ("search", "technique_latency", "training_latency", "memory_in_fresh_process"):
        monkeypatch.setattr(internals, name, refused)
    for name in ("analyze", "breakdown", "phoneme_attention"):
        monkeypatch.setattr(findings, name, refused)
    assert json.dumps(run_full(CONFIG, place / "out", place / "work")) == json.dumps(results)


def test_another_machine_continues_from_the_results_without_the_weights(done, tmp_path, monkeypatch):
    results, place = done
    monkeypatch.setattr(runs_internals, "perform_all", refused)
    assert run_full(CONFIG, place / "out", tmp_path / "work", training_only=True) is None
    assert read_results(place / "out") == json.loads(json.dumps(results)), "training_only writes no results"


def test_runs_on_other_transcripts_are_refused(done, tmp_path):
    _, place = done
    shutil.copytree(place / "out", tmp_path / "out")
    file = tmp_path / "out" / "runs" / f"{CONFIG.longer_runs()[1].key}.json"
    changed = json.loads(file.read_text())
    changed["test"]["references"][3] += " more"
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=rf"{file.name} was evaluated on other transcripts than prompts:en has now"):
        run_full(CONFIG, tmp_path / "out", tmp_path / "work")


def test_memory_that_cannot_be_measured_is_left_out(done, monkeypatch, capsys):
    _, place = done

    def killed(function, request):
        raise RuntimeError("killed")

    monkeypatch.setattr(internals, "write_report", lambda *results: None)
    monkeypatch.setattr(internals, "memory_in_fresh_process", killed)
    results = run_full(replace(CONFIG, memory_length=41), place / "out", place / "work")
    assert all("memory" not in technique for technique in results["techniques"])
    assert "memory of full: not measured, killed" in capsys.readouterr().out


def test_only_prompts_have_longer_runs_by_default():
    assert FullConfig().longer
    assert set(FullConfig().longer) <= set(FullConfig().techniques)
    assert FullConfig(corpus="librispeech:there").longer == ()
    with pytest.raises(ValueError, match="heads-3: not among the study's techniques"):
        FullConfig(longer=("full", "heads-3"))


def test_an_invalid_study_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--workers must be at least 1"):
        run_full(CONFIG, tmp_path / "out", tmp_path / "work", workers=0)
    with pytest.raises(ValueError, match="no corpus 'nonsense'"):
        run_full(replace(CONFIG, corpus="nonsense"), tmp_path / "out", tmp_path / "work")
    with pytest.raises(ValueError, match="the study needs two corpora"):
        replace(CONFIG, other_corpus=CONFIG.corpus)
    assert list(tmp_path.iterdir()) == []


def test_killed_workers_are_replaced_while_runs_get_done(tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, seeds=1)
    study = internals._Full(config, tmp_path / "out", tmp_path / "work", workers=1)
    runs, calls = config.runs()[:3], []

    def killed_once(left):
        calls.append(len(left))
        if len(calls) > 3:
            raise AssertionError("it never ends")
        if len(calls) == 1:
            (study.runs.results / f"{left[0].key}.json").write_text('{"done": 1}')
        return [-9]

    monkeypatch.setattr(study, "_perform", killed_once)
    study._train(runs)
    assert calls == [3, 2], "again because a run got done, and then no more"
    assert "a worker ended with exit status -9; 2 runs are left" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_worker_processes_share_the_runs(tmp_path, workers):
    config = replace(CONFIG, seeds=1, recipe=replace(RECIPE, steps=1))
    study = internals._Full(config, tmp_path / "out", tmp_path / "work", workers)
    statuses = PERFORM(study, config.runs()[:workers])
    log = (tmp_path / "work" / "workers.log").read_text()
    assert statuses == [0] * workers
    for run in config.runs()[:workers]:
        assert study.runs.finished(run), log
        assert sum(line.endswith(run.key) for line in log.splitlines()) == 1


PERFORM = internals._Full._perform
"""The method that the fixture `small` replaces."""
