"""The study's report in Markdown."""

import re

import pytest
from mapreuse_lab.study._markdown import markdown
from study_results import study_results


@pytest.fixture(scope="module")
def results():
    return study_results()


def tables(text):
    """Every table as a list of rows of cells, its rule left out; the heading it stands under goes first."""
    found, heading, rows = [], "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.strip("# ")
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append((heading, [rows[0], *rows[2:]]))
            rows = []
    return found


def test_the_verdict_comes_first(results):
    lines = markdown(results).splitlines()
    assert lines[2] == f"**{results['verdict'][0]}**"
    assert lines[4] == f"- {results['verdict'][1]}"


def test_every_technique_has_one_row_for_accuracy_and_one_for_cost(results):
    accuracy, cost = [rows for heading, rows in tables(markdown(results)) if heading == "All techniques"]
    for table in (accuracy, cost):
        assert len(table) == 1 + len(results["techniques"]) + 1
        for technique in results["techniques"]:
            named = re.compile(rf".*\({re.escape(technique['name'])}[ )].*")
            assert len([row for row in table if named.match(row[0])]) == 1
    assert "CER prompts:en" in accuracy[0]
    assert "latency ÷ full's, T = 1000" in cost[0]


def test_rows_are_as_wide_as_their_head(results):
    found = tables(markdown(results))
    assert len(found) > 10
    for heading, rows in found:
        assert {len(row) for row in rows} == {len(rows[0])}, heading


def test_missing_cells_say_not_measured(results):
    accuracy, cost = [rows for heading, rows in tables(markdown(results)) if heading == "All techniques"]
    row = next(row for row in accuracy if row[0].startswith(results["techniques"][-2]["title"]))
    french = [index for index, head in enumerate(accuracy[0]) if head.endswith("prompts:fr")]
    assert [row[index] for index in french] == ["not measured"] * 4
    row = next(row for row in cost if row[0].startswith(results["techniques"][20]["title"]))
    assert row[cost[0].index("peak memory ÷ full's, T = 3000")] == "not measured"
    assert sum(cell == "not measured" for row in cost for cell in row) == 3


def test_absent_sections_say_not_measured():
    lines = [line for line in markdown({}).splitlines() if line]
    headings = [index for index, line in enumerate(lines) if line.startswith("## ")]
    assert len(headings) == 13
    assert all(lines[index + 1] == "not measured" for index in headings)


def test_what_was_found_stands_beside_the_difference(results):
    accuracy, _ = [rows for heading, rows in tables(markdown(results)) if heading == "All techniques"]
    row = next(row for row in accuracy if row[0].startswith("reuse 2x4 "))
    assert re.fullmatch(
        r"no difference found \([+−]\d\.\d \\\[[+−]\d\.\d, [+−]\d\.\d\\\] points\)",
        row[accuracy[0].index("CER against full prompts:en")],
    )


def test_text_stays_text():
    results = study_results()
    results["techniques"][4]["title"] = "a | b <script>alert(1)</script> *c*\n# d"
    results["machine"]["processor"] = "<b>"
    text = markdown(results)
    assert r"a \| b \<script\>alert(1)\</script\> \*c\* \# d" in text
    assert not re.search(r"(?<!\\)<", text)
    assert "\n# d" not in text


def test_commands_stand_word_for_word(results):
    for command in results["commands"]:
        assert f"\n    {command}\n" in markdown(results)
