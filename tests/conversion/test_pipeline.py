"""Conversions in memory and into a directory, which continue after an interrupt."""

import copy
import doctest
import json

import pytest
import torch
from families import build
from text_batches import random_batches

import mapreuse as mr
from mapreuse.conversion import _pipeline, check_output, convert_to_directory, copy_companions
from mapreuse.conversion._output_dir import new_directory
from mapreuse.conversion._search import split_batches
from mapreuse.models import _optimize

GROUPS = mr.ReusePlan.grouped(4, 2)


@pytest.fixture(scope="module")
def bert():
    return build("bert")[0]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def converted(original, batches, out, save=mr.save, **options):
    """The converted model, as it is saved, and the report."""
    saved = []

    def keep(model, directory):
        saved.append(model)
        save(model, directory)

    report = convert_to_directory(original, batches, out, keep, **options)
    return saved[0], report


def test_the_examples_run():
    outcome = doctest.testmod(_pipeline)
    assert outcome.attempted
    assert not outcome.failed


def test_convert_with_batches_aligns_applies_and_refits_a_copy(bert):
    batches, before = random_batches(8), copy.deepcopy(bert.state_dict())
    by_hand = mr.apply(copy.deepcopy(bert), mr.align(bert, GROUPS, batches))
    mr.refit(by_hand, bert, batches)
    shared = mr.convert(bert, GROUPS, iter(batches))
    assert mr.plan_of(shared) == mr.plan_of(by_hand)
    assert mr.plan_of(bert) is None
    assert all(torch.equal(before[name], weight) for name, weight in bert.state_dict().items())
    assert all(torch.equal(by_hand.state_dict()[name], weight) for name, weight in shared.state_dict().items())


