"""What `analyze` found, shown: tables, JSON, plots, and one page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from families import build

from mapreuse.measure import analysis_page, analysis_tables, analyze, heat_maps, write_analysis
from mapreuse.measure._analysis_page import contrast, level_colours

SAID = {"model": "a <model>", "calibration": "some & texts", "command": "mapreuse analyze 'a <model>'"}


@pytest.fixture(scope="module")
def analysis():
    model, batch = build("bert")
    return analyze(model, [batch], epsilon=0.1)


class Tables(HTMLParser):
    """The cells of every table of a page, by its caption, and all that the page would fetch."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.fetched, self.caption, self.cell = {}, [], None, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "caption":
            self.caption = ""
        self.cell = dict(attributes).get("class") if tag == "td" else None

    def handle_endtag(self, tag):
        self.cell = None
        if tag == "caption":
            self.tables[self.caption] = []

    def handle_data(self, text):
        if self.caption is not None and self.caption not in self.tables:
            self.caption += text
        elif self.cell and text.strip():
            self.tables[self.caption].append((self.cell, text.strip()))


def test_the_page_shows_every_value_as_text_on_the_colour_of_its_level(analysis):
    tables = Tables(analysis_page(analysis, **SAID)).tables

    assert len(tables) == 1 + 1 + 3  # layers; heads, of three measures under one caption; three pairs of neighbours
    cells = tables["layer that computes ↓, layer that reuses →"]
    values = analysis.similarity.layers.flatten().tolist()
    assert [text for _, text in cells] == [f"{value:.2f}" for value in values]
    assert [level for level, _ in cells] == [f"c{round(20 * min(value, 1))}" for value in values]
    pair = tables["layers 1 and 2: head of the layer before ↓, head of the layer →"]
    assert [text for _, text in pair] == [f"{v:.2f}" for v in analysis.similarity.heads[1, :, 2].flatten().tolist()]


def test_the_page_fetches_nothing_and_names_what_it_shows(analysis):
    page = analysis_page(analysis, **SAID)

    assert Tables(page).fetched == []
    assert not re.search(r"url\(|@import|<script|<link|https?:", page)
    assert "<h1>Attention maps of a &lt;model&gt;</h1>" in page
    assert "some &amp; texts" in page
    assert "a <model>" not in page
    assert "prefers-color-scheme:dark" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_number_can_be_read_on_its_colour_and_colours_grow_away_from_the_page(scheme):
    colours = level_colours(scheme)
    page = (255, 255, 255) if scheme == "light" else (13, 17, 23)
    distances = [contrast(background, page) for background, _ in colours]

    assert all(contrast(background, text) >= 4.5 for background, text in colours)
    assert distances == sorted(distances)
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_json_plots_and_page_are_written_and_hold_the_measures(analysis, tmp_path):
    write_analysis(analysis, tmp_path / "new" / "folder", **SAID)
    written = tmp_path / "new" / "folder"
    data = json.loads((written / "analysis.json").read_text())

    names = ["similarity", "entropy", "diagonality", "concentration", "neighbours"]
    assert {file.name for file in written.iterdir()} == {"analysis.json", "index.html", *(f"{n}.png" for n in names)}
    assert [shown.name for shown in heat_maps(analysis)] == names
    for name in names:
        assert (written / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (written / f"{name}.png").stat().st_size < 100_000
    for value, expected in (
        (data["similarity"]["heads"], analysis.similarity.heads),
        (data["similarity"]["layers"], analysis.similarity.layers),
        (data["entropy"]["heads"], analysis.entropy.heads),
        (data["entropy"]["relative"], analysis.entropy.relative),
        (data["diagonality"]["heads"], analysis.diagonality.heads),
        (data["diagonality"]["curve"], analysis.diagonality.curve),
        (data["concentration"]["heads"], analysis.concentration.heads),
    ):
        torch.testing.assert_close(torch.tensor(value), expected, atol=0.5001e-4, rtol=0)
    assert (data["num_queries"], data["concentration"]["epsilon"], data["command"]) == (16, 0.1, SAID["command"])


def test_tables_match_every_head_with_the_most_similar_one_of_the_layer_before(analysis):
    layers, matches, *rest = analysis_tables(analysis)

    assert [row[0] for row in layers.rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in layers.rows] == ["", *(f"{analysis.similarity.layers[i, i + 1]:.2f}" for i in range(3))]
    for layer, head in ((1, 0), (3, 2)):
        alike = analysis.similarity.heads[layer - 1, :, layer, head]
        assert matches.rows[layer - 1][head + 1] == f"{alike.argmax()}: {alike.max():.2f}"
    assert [table.title for table in rest] == ["Entropy", "Diagonality", "Concentration"]
    assert rest[1].rows[2][1:] == [f"{value:.2f}" for value in analysis.diagonality.heads[2].tolist()]


def test_a_model_of_one_layer_has_no_neighbours_to_show(analysis):
    model, batch = build("bert")
    model.encoder.layer = model.encoder.layer[:1]
    found = analyze(model, [batch])

    assert "neighbours" not in [shown.name for shown in heat_maps(found)]
    assert len(analysis_tables(found)) == 4
    assert "Layers: 1; heads in each: 4" in analysis_page(found, **SAID)
