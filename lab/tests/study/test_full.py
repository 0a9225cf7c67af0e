"""The full study, small: tiny recognisers on real prompts, two workers, every step of it."""

import json
import shutil
from dataclasses import asdict, replace
from io import StringIO

import jiwer
import pytest
from mapreuse_lab.study import FullConfig, LongRecipe, Recipe, papers_page, run_full, summary_table
from mapreuse_lab.study import _findings as findings
from mapreuse_lab.study import _full as internals
from mapreuse_lab.training import open_corpus
from rich.console import Console

from mapreuse.conversion import MIN_CONVERSION_BATCHES, Candidate
from mapreuse.models import plan_of
from mapreuse.plan import ReusePlan

RECIPE = Recipe(num_layers=4, hidden_size=16, intermediate_size=32, subsampling_channels=8, steps=2, evaluate_every=1)
CONFIG = FullConfig(
    techniques=("full", "reuse-2x2", "window-2", "diagonal"),
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


def found(original, batches, *, error, cache):
    """In the place of the search, which has tests of its own: plans of several sizes for a model without a plan."""
    assert plan_of(original) is None
    assert len(batches) >= MIN_CONVERSION_BATCHES
    plans = [ReusePlan.parse(text) for text in ("4x1", "[0, 0, 0, 3]", "[0, 1, 1, 3]")]
    return [Candidate(plan, error, 1.0, 1.0, 1.0, 1, lambda plan: original) for plan in plans]


MEMORY = {}
"""What `in_this_process` said of every technique."""


def in_this_process(function, request):
    """Processes of their own have tests in the room that measures; each would import everything once more."""
    name = request["technique"]
    MEMORY[name] = 1000 * (len(MEMORY) + 1) + function(**request)
    return MEMORY[name]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Results, where they are, and what was printed."""
    place = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "FLOPS_LENGTH", 50)
        patch.setattr(internals, "search", found)
        patch.setattr(internals, "memory_in_fresh_process", in_this_process)
        patch.setattr(findings, "_PHONEME_SENTENCES", 4)
        output = StringIO()
        results = run_full(CONFIG, place / "out", place / "work", Console(file=output, width=200), workers=2)
        yield results, place, output.getvalue()


def by_name(results):
    return {technique["name"]: technique for technique in results["techniques"]}


def test_every_run_is_done_by_one_of_two_workers(done):
    results, place, _ = done
    assert [run["state"] for run in results["runs"]] == ["finished"] * len(results["runs"])
    expected = [one.key for one in CONFIG.runs()]
    assert [run["key"] for run in results["longer"]["runs"]] == [one.key for one in CONFIG.longer_runs()]
    assert [run["state"] for run in results["longer"]["runs"]] == ["finished", "finished"]
    assert [run["key"] for run in results["runs"]][: len(expected)] == expected
    log = (place / "work" / "workers.log").read_text()
    for key in expected:
        assert sum(line.endswith(key) for line in log.splitlines()) == 1, key


def test_a_searched_plan_joins_the_table(done):
    results, place, _ = done
    searched = results["techniques"][-1]
    assert searched["kind"] == "reuse"
    assert searched["name"] == "reuse-3x1,1x1", "as many reusing heads as 2x2"
    assert results["runs"][-1]["technique"] == searched["name"]
    assert list((place / "out" / "runs").glob("full_*.search.json"))


def test_every_technique_is_judged_timed_and_compared(done):
    results, _, _ = done
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
            found = technique["scores"]["prompts:en"]["against_full"]["cer"]
            assert found["interval"][0] <= found["difference"] <= found["interval"][1]
            assert found["found"] in ("better", "worse", "no difference found")
    flops = {name: technique["flops"]["50"] for name, technique in techniques.items()}
    assert flops["diagonal"] < flops["reuse-2x2"] < flops["full"]
    assert techniques["reuse-2x2"]["parameters"] < techniques["full"]["parameters"]
    assert set(results["reference"]["latency"]) == {"20", "40"}


def test_runs_by_the_longer_recipe_are_compared_with_one_another(done):
    results, place, _ = done
    full, diagonal = results["longer"]["techniques"]
    assert [full["name"], diagonal["name"]] == ["full", "diagonal"]
    for one in (full, diagonal):
        key = next(run["key"] for run in results["longer"]["runs"] if run["technique"] == one["name"])
        recorded = json.loads((place / "out" / "runs" / f"{key}.json").read_text())
        assert recorded["steps"] == 3
        rate = jiwer.cer(recorded["test"]["references"], recorded["test"]["hypotheses"])
        assert one["scores"]["prompts:en"]["cer"] == pytest.approx(rate)
    lost = diagonal["scores"]["prompts:en"]["against_full"]["cer"]["difference"]
    assert lost == pytest.approx(diagonal["scores"]["prompts:en"]["cer"] - full["scores"]["prompts:en"]["cer"])
    assert any(sentence.startswith("Trained for longer") for sentence in results["verdict"])


def test_only_one_voices_recordings_are_put_together():
    assert FullConfig().longer
    assert set(FullConfig().longer) <= set(FullConfig().techniques)
    assert FullConfig(corpus="librispeech:there").longer == ()
    with pytest.raises(ValueError, match="heads-3: not among the study's techniques"):
        FullConfig(longer=("full", "heads-3"))


def test_results_that_were_judged_by_other_transcripts_are_refused(done, tmp_path):
    _, place, _ = done
    shutil.copytree(place / "out", tmp_path / "out")
    file = tmp_path / "out" / "runs" / f"{CONFIG.longer_runs()[1].key}.json"
    changed = json.loads(file.read_text())
    changed["test"]["references"][3] += " more"
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=rf"{file.name} was judged by other transcripts than prompts:en has here"):
        run_full(CONFIG, tmp_path / "out", tmp_path / "work", Console(file=StringIO()))


def test_what_the_papers_look_at_is_there(done):
    results, _, _ = done
    assert len(results["similarity"]["layers"]) == len(results["similarity"]["diagonality"]) == 4
    maps = results["maps"]["techniques"]
    assert maps["full"]["source_layers"] == [0, 1, 2, 3]
    assert maps["reuse-2x2"]["source_layers"] == [0, 0, 2, 2]
    assert maps["reuse-2x2"]["layers"][0] == maps["reuse-2x2"]["layers"][1] != maps["reuse-2x2"]["layers"][2]
    assert set(results["phonemes"]["matrices"]) == {"full", "reuse-2x2"}
    assert set(results["breakdown"]["contestants"]) == {"full", "reuse-2x2"}
    assert all(claim["ours"] for claim in results["papers"])
    assert results["papers"][0]["claim"] in papers_page(results)


def test_the_report_is_written_and_reads_back(done):
    results, place, _ = done
    out = place / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for technique in results["techniques"]:
        assert technique["title"] in text
    assert results["verdict"][0] in text
    assert "diagonal maps" in page
    assert len(summary_table(results)) == 2 + len(results["techniques"])
    assert not list(out.glob(".*.[0-9]*"))


def test_started_again_it_repeats_nothing(done, monkeypatch):
    results, place, _ = done
    for name in ("get_context", "search", "technique_latency", "training_latency", "memory_in_fresh_process"):
        monkeypatch.setattr(internals, name, None)
    monkeypatch.setattr(internals, "FLOPS_LENGTH", 50)
    for name in ("analyze", "breakdown", "phoneme_attention"):
        monkeypatch.setattr(findings, name, None)
    again = run_full(CONFIG, place / "out", place / "work", Console(file=StringIO()), workers=2)
    assert json.dumps(again) == json.dumps(results)


def test_another_machine_goes_on_with_what_the_results_hold(done, tmp_path, monkeypatch):
    """Results travel, weights do not: nothing is trained again, and the findings that were kept are shown."""
    results, place, _ = done
    monkeypatch.setattr(internals, "get_context", None)
    there = run_full(CONFIG, place / "out", tmp_path / "work", Console(file=StringIO()), training_only=True)
    assert there["runs"] == results["runs"]
    assert json.loads((place / "out" / "results.json").read_text()) == json.loads(json.dumps(results)), "left alone"
    assert "latency" not in by_name(there)["full"]
    assert by_name(there)["full"]["scores"] == by_name(results)["full"]["scores"]


def test_a_study_that_cannot_run_says_so_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--workers must be at least 1"):
        run_full(CONFIG, tmp_path / "out", tmp_path / "work", Console(file=StringIO()), workers=0)
    with pytest.raises(ValueError, match="no corpus 'nonsense'"):
        run_full(replace(CONFIG, corpus="nonsense"), tmp_path / "out", tmp_path / "work", Console(file=StringIO()))
    for changed, message in (
        ({"device": "gpu"}, "--device must be cpu or cuda"),
        ({"other_corpus": CONFIG.corpus}, "needs two corpora"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **changed)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_the_system_ends_is_replaced_as_long_as_runs_get_done(tmp_path, monkeypatch):
    config = replace(CONFIG, techniques=("full", "reuse-2x2", "diagonal"), seeds=1)
    output = StringIO()
    study = internals._Full(config, tmp_path / "out", tmp_path / "work", Console(file=output, width=200), workers=1)
    runs, asked = config.runs()[:3], []

    def killed_once(left):
        asked.append(len(left))
        if len(asked) > 3:
            raise AssertionError("it goes on for ever")
        if len(asked) == 1:
            (study.runs.results / f"{left[0].key}.json").write_text('{"done": 1}')
        return [-9]

    monkeypatch.setattr(study, "_work_off", killed_once)
    study._train(runs)
    assert asked == [3, 2], "once more, since a run got done, and then no more"
    assert "a worker ended with exit status -9; 2 runs are left" in output.getvalue()


def test_memory_that_cannot_be_measured_is_left_out_and_said(done, monkeypatch):
    _, place, _ = done

    def killed(function, request):
        raise RuntimeError("its process was ended by SIGKILL; out of memory, most likely")

    for name in ("get_context", "search", "technique_latency", "training_latency"):
        monkeypatch.setattr(internals, name, None)
    monkeypatch.setattr(internals, "FLOPS_LENGTH", 50)
    monkeypatch.setattr(internals, "memory_in_fresh_process", killed)
    output = StringIO()
    config = replace(CONFIG, memory_length=41)
    found = run_full(config, place / "out", place / "work", Console(file=output, width=200), workers=2)
    assert all("memory" not in technique for technique in found["techniques"])
    assert "memory of full: not measured, its process was ended by SIGKILL" in output.getvalue()
    assert set(by_name(found)["full"]["latency"]) == {"20", "40"}


def test_the_settings_are_kept_with_the_results(done):
    results, _, _ = done
    assert results["config"] == asdict(CONFIG)
    assert open_corpus("prompts:en").attribution == results["corpora"]["prompts:en"]["attribution"]