def test_convert_without_batches_applies_the_plan_as_it_is_with_the_given_storage():
    model, batch = build("bert")
    plan = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 3, 0, 1]})
    dense, recomputed = (mr.convert(model, plan, storage=storage) for storage in ("dense", "recompute"))
    assert mr.plan_of(dense) == mr.plan_of(recomputed) == plan
    with torch.no_grad():
        outputs = [one(**batch).last_hidden_state for one in (dense, recomputed)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_conversion_stopped_in_distillation_continues_with_its_plan_and_weights(
    bert, tmp_path, regular_times, monkeypatch
):
    """Even if linear layers use another library afterwards, in which products round differently."""
    batches, given = random_batches(11), {"budget": {"error": 0.05}, "distill_seconds": 1.0, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(_pipeline, "distill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(bert, batches, **given)
    kept = json.loads((tmp_path / "out.work" / "refitted" / "found.json").read_text())
    before = {}

    def noted(model, *args, **kwargs):
        before.update(copy.deepcopy(model.state_dict()))

    monkeypatch.setattr(_pipeline, "distill", noted)
    for name in ("search", "align", "refit", "relative_latencies"):
        monkeypatch.setattr(_pipeline, name, None)
    monkeypatch.setattr(_optimize, "onednn_is_faster", lambda threads: not torch.backends.mkldnn.is_available())
    model, report = converted(bert, batches, **given)
    assert report.plan == mr.plan_of(model) == mr.ReusePlan.from_json(kept["plan"])
    assert {name: report.errors[name] for name in ("aligned", "refitted")} == kept["errors"]
    refitted = mr.apply(copy.deepcopy(bert), report.plan)
    mr.refit(refitted, bert, split_batches(batches)[0])
    for name, weight in refitted.state_dict().items():
        torch.testing.assert_close(before[name], weight, rtol=1e-3, atol=1e-5)


def test_a_plan_from_a_search_is_not_refitted_and_timed_again(bert, tmp_path, regular_times, monkeypatch):
    batches = random_batches(8)
    (*_, fastest) = mr.search(bert, batches, error=0.1)
    by_hand = mr.apply(copy.deepcopy(bert), fastest.plan)
    mr.refit(by_hand, bert, split_batches(batches)[0])
    for name in ("align", "refit", "relative_latencies"):
        monkeypatch.setattr(_pipeline, name, None)
    model, report = converted(bert, batches, tmp_path / "out", budget={"error": 0.1})

    assert report.plan == fastest.plan == mr.plan_of(model)
    assert not report.plan.is_full
    assert report.errors["refitted"] == pytest.approx(fastest.error)
    assert report.errors["refitted"] < report.errors["aligned"]
    assert (report.latency, report.exact_latency) == (pytest.approx(fastest.latency), 1.0)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_work_that_is_damaged_or_of_another_conversion_is_not_used(bert, tmp_path, regular_times):
    out, work = tmp_path / "out", tmp_path / "out.work" / "refitted"

    def stopped(batches, plan=GROUPS):
        with pytest.raises(KeyboardInterrupt):
            converted(bert, batches, out, save=interrupted, plan=plan)

    stopped(random_batches(8))
    whole = {name: (work / name).read_bytes() for name in ("model.safetensors", "found.json")}
    for name, damage in (("model.safetensors", whole["model.safetensors"][:9]), ("found.json", b"[1]")):
        (work / name).write_bytes(damage)
        stopped(random_batches(8))
        assert (work / name).read_bytes() == whole[name]
    for batches, plan in ((random_batches(8, seed=5), GROUPS), (random_batches(8), mr.ReusePlan.grouped(4, 4))):
        stopped(batches, plan)
        assert (work / "found.json").read_bytes() != whole["found.json"]
    _, report = converted(bert, random_batches(8), out, plan=GROUPS)
    assert report.errors == json.loads(whole["found.json"])["errors"]
    assert not (tmp_path / "out.work").exists()


def test_a_plan_without_reuse_is_not_distilled(bert, tmp_path, regular_times, monkeypatch):
    monkeypatch.setattr(_pipeline, "distill", None)
    options = {"plan": mr.ReusePlan.full(4), "distill_seconds": 1.0}
    model, report = converted(bert, random_batches(11), tmp_path / "out", **options)
    assert mr.plan_of(model).is_full
    assert "distilled" not in report.errors
    assert any("nothing to distil" in line for line in report.lines())


def test_only_files_of_the_model_are_copied_and_may_be_written_to(tmp_path):
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
    copy_companions(model, tmp_path / "work" / "out")
    out = tmp_path / "work" / "out"
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"vocab.json", "modules.json", "2_Dense/model.safetensors", "notes/card.md"}
    for folder in (out, out / "notes"):
        assert folder.stat().st_mode & 0o700 == 0o700
    for folder in (model, model / "notes"):
        folder.chmod(0o755)


def test_a_work_directory_with_other_files_is_refused_and_kept(tmp_path):
    work = tmp_path / "model.work"
    for name in ("learned/sums", "thesis.txt"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds thesis\.txt, but the conversion keeps its work there"),
        new_directory(tmp_path / "model"),
    ):
        pass
    assert (work / "thesis.txt").read_text() == (work / "learned" / "sums").read_text() == "mine"
    (work / "thesis.txt").unlink()
    with new_directory(tmp_path / "model") as written:
        (written / "config.json").write_text("{}")
        (work / "thesis.txt").write_text("mine")  # after the check
    assert (tmp_path / "model" / "config.json").is_file()
    assert [file.name for file in work.iterdir()] == ["thesis.txt"]
    (work / "thesis.txt").unlink()
    with new_directory(tmp_path / "another") as written:
        (written / "config.json").write_text("{}")
    assert not (tmp_path / "another.work").exists()
    (tmp_path / "third.work").write_text("a file")
    with pytest.raises(ValueError, match="is a file: move it"):
        check_output(tmp_path / "third")


def test_the_report_of_a_decoder_shows_what_it_caches(tmp_path, regular_times):
    _, report = converted(build("llama")[0], random_batches(8), tmp_path / "out", plan=GROUPS)
    table = report.lines()[0].splitlines()
    assert table[1] == "cache: 384 bytes a token (512 without sharing: -25.0%)"
    assert table[2].endswith(" 128 bytes")
    assert table[3].endswith("  64 bytes")
