"""Finished steps are kept and not repeated."""

import pytest
from mapreuse_lab.study._step_cache import StepCache, source_digest


def test_a_finished_step_is_read_and_not_run_again(tmp_path):
    runs = []
    for _ in range(2):
        result = StepCache(tmp_path).get("step", {"a": 1}, lambda: runs.append(1) or {"value": 0.5})
        assert result == {"value": 0.5}
    assert len(runs) == 1
    assert StepCache(tmp_path).has("step", {"a": 1})


def test_changed_inputs_make_another_step(tmp_path):
    cache = StepCache(tmp_path)
    cache.get("step", {"a": 1}, lambda: {"value": 1})

    assert not cache.has("step", {"a": 2})
    assert cache.get("step", {"a": 2}, lambda: {"value": 2}) == {"value": 2}


def test_changed_source_code_runs_a_step_again(tmp_path, monkeypatch):
    StepCache(tmp_path).get("step", {}, dict)
    monkeypatch.setattr("mapreuse_lab.study._step_cache.source_digest", lambda sources: "changed")

    assert not StepCache(tmp_path).has("step", {})


def test_a_step_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        StepCache(tmp_path / "made").get("step", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_step_depends_on_the_given_files_of_both_packages_and_no_others(tmp_path, monkeypatch):
    for package in ("mapreuse", "mapreuse_lab"):
        (tmp_path / package / "maps").mkdir(parents=True)
        (tmp_path / package / "maps/a.py").write_text("1")
        monkeypatch.setattr(f"{package}.__file__", str(tmp_path / package / "__init__.py"))
    before = source_digest(("maps",)), source_digest(None)
    for package in ("mapreuse", "mapreuse_lab"):
        (tmp_path / package / "other.py").write_text("2")
        assert source_digest(("maps",)) == before[0]
        assert source_digest(None) != before[1]
        (tmp_path / package / "maps/a.py").write_text("2")
        assert source_digest(("maps",)) != before[0]
        (tmp_path / package / "maps/a.py").write_text("1")
