"""The measurements for a GPU, tried on the CPU: groups, resumption and the page; never how fast it was."""

import dataclasses
import json

import pytest
import torch
from mapreuse_lab import cli
from mapreuse_lab.benchmarks import _gpu
from mapreuse_lab.benchmarks._encoder_bench import ENCODERS
from mapreuse_lab.benchmarks._gpu import Group, groups, run_gpu
from mapreuse_lab.models import conformer_m, minilm
from typer.testing import CliRunner

GROUPS = (
    Group("attention", "conformer-m", "bfloat16", 2, (40, 100)),
    Group("attention", "minilm", "float32", 1, (30,)),
    Group("breakdown", "minilm", "float32", 1, (30,)),
)


@pytest.fixture
def shallow(monkeypatch):
    builders = {
        "conformer-m": lambda length: conformer_m(num_layers=4),
        "minilm": lambda length: minilm(length, num_layers=4),
    }
    for name, build in builders.items():
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], build=build))
        monkeypatch.setitem(_gpu.PLANS, name, "full,2x2,4x1")


def test_all_settings_of_the_comparison_are_measured_once():
    found = list(groups())
    assert len(found) == len(set(found))
    attention = {
        (one.encoder, one.dtype, one.batch_size, length)
        for one in found
        if one.kind == "attention"
        for length in one.lengths
    }
    assert len(attention) == 2 * 2 * 2 * 6
    assert {one.encoder for one in found if one.kind == "compiled"} == {"conformer-m", "minilm"}


def test_groups_are_measured_saved_and_shown(tmp_path, shallow, monkeypatch):
    results = run_gpu(tmp_path, seconds=1e9, device="cpu", chosen=GROUPS, repeats=1)
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert [one["kind"] for one in saved["groups"]] == ["attention", "attention", "breakdown"]
    names = {"eager", "sdpa", "mapreuse full"}
    names |= {f"mapreuse {plan}{s}" for plan in ("2x2", "4x1") for s in ("", " dense16", " dense8", " recompute")}
    for cells in (at["contestants"] for at in saved["groups"][0]["results"]["batches"].values()):
        assert cells.keys() == names
        assert all("median" in cell for cell in cells.values()), cells
    page = (tmp_path / "README.md").read_text()
    assert "| mapreuse 4x1 recompute |" in page
    assert "## minilm, float32, T = 30: GB" in page
    assert results["tests"] == "not run"

    measured = []
    monkeypatch.setattr(_gpu, "_measured", lambda group, *_: measured.append(group) or {"batches": {}})
    monkeypatch.setattr(_gpu, "groups", lambda: [*GROUPS, Group("attention", "minilm", "float32", 8, (30,))])
    run_gpu(tmp_path, seconds=1e9, device="cpu")
    assert [one.batch_size for one in measured] == [8], "the others are in the file"


def test_no_group_begins_that_would_probably_not_end_in_time(tmp_path, monkeypatch):
    clock = [0.0]

    def measured(*_):
        clock[0] += 40
        return {"batches": {}}

    monkeypatch.setattr(_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(_gpu, "_measured", measured)
    results = run_gpu(tmp_path, seconds=150, device="cpu")
    assert len(results["groups"]) == 3  # after 120 seconds, another 40 would fit, but not 60


def test_a_contestant_that_fails_is_noted(tmp_path, shallow, monkeypatch):
    def fail(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_gpu, "ATTENTIONS", {"eager": fail})
    run_gpu(tmp_path, seconds=1e9, device="cpu", chosen=GROUPS[1:2], repeats=1)
    page = (tmp_path / "README.md").read_text()
    assert "- eager, T = 30: not measured: OutOfMemoryError: CUDA out of memory" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    ran = CliRunner().invoke(cli.app, f"gpu --out {tmp_path / 'gpu'}")
    assert isinstance(ran.exception, ValueError)
    assert "this machine has no CUDA GPU" in str(ran.exception)
    assert not (tmp_path / "gpu").exists()
