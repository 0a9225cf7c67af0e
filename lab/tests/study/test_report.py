"""Reports of the committed studies."""

import html
import json
import re
from pathlib import Path

import pytest
from mapreuse_lab.study import (
    FullConfig,
    papers_page,
    read_results,
    report,
    summary_tables,
    write_report,
)
from mapreuse_lab.study._figures import error_against_speed, map_viewer, phoneme_maps
from mapreuse_lab.study._report import report_sections
from mapreuse_lab.study._runs import Run
from mapreuse_lab.study._step_cache import StepCache
from mapreuse_lab.study._tables import pareto_front

from mapreuse.console import Table

STUDIES = Path(__file__).parents[3] / "lab/results/study"


@pytest.fixture(scope="module", params=["quick", "full"])
def results(request):
    return read_results(STUDIES / request.param)


@pytest.fixture(scope="module")
def full():
    return read_results(STUDIES / "full")


def tables(results):
    return [block for section in report_sections(results) for block in section.blocks if isinstance(block, Table)]


def test_a_report_has_a_page_and_the_committed_markdown(results, tmp_path):
    write_report(results, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for table in tables(results):
        assert table.markdown() in text
        assert f"<caption>{html.escape(table.title)}</caption>".replace("&#x27;", "&#39;") in page
    assert page.count("plotly-graph-div") >= 3
    assert page.count("plotly.js v") == 1, "the script is part of the page once"
    for plot in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_every_table_is_as_wide_as_its_header(results):
    for table in tables(results):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}, table.title


def test_every_technique_and_contestant_has_one_row_in_each_main_table(full):
    (summary,) = summary_tables(full)
    titles = sorted(technique["title"] for technique in full["techniques"])
    assert sorted(row[0] for row in summary.rows) == titles
    (speed,) = (table for table in tables(full) if table.title == "Speed-up over full attention")
    assert sorted(row[0] for row in speed.rows) == sorted([*titles, "sdpa"])
    row = {row[0]: row for row in speed.rows}
    assert re.fullmatch(r"\d\d\.\d ms ± 2%", row["full attention"][3])
    assert row["diagonal maps"][3] == "2.52× ± 1%"


def test_ratios_are_those_of_the_measured_figures(full):
    techniques = {technique["name"]: technique for technique in full["techniques"]}
    (costs,) = (table for table in tables(full) if table.title.startswith("Other costs"))
    row = dict(zip(costs.header, next(row for row in costs.rows if row[0] == "multi-query"), strict=True))
    assert row["parameters"] == f"{techniques['gqa-1']['parameters'] / techniques['full']['parameters']:.2f}"
    memory = techniques["gqa-1"]["memory"]["3000"] / techniques["full"]["memory"]["3000"]
    assert row["peak memory, T = 3000"] == f"{memory:.2f}"


def test_significant_differences_are_marked(full):
    (summary,) = summary_tables(full)
    differences = {row[0]: row[3] for row in summary.rows}
    assert differences["full attention"] == "–"
    assert differences["2 heads"].endswith("], better")
    assert differences["multi-query"].endswith("], worse")
    assert differences["reuse 2x3"] == "−1.3 [−3.6, +0.9]"


def test_no_technique_on_the_front_is_dominated(full):
    assert [technique["name"] for technique in pareto_front(full, "250")] == ["layers-3", "diagonal", "heads-2"]
    figure = error_against_speed(full)
    *kinds, line = (trace for trace in figure.data if trace.visible)
    assert line.name == "Pareto front"
    assert sum(len(trace.x) for trace in kinds) == len(full["techniques"])


@pytest.mark.parametrize("make", [map_viewer, phoneme_maps])
def test_a_menu_shows_the_maps_of_both_techniques_at_a_time(full, make):
    field = "maps" if make is map_viewer else "phonemes"
    figure = make(full[field])
    (menu,) = figure.layout.updatemenus
    selections = [button.args[0]["visible"] for button in menu.buttons]
    assert {sum(selection) for selection in selections} == {2}
    assert [trace.visible for trace in figure.data] == list(selections[0])
    assert all(sum(column) == 1 for column in zip(*selections, strict=True)), "every trace has one entry"


def test_parts_that_were_not_measured_are_left_out(full):
    optional = ("longer", "breakdown", "similarity", "phonemes", "maps")
    headings = [section.heading for section in report_sections(full)]
    without = {name: value for name, value in full.items() if name not in optional}
    left = [section.heading for section in report_sections(without)]
    assert len(left) == len(headings) - len(optional)
    assert "Measured here: not measured" in papers_page(without)
    assert "not measured" not in papers_page(full)


def test_a_technique_without_memory_or_runs_has_gaps(full):
    changed = json.loads(json.dumps(full))
    del changed["techniques"][4]["memory"]
    changed["techniques"][5]["scores"] = {}
    changed["runs"][3] |= {"state": "failed", "error": "loss is not finite"}
    text = report(changed)
    assert "failed: loss is not finite" in text
    (costs,) = (table for table in tables(changed) if table.title.startswith("Other costs"))
    assert "–" in costs.rows[4]
    (summary,) = summary_tables(changed)
    assert len(summary.rows) == len(full["techniques"]) - 1


def test_results_of_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"results.json is missing: run mapreuse-lab study"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="has schema 2; this version reads schema 4"):
        read_results(tmp_path)


def test_committed_results_name_the_command_that_makes_them(results):
    assert results["command"].startswith(f"mapreuse-lab study --preset {results['preset']}")


def test_committed_runs_and_findings_continue_the_full_study(full):
    """Keys of the standard recipe have not changed, so the study does not repeat these runs."""
    config = FullConfig()
    for run in config.runs():
        assert (STUDIES / f"full/runs/{run.key}.json").is_file(), run.key
    keys = {name: Run(name, config.corpus, 0, config.recipe).key for name in config.shown} | {"version": 1}
    for name in ("similarity", "maps", "phonemes"):
        assert StepCache(STUDIES / "full/findings", ()).has(name, keys)
