"""Finished steps are kept and not repeated."""

import pytest
from mapreuse_lab.study._step_cache import StepCache, source_digest


def test_a_step_is_repeated_only_if_its_inputs_or_the_source_code_change(tmp_path, monkeypatch):
    runs = []
    for inputs in ({"a": 1}, {"a": 1}, {"a": 2}):
        result = StepCache(tmp_path).get("step", inputs, lambda: {"runs": runs.append(1) or len(runs)})
    assert result == {"runs": 2}
    assert StepCache(tmp_path).get("step", {"a": 1}, dict) == {"runs": 1}
    assert not StepCache(tmp_path).has("step", {"a": 3})

    monkeypatch.setattr("mapreuse_lab.study._step_cache.source_digest", lambda sources: "changed")
    assert not StepCache(tmp_path).has("step", {"a": 1})


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
