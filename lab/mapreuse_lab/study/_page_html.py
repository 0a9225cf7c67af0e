"""The pieces of HTML that the study's page is put together from; every text in them is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

from mapreuse_lab.study._page_tables import NOT_MEASURED, Cell, Column, Grid, flat


def absent() -> str:
    """What stands where something is absent."""
    return f'<p class="absent">{NOT_MEASURED}</p>'


def same(names: Iterable[str]) -> dict[str, str]:
    """Choices that are shown as what they are."""
    return {name: name for name in names}


def figure(name: str, *controls: str, plot: str = "", part: str = "", above: str = "") -> str:
    """A plot below its controls; `page.js` draws it, by the name of the plot and the part of the data."""
    row = f'<div class="controls">{"".join(controls)}</div>' if controls else ""
    return (
        f'<figure class="plot" data-plot="{escape(plot or name)}" data-part="{escape(part)}">{row}{above}'
        f'<div class="area" id="plot-{escape(name)}"></div></figure>'
    )


def select(name: str, label: str, choices: dict[str, str], chosen: str = "") -> str:
    """A choice of one; `choices` by value."""
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in choices.items()
    )
    return f'<label>{escape(label)} <select name="{name}">{options}</select></label>'


def slider(name: str, count: int, first: int = 0) -> str:
    """A choice of a number from 0 to `count` − 1."""
    return (
        f'<label>{name} <input type="range" name="{name}" min="0" max="{count - 1}" value="{first}" step="1">'
        f"<output>{first}</output></label>"
    )


def picker(label: str, names: list[str], chosen: list[str]) -> str:
    """A choice of several names."""
    chips = "".join(
        f'<label class="chip" title="{escape(name)}">'
        f'<input type="checkbox" value="{escape(name)}"{" checked" if name in chosen else ""}>'
        f"<i></i><span>{escape(name)}</span></label>"
        for name in names
    )
    return f'<fieldset class="picker"><legend>{label}</legend>{chips}</fieldset>'


def definitions(found: dict[str, Any] | None) -> str:
    """Settings as a list of definitions; empty where there are none."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(shown(v))}</dd></div>" for k, v in flat(found or {}))
    return f"<dl>{items}</dl>" if items else ""


def table(name: str, grid: Grid, label: str, prose: bool = False) -> str:
    """A table in a box of its own to scroll in; the first cell of a row is its head."""
    head = "".join(_head(column) for column in grid.columns)
    rows = "\n".join(
        "<tr>" + "".join(map(_cell, grid.columns, row, ["th", *["td"] * (len(row) - 1)])) + "</tr>"
        for row in grid.rows
    )
    kind = "sortable prose" if prose else "sortable"
    given = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table{given} class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _head(column: Column) -> str:
    small = f"<small>{escape(column.small)}</small>" if column.small else ""
    kind = ' class="number"' if column.numeric else ""
    corpus = f' data-corpus="{escape(column.corpus)}"' if column.corpus else ""
    return f'<th scope="col" aria-sort="none"{kind}{corpus}><button>{escape(column.title)}{small}</button></th>'


def _cell(column: Column, cell: Cell, tag: str) -> str:
    scope = ' scope="row"' if tag == "th" else ""
    kinds = ["number"] if column.numeric else []
    kinds += ["absent"] if cell.text == NOT_MEASURED else []
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    mark = f' data-mark="{escape(cell.mark)}"' if cell.mark else ""
    corpus = f' data-corpus="{escape(column.corpus)}"' if column.corpus else ""
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<{tag}{scope}{kind}{value}{mark}{corpus}><span>{escape(cell.text)}</span>{small}</{tag}>"
