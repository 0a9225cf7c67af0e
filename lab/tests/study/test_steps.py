"""Finished steps are kept and never repeated."""

import pytest
from mapreuse_lab.study._steps import Steps, source_digest


def test_a_finished_step_is_read_not_run(tmp_path):
    runs = []
    for _ in range(2):
        result = Steps(tmp_path).do("step", {"a": 1}, lambda: runs.append(1) or {"value": 0.5})
        assert result == {"value": 0.5}
    assert len(runs) == 1
    assert Steps(tmp_path).is_done("step", {"a": 1})


def test_other_inputs_are_another_step(tmp_path):
    steps = Steps(tmp_path)
    steps.do("step", {"a": 1}, lambda: {"value": 1})

    assert not steps.is_done("step", {"a": 2})
    assert steps.do("step", {"a": 2}, lambda: {"value": 2}) == {"value": 2}


def test_changed_source_code_runs_a_step_again(tmp_path, monkeypatch):
    Steps(tmp_path).do("step", {}, lambda: {})
    monkeypatch.setattr("mapreuse_lab.study._steps.source_digest", lambda sources: "changed")

    assert not Steps(tmp_path).is_done("step", {})


def test_a_step_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        Steps(tmp_path / "made").do("step", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_step_depends_on_the_rooms_it_names_and_no_others(tmp_path, monkeypatch):
    root = tmp_path / "package"
    for name in ("maps/a.py", "study/b.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("1")
    monkeypatch.setattr("mapreuse.__file__", str(root / "__init__.py"))
    before = source_digest(("maps",)), source_digest(None)
    (root / "study/b.py").write_text("2")
    assert source_digest(("maps",)) == before[0]
    assert source_digest(None) != before[1]
    (root / "maps/a.py").write_text("2")
    assert source_digest(("maps",)) != before[0]
