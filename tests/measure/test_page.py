"""Pages of HTML: complete in one file, and safe to fill with any text."""

import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from mapreuse.console import Table
from mapreuse.measure import Image, Section, write_page

graph_objects = pytest.importorskip("plotly.graph_objects")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
    "45400000000049454e44ae426082"
)


class Fetched(HTMLParser):
    """Every address that a browser would load for a page."""

    def __init__(self, page):
        super().__init__()
        self.addresses = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def written(tmp_path, *sections):
    write_page(tmp_path / "new" / "page.html", "A <title>", sections)
    return (tmp_path / "new" / "page.html").read_text()


def test_text_is_escaped_and_markup_is_not(tmp_path):
    table = Table("Times & sizes", ["<model>", "ms"], [["a<b", "1"], [Markup("<b>bold</b>"), "2"]], ["see <note>"])
    page = written(tmp_path, Section("Speed", ["1 < 2", Markup("<i>kept</i>"), table]))

    for expected in ("A &lt;title&gt;", "1 &lt; 2", "<i>kept</i>", "&lt;model&gt;", "a&lt;b", "<b>bold</b>"):
        assert expected in page
    assert "<caption>Times &amp; sizes</caption>" in page
    assert '<p class="note">see &lt;note&gt;</p>' in page
    assert not re.search(r"<script|https?:", page), "a page without figures needs no script"


def test_a_page_with_figures_and_images_loads_nothing_from_elsewhere(tmp_path):
    (tmp_path / "pixel.png").write_bytes(PIXEL)
    figures = [graph_objects.Figure(graph_objects.Scatter(y=[1, 2])) for _ in range(3)]
    before = figures[0].to_dict()
    page = written(
        tmp_path, Section("One", figures[:2]), Section("Two", [figures[2], Image(tmp_path / "pixel.png", "dot")])
    )

    (address,) = Fetched(page).addresses
    assert address.startswith("data:image/png;base64,")
    assert page.count("Plotly.newPlot(") >= 3
    assert len(page) < 8_000_000, "plotly's script is in the page once"
    assert figures[0].to_dict() == before


def test_a_page_follows_the_colour_scheme_of_the_reader(tmp_path):
    page = written(tmp_path, Section("", ["text"]))

    assert "prefers-color-scheme:dark" in page
    assert "<h2" not in page
