"""One page of HTML with text, tables and figures, which needs no network."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from mapreuse.console import Table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GRID = "rgba(128,128,128,0.35)"


@dataclass(frozen=True)
class Image:
    """A PNG image in a page.

    Attributes:
        path: the file; the page holds a copy of it.
        description: text for readers who cannot see the image.
    """

    path: str | Path
    description: str

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + base64.b64encode(Path(self.path).read_bytes()).decode()


Block: TypeAlias = "str | Table | Image | Figure"
"""A paragraph, a table, an image, or a plotly figure."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: its headline; empty for none.
        blocks: what it shows, in order. A `str` is a paragraph, in which `&` and `<` are escaped; use
            `markupsafe.Markup` for a paragraph, or a table cell, that is HTML already.
    """

    heading: str
    blocks: Sequence[Block]


def write_page(path: str | Path, title: str, sections: Iterable[Section]) -> None:
    """Write one page of HTML. It opens from a file without a network, in light and dark.

    Figures need plotly, which `pip install 'mapreuse[plots]'` installs. Its JavaScript (4 MB) is part of the page.

    Args:
        path: the file to write. Its directory is made.
        title: title and first headline.
        sections: what the page shows, in order.

    Example:
        >>> table = Table("Latency", ["model", "ms"], [["original", "12.5"]])
        >>> write_page("/tmp/page.html", "Results", [Section("Speed", ["Lower is better.", table])])
        >>> "<caption>Latency</caption>" in Path("/tmp/page.html").read_text()
        True
    """
    environment = Environment(
        loader=PackageLoader("mapreuse.measure", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = itertools.count()
    shown = [
        {"heading": section.heading, "blocks": [_rendered(block, figures) for block in section.blocks]}
        for section in sections
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template("page.html.j2").render(title=title, sections=shown), encoding="utf-8")


def _rendered(block: Block, figures: Iterator[int]) -> tuple[str, Any]:
    """Kind of a block, and what the template shows. The first figure brings the script of all."""
    if isinstance(block, str):
        return "paragraph", block
    if isinstance(block, Table):
        return "table", block
    if isinstance(block, Image):
        return "image", block
    return "figure", _figure(block, with_script=next(figures) == 0)


def _figure(figure: Figure, *, with_script: bool) -> Markup:
    """The figure with a transparent background. The style sheet of the page sets the colour of its text."""
    from plotly.graph_objects import Figure
    from plotly.io import to_html

    shown = Figure(figure)
    clear = "rgba(0,0,0,0)"
    shown.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, modebar_bgcolor=clear)
    shown.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID, linecolor=_GRID)
    shown.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID, linecolor=_GRID)
    return Markup(to_html(shown, full_html=False, include_plotlyjs=with_script, config={"displaylogo": False}))
