"""Breakdown by length: parts of OpenVINO's operators, sums of layers, and resumption."""

import json

import pytest
from mapreuse_lab import cli
from mapreuse_lab.benchmarks import _breakdown, _breakdown_page
from mapreuse_lab.benchmarks._breakdown import Piece, encoder_costs, pieces
from typer.testing import CliRunner

from mapreuse.measure import PARTS

LENGTH, WIDTH, HEADS = 96, 256, 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Layers of the encoder with relative positions at one length, by the command."""
    out = tmp_path_factory.mktemp("breakdown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_breakdown, "MAX_WHOLE", LENGTH - 1)
        encoders = {"conformer-m": _breakdown.ENCODERS["conformer-m"]}
        for module in (_breakdown, _breakdown_page):
            patch.setattr(module, "ENCODERS", encoders)
        words = f"breakdown-by-length --out {out} --work {out / 'exported'} --lengths {LENGTH}"
        ran = CliRunner().invoke(cli.app, words)
        assert ran.exit_code == 0, ran.output
        assert "OpenVINO 4x4, T = 96" in ran.output
        again = CliRunner().invoke(cli.app, words)
        assert "T = 96" not in again.output, "everything is in the file"
    return out, json.loads((out / "breakdown.json").read_text())


def piece(results, contestant):
    return next(one for one in results[1]["pieces"] if one["contestant"] == contestant)


def test_the_parts_of_openvino_have_the_flops_of_their_formulas(results):
    found = piece(results, "OpenVINO 4x4")
    computing, reusing = (
        {part: cost["flops"] for part, cost in found[kind].items()} for kind in ("computing", "reusing")
    )
    projection, product = 2 * LENGTH * WIDTH**2, 2 * LENGTH**2 * WIDTH
    for part in ("query", "key", "value", "output"):
        assert computing[part] == projection
    assert computing["scores"] == computing["context"] == reusing["context"] == product
    assert computing["positional_scores"] == 2 * LENGTH * (2 * LENGTH - 1) * WIDTH
    assert computing["feed_forward"] == reusing["feed_forward"] == 2 * 2 * 2 * LENGTH * WIDTH * 1024
    assert computing["softmax"] == 0
    assert found["computing"]["softmax"]["seconds"] > 0
    assert not {"query", "key", "scores", "softmax", "positional_scores"} & reusing.keys()


def test_both_runtimes_do_the_same_products(results):
    for torch_name, other in (("mapreuse full+optimize", "OpenVINO full"), ("mapreuse 4x4+optimize", "OpenVINO 4x4")):
        in_pytorch, in_openvino = (encoder_costs(piece(results, name)) for name in (torch_name, other))
        for part in ("query", "value", "feed_forward", "convolution"):
            assert in_openvino[part]["flops"] == pytest.approx(in_pytorch[part]["flops"], rel=0.02), part


def test_costs_of_the_encoder_are_sums_of_its_layers():
    one, two, three = ({"softmax": {"seconds": s, "flops": 10 * s, "bytes": 100 * s}} for s in (1.0, 2.0, 3.0))
    full = encoder_costs({"outside": one, "computing": two})
    shared = encoder_costs({"outside": one, "computing": two, "reusing": three})
    assert full == {"softmax": {"seconds": 33.0, "flops": 330.0, "bytes": 3300.0}}
    assert shared == {"softmax": {"seconds": 45.0, "flops": 450.0, "bytes": 4500.0}}


def test_every_length_is_measured_in_some_way():
    found = list(pieces())
    assert {one.length for one in found} == set(_breakdown.LENGTHS)
    assert {one.whole for one in found if one.length == _breakdown.MAX_WHOLE} == {True, False}
    assert all(one.num_layers <= 2 for one in found if one.length > _breakdown.MAX_WHOLE)
    assert Piece("conformer-m", "mapreuse 4x4+optimize", 30000, False).storage == "dense8"


def test_what_does_not_fit_is_not_run_and_its_size_is_stated(results, tmp_path, monkeypatch):
    monkeypatch.setattr(_breakdown, "MAX_MEMORY", 1e-9)
    found = _breakdown._measured(Piece("conformer-m", "OpenVINO full", LENGTH, False), results[0] / "exported", 1)
    assert found["needed_bytes"] >= 4 * HEADS * LENGTH * (2 * LENGTH - 1), "the scores by distance"
    assert "take 0.0 GB" in found["not_measured"]
    assert "not_measured" in _breakdown._measured(Piece("conformer-m", "sdpa", LENGTH, False), tmp_path, 1)


def test_the_page_has_a_table_for_each_kind_of_layer_and_a_plot(results):
    out, found = results
    page = (out / "README.md").read_text()
    assert "### conformer-m, OpenVINO 4x4: a reusing layer" in page
    assert "### conformer-m, sdpa: a computing layer" in page
    assert "### conformer-m, sdpa: a reusing layer" not in page
    assert "Not measured yet, or not all of it: T = 250, 500," in page
    assert (out / "breakdown.png").stat().st_size > 10_000
    assert set(_breakdown_page.ATTENTION) < set(PARTS)
    shown = {part for parts in _breakdown_page._GROUPS.values() for part in parts}
    assert shown == set(PARTS)
    assert len(found["pieces"]) == len(_breakdown.CONTESTANTS)
