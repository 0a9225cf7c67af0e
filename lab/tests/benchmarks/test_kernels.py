"""The benchmark of attention kernels; never how fast they were."""

import json

import pytest
from mapreuse_lab import cli
from mapreuse_lab.benchmarks import _kernels, bench_kernels, kernel_tables
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(_kernels, "_calls_per_turn", lambda length: 1)


def test_kernels_are_compared_with_their_products_and_by_length():
    results = bench_kernels((100, 200), repeats=2)
    found = results["lengths"]["200"]

    assert results["agreement"] < 1e-5
    assert set(found["ratios"]) == {
        "reusing kernel ÷ map × values",
        "computing kernel ÷ sum of its products",
        "computing kernel, map kept ÷ sum of its products",
    }
    turns = zip(*(found["kernels"][name]["seconds"] for name in found["sum of products"]["blocks"]), strict=True)
    assert found["sum of products"]["seconds"] == pytest.approx([sum(times) for times in turns])
    assert set(results["growth"]["100 → 200"]) == {
        "reusing kernel",
        "map × values",
        "computing kernel",
        "computing kernel, map kept",
    }
    assert json.loads(json.dumps(results))["lengths"] == results["lengths"]
    for table in kernel_tables(results):
        assert all(len(row) == len(table.header) for row in table.rows)


def test_the_command_times_kernels(tmp_path):
    file = tmp_path / "kernels.json"
    ran = CliRunner().invoke(cli.app, f"bench --kernels --lengths 50,100 --repeats 1 --json {file}")

    assert ran.exit_code == 0, ran.output
    assert "Growth" in ran.stdout
    assert set(json.loads(file.read_text())["lengths"]) == {"50", "100"}


def test_a_kernel_with_a_wrong_output_is_not_timed(monkeypatch):
    attend = _kernels.attend

    def wrong(scores, values, **settings):
        context, weights = attend(scores, values, **settings)
        return context.roll(1, -2), weights

    monkeypatch.setattr(_kernels, "attend", wrong)
    with pytest.raises(ValueError, match="differs from the attention of transformers"):
        bench_kernels((100,))
