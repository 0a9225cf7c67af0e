"""Results of `analyze`: tables, JSON and a page."""

import json
import sys

import pytest
import torch
from families import build

from mapreuse.measure import analysis_tables, analyze, write_analysis

NAMES = {"model": "a <model>", "calibration": "some & texts", "command": "mapreuse analyze 'a <model>'"}


@pytest.fixture(scope="module")
def analysis():
    model, batch = build("bert")
    return analyze(model, [batch])


def test_json_and_page_are_written_and_hold_the_measures(analysis, tmp_path):
    write_analysis(analysis, tmp_path / "new" / "folder", **NAMES)
    written = tmp_path / "new" / "folder"
    data = json.loads((written / "analysis.json").read_text())
    page = (written / "index.html").read_text()

    assert {file.name for file in written.iterdir()} == {"analysis.json", "index.html"}
    for value, expected in (
        (data["similarity"]["heads"], analysis.similarity.heads),
        (data["similarity"]["layers"], analysis.similarity.layers),
        (data["entropy"]["heads"], analysis.entropy),
        (data["entropy"]["relative"], analysis.relative_entropy),
        (data["diagonality"]["heads"], analysis.diagonality),
        (data["diagonality"]["curve"], analysis.diagonality_curve),
    ):
        torch.testing.assert_close(torch.tensor(value), expected, atol=0.5001e-4, rtol=0)
    assert (data["num_queries"], data["command"]) == (16, NAMES["command"])
    assert "<h1>Attention maps of a &lt;model&gt;</h1>" in page
    assert "some &amp; texts" in page
    assert page.count("Plotly.newPlot(") >= 3 + 3 + 1, "three measures, three pairs of layers, and the curves"


def test_without_plotly_tables_and_json_are_written_and_a_line_names_what_is_missing(
    analysis, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "plotly", None)
    write_analysis(analysis, tmp_path, **NAMES)

    assert (tmp_path / "analysis.json").is_file()
    assert "Most similar head of the layer before" in (tmp_path / "index.html").read_text()
    assert "plotly is not installed" in caplog.text
    assert "pip install 'mapreuse[plots]'" in caplog.text


def test_tables_match_each_head_with_the_most_similar_head_of_the_layer_before(analysis):
    layers, matches, *rest = analysis_tables(analysis)

    assert [row[0] for row in layers.rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in layers.rows] == ["", *(f"{analysis.similarity.layers[i, i + 1]:.2f}" for i in range(3))]
    for layer, head in ((1, 0), (3, 2)):
        alike = analysis.similarity.heads[layer - 1, :, layer, head]
        assert matches.rows[layer - 1][head + 1] == f"{alike.argmax()}: {alike.max():.2f}"
    assert [table.title for table in rest] == ["Entropy", "Diagonality"]
    assert rest[1].rows[2][1:] == [f"{value:.2f}" for value in analysis.diagonality[2].tolist()]


def test_a_model_of_one_layer_has_no_neighbours_to_show(tmp_path):
    model, batch = build("bert")
    model.encoder.layer = model.encoder.layer[:1]
    found = analyze(model, [batch])
    write_analysis(found, tmp_path, **NAMES)

    assert len(analysis_tables(found)) == 3
    page = (tmp_path / "index.html").read_text()
    assert "Layers: 1; heads in each: 4" in page
    assert "Heads of neighbouring layers" not in page
