"""A whole conversion: goes on where it was stopped, with what it had found."""

import copy
import json

import pytest
import torch
from families import build
from text_batches import random_batches

import mapreuse as mr
from mapreuse.conversion import _pipeline, check_work, convert_whole, copy_companions, written_whole
from mapreuse.models import _linear


@pytest.fixture(scope="module")
def bert():
    return build("bert")[0]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_conversion_stopped_in_distillation_goes_on_with_the_plan_and_the_weights_it_had(
    bert, tmp_path, regular_times, monkeypatch
):
    """Also where linear layers are taken to another library meanwhile, in which products round otherwise."""
    batches, given = random_batches(24), {"budget": {"error": 0.5}, "distill_seconds": 1.0, "work_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(_directory, "distill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_whole(bert, batches, **given)
    kept = json.loads((tmp_path / "refitted" / "found.json").read_text())
    before = {}

    def noted(model, *args, **kwargs):
        before.update(copy.deepcopy(model.state_dict()))

    monkeypatch.setattr(_directory, "distill", noted)
    for name in ("search", "align", "refit", "relative_latencies"):
        monkeypatch.setattr(_directory, name, None)
    monkeypatch.setattr(_linear, "onednn_is_faster", lambda threads: not torch.backends.mkldnn.is_available())
    model, report = convert_whole(bert, batches, **given)
    assert report.plan == mr.plan_of(model) == mr.ReusePlan.from_json(kept["plan"])
    assert {name: report.errors[name] for name in ("aligned", "refitted")} == kept["errors"]
    refitted = mr.apply(copy.deepcopy(bert), report.plan)
    mr.refit(refitted, bert, _pipeline.calibrating_and_judging(batches)[0])
    for name, weight in refitted.state_dict().items():
        torch.testing.assert_close(before[name], weight, rtol=1e-3, atol=1e-5)


def test_what_a_search_refitted_and_timed_is_not_refitted_and_timed_again(bert, regular_times, monkeypatch):
    batches = random_batches(12)
    (*_, fastest) = mr.search(bert, batches, error=0.3)
    by_hand = mr.apply(copy.deepcopy(bert), fastest.plan)
    mr.refit(by_hand, bert, _pipeline.calibrating_and_judging(batches)[0])
    for name in ("align", "refit", "relative_latencies"):
        monkeypatch.setattr(_directory, name, None)
    model, report = convert_whole(bert, batches, budget={"error": 0.3})

    assert report.plan == fastest.plan == mr.plan_of(model)
    assert not report.plan.is_full
    assert report.errors["refitted"] == pytest.approx(fastest.error)
    assert report.errors["refitted"] < report.errors["aligned"]
    assert (report.latency, report.exact_latency) == (pytest.approx(fastest.latency), 1.0)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "found.json"])
def test_what_was_kept_and_is_damaged_does_not_count(bert, tmp_path, regular_times, name):
    given = {"plan": mr.ReusePlan.grouped(4, 2), "work_dir": tmp_path}
    _, before = convert_whole(bert, random_batches(8), **given)
    file = tmp_path / "refitted" / name
    for damage in (file.read_bytes()[:9], b"{}", b"[1]"):
        file.write_bytes(damage)
        model, report = convert_whole(bert, random_batches(8), **given)
        assert (report.plan, report.errors) == (before.plan, before.errors)
        assert mr.plan_of(model) == report.plan


def test_what_was_kept_of_other_batches_or_of_another_budget_does_not_count(bert, tmp_path, regular_times):
    given = {"plan": mr.ReusePlan.grouped(4, 2), "work_dir": tmp_path}
    convert_whole(bert, random_batches(8), **given)
    other_plan = {**given, "plan": mr.ReusePlan.grouped(4, 4)}
    for batches, other in ((random_batches(8, seed=5), given), (random_batches(8), other_plan)):
        _, report = convert_whole(bert, batches, **other)
        _, afresh = convert_whole(bert, batches, plan=other["plan"])
        assert (report.plan, report.errors) == (afresh.plan, afresh.errors)


def test_a_plan_without_reuse_is_not_distilled(bert, regular_times, monkeypatch):
    monkeypatch.setattr(_directory, "distill", None)
    model, report = convert_whole(bert, random_batches(24), plan=mr.ReusePlan.full(4), distill_seconds=1.0)
    assert mr.plan_of(model).is_full
    assert "distilled" not in report.errors


def test_only_what_belongs_to_the_model_is_copied_and_may_be_written_to(tmp_path):
    model = tmp_path / "model"
    for name in (
        "vocab.json",
        "model.safetensors",
        "2_Dense/model.safetensors",
        "notes/card.md",
        "checkpoint-5/model.safetensors",
        "converted/mapreuse-1.safetensors",
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    (model / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (model / "dangling").symlink_to(tmp_path / "nowhere")
    for folder in (model / "notes", model):
        folder.chmod(0o555)
    copy_companions(model, tmp_path / "out", work_dir=tmp_path / "work")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"vocab.json", "modules.json", "2_Dense/model.safetensors", "notes/card.md"}
    for folder in (tmp_path / "out", tmp_path / "out" / "notes"):
        assert folder.stat().st_mode & 0o700 == 0o700
    for folder in (model, model / "notes"):
        folder.chmod(0o755)


def test_a_directory_of_work_that_holds_other_files_is_refused_and_kept(tmp_path):
    work = tmp_path / "model.work"
    for name in ("search.jsonl", "thesis.txt"):
        work.mkdir(exist_ok=True)
        (work / name).write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds thesis\.txt, which is not of a conversion"),
        written_whole(tmp_path / "model", work),
    ):
        pass
    assert (work / "thesis.txt").read_text() == (work / "search.jsonl").read_text() == "mine"
    (work / "thesis.txt").unlink()
    with written_whole(tmp_path / "model", work) as written:
        (written / "config.json").write_text("{}")
        (work / "thesis.txt").write_text("mine")  # after it was looked at
    assert (tmp_path / "model" / "config.json").is_file()
    assert [file.name for file in work.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="holds thesis"):
        check_work(work)
    (work / "thesis.txt").unlink()
    with written_whole(tmp_path / "another", work) as written:
        (written / "config.json").write_text("{}")
    assert not work.exists()
    work.write_text("a file")
    with pytest.raises(ValueError, match="is a file: move it"):
        check_work(work)
