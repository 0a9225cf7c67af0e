"""The study's report as a page: whole, self-contained, safe with any text, and honest about what is absent."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from mapreuse_lab.study._page import embedded, page, plot_data
from mapreuse_lab.study._page_tables import (
    all_runs,
    corpora,
    front,
    grouping,
    longer_grid,
    run_grid,
    technique_grid,
)
from plotly.offline import get_plotlyjs
from py_mini_racer import MiniRacer
from study_results import study_results

VOID = {"meta", "input", "br", "link", "img"}
SECTIONS = {
    "front": "techniques",
    "techniques": "techniques",
    "grouping": "techniques",
    "longer": "longer",
    "speed-up": "techniques",
    "breakdown": "breakdown",
    "similarity": "similarity",
    "phonemes": "phonemes",
    "maps": "maps",
    "learning": "runs",
    "papers": "papers",
    "corpora": "corpora",
    "runs": "runs",
    "commands": "commands",
    "machine": "machine",
    "settings": "config",
}
"""The page's sections, in order, and the part of the results that each is made from."""


class Parsed(HTMLParser):
    """A page's elements, each with its attributes, its text and the text of what it holds; tags must close."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "parents": [e["tag"] for e in self._open]}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()["tag"] == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e["tag"] == tag and attrs.items() <= e["attrs"].items()]


def shown(results):
    """The page without plotly.js."""
    return page(results).replace(get_plotlyjs(), "")


@pytest.fixture(scope="module")
def results():
    return study_results()


@pytest.fixture(scope="module")
def parsed(results):
    return Parsed(shown(results))


def section(parsed, name):
    (found,) = parsed.all("section", id=name)
    return found["text"]


def test_sections_come_in_order_and_the_verdict_first(results, parsed):
    assert [e["attrs"]["id"] for e in parsed.all("section")] == list(SECTIONS)
    (verdict,) = [e for e in parsed.all("p") if e["attrs"].get("class", "").startswith("verdict")]
    assert verdict["text"] == results["verdict"][0]
    assert parsed.elements.index(verdict) < parsed.elements.index(parsed.all("section")[0])
    for sentence in results["verdict"][1:]:
        assert sentence in [e["text"] for e in parsed.all("li")]


def test_nothing_is_loaded_from_elsewhere(results, parsed):
    for element in parsed.elements:
        assert "src" not in element["attrs"]
        assert element["attrs"].get("href", "#").startswith("#")
        assert element["tag"] not in {"link", "img", "iframe", "object", "form"}
    (style,) = parsed.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    (policy,) = [e["attrs"]["content"] for e in parsed.all("meta") if "http-equiv" in e["attrs"]]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert page(results).count(get_plotlyjs()) == 1


def test_plots_cannot_be_sent_to_plotlys_server(parsed):
    script = parsed.all("script")[-1]["text"]
    assert "showSendToCloud: false" in script
    assert 'plotlyServerURL: ""' in script


def test_every_technique_has_a_row(results, parsed):
    heads = [e["text"] for e in parsed.all("th", scope="row")]
    for technique in results["techniques"]:
        assert any(head.startswith(technique["title"] + technique["name"]) for head in heads)


@pytest.mark.parametrize(("name", "part"), SECTIONS.items())
def test_a_section_whose_part_is_absent_says_not_measured(results, name, part):
    absent = {part, part.removesuffix("s"), "longer" if part == "runs" else part}
    without = {key: value for key, value in results.items() if key not in absent}
    text = section(Parsed(shown(without)), name)
    assert text.strip().endswith("not measured")
    assert len(text.strip().splitlines()) == 2


def test_sections_whose_part_is_there_do_not_say_so_by_themselves(parsed):
    for name in SECTIONS:
        assert len(section(parsed, name).strip().splitlines()) > 2 or name in ("machine", "settings", "commands")
        assert not section(parsed, name).strip().endswith("not measured")


def test_empty_results_make_a_page(results):
    parsed = Parsed(shown({}))
    assert "Verdict: not measured." in [e["text"] for e in parsed.all("p")]
    assert not parsed.all("figure")
    assert not parsed.all("table")


def test_techniques_that_nothing_was_measured_of_make_a_page():
    bare = [{"name": "full", "kind": "full"}, {"name": "reuse-2x4", "kind": "reuse", "scores": {}}]
    cells = [e["text"] for e in Parsed(shown({"techniques": bare})).all("td")]
    against_itself = ["–", "–"]
    assert sorted(cells) == sorted(against_itself + ["not measured"] * (len(cells) - 2))


def poisoned(value, poison):
    """The same results with the poison in every text that names or says something."""
    if isinstance(value, dict):
        return {key: poisoned(inner, poison) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, poison) for inner in value]
    return value + poison if isinstance(value, str) else value


def test_text_is_escaped_wherever_it_stands(results, parsed):
    poison = "</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)><!--"
    dirty = {key: value for key, value in poisoned(results, poison).items() if key != "maps"}
    for technique, clean in zip(dirty["techniques"], results["techniques"], strict=True):
        technique["kind"] = clean["kind"]
    dirty["corpora"] = {name + poison: one for name, one in dirty["corpora"].items()}
    dirty["config"]["key" + poison] = {"inner" + poison: 1}
    dirty["breakdown"]["contestants"]["name" + poison] = {"250": {"part" + poison: 0.1}}
    dirty["maps"] = {**results["maps"], "transcript": poison, "utterance": poison}
    found = Parsed(shown(dirty))
    assert len(found.all("script")) == len(parsed.all("script")) == 3
    assert not found.all("img")
    assert [e["attrs"]["id"] for e in found.all("section")] == list(SECTIONS)
    assert not [e for e in found.elements if any(name.startswith("on") for name in e["attrs"])]
    assert {e["tag"] for e in found.elements} == {e["tag"] for e in parsed.elements}
    assert results["verdict"][0] + poison in [e["text"] for e in found.all("p")]


def test_embedded_json_cannot_end_its_element_and_says_the_same():
    value = {"a</script><!-- <script>": ["</SCRIPT>", 1.5, None, "é"]}
    assert "<" not in embedded(value)
    assert json.loads(embedded(value)) == value


def test_the_pages_data_is_what_the_plots_are_drawn_from(results, parsed):
    (data,) = parsed.all("script", type="application/json")
    assert json.loads(data["text"]) == json.loads(json.dumps(plot_data(results)))


def test_numbers_that_are_not_finite_are_not_measured():
    results = study_results()
    results["techniques"][3]["scores"]["prompts:en"]["cer"] = math.nan
    results["techniques"][3]["latency"]["250"]["median"] = math.inf
    results["runs"][0]["learning_curve"][0]["loss"] = math.nan
    parsed = Parsed(shown(results))
    (data,) = parsed.all("script", type="application/json")
    assert json.loads(data["text"])["curves"][0]["learning_curve"][0]["loss"] is None
    assert section(parsed, "techniques").count("not measured") > section(
        Parsed(shown(study_results())), "techniques"
    ).count("not measured")


def test_columns_of_numbers_are_sorted_by_numbers(results):
    grid = technique_grid(results)
    row = next(row for row in grid.rows if row[0].small.startswith("reuse-4x2"))
    technique = next(one for one in results["techniques"] if one["name"] == "reuse-4x2")
    full = results["techniques"][0]
    values = {(column.title, column.small): cell.value for column, cell in zip(grid.columns, row, strict=True)}
    expected = technique["latency"]["2000"]["median"] / full["latency"]["2000"]["median"]
    assert values["latency", "÷ full's, T = 2000"] == pytest.approx(expected)
    assert values["FLOPs", "÷ full's, T = 1000"] == pytest.approx(technique["flops"]["1000"] / full["flops"]["1000"])
    assert values["CER", "prompts:fr"] == technique["scores"]["prompts:fr"]["cer"]
    difference = technique["scores"]["prompts:en"]["against_full"]["wer"]["difference"]
    assert values["WER against full", "prompts:en"] == difference


def test_cells_carry_their_sort_value(results, parsed):
    table = technique_grid(results)
    values = [cell.value for row in table.rows for cell in row if cell.value is not None]
    carried = [float(e["attrs"]["data-value"]) for e in parsed.elements if "data-value" in e["attrs"]]
    assert carried[: len(values)] == values
    assert len({*values}) > 400


def test_ratios_stand_before_the_figures_they_come_from(results):
    grid = technique_grid(results)
    column = next(i for i, c in enumerate(grid.columns) if c.small == "÷ full's, T = 1000" and c.title == "latency")
    full, reference = grid.rows[0][column], grid.rows[-1][column]
    assert full.text == "1.00"
    assert re.fullmatch(r"[\d.]+ ms ± \d%", full.small)
    assert reference.text == "1.60"
    assert grid.rows[-1][0].text == "transformers (sdpa)"


def test_a_front_holds_whom_none_beats_and_nobody_else(results):
    for corpus in corpora(results):
        names = front(results, "2000", corpus, "wer")
        points = {
            one["name"]: (one["latency"]["2000"]["median"], one["scores"][corpus]["wer"])
            for one in results["techniques"]
            if corpus in one["scores"]
        }
        beaten = {
            name
            for name, (seconds, error) in points.items()
            if any(s <= seconds and e <= error and (s, e) != (seconds, error) for s, e in points.values())
        }
        assert {*names} == points.keys() - beaten
        assert names == sorted(names, key=lambda name: points[name][0])


def test_equals_share_a_front_and_a_slower_equal_is_beaten():
    def technique(name, seconds, wer):
        return {"name": name, "latency": {"9": {"median": seconds}}, "scores": {"c": {"wer": wer}}}

    twins = [technique("a", 1.0, 0.2), technique("b", 1.0, 0.2)]
    beaten = [technique("slower", 1.5, 0.2), technique("less accurate", 1.0, 0.3), {"name": "not measured"}]
    assert front({"techniques": twins + beaten}, "9", "c", "wer") == ["a", "b"]


def test_the_studys_own_front_is_shown_where_it_gives_one():
    results = study_results()
    results["fronts"]["500"] = ["reuse-8x1", "full"]
    assert front(results, "500", "prompts:en", "cer") == ["reuse-8x1", "full"]
    assert front(results, "500", "prompts:en", "wer") != ["reuse-8x1", "full"]
    results["config"]["corpus"] = "prompts:fr"
    assert corpora(results)[0] == "prompts:fr"
    assert front(results, "500", "prompts:en", "cer") != ["reuse-8x1", "full"]


def test_grouping_counts_the_layers_that_compute_their_map():
    assert grouping({"name": "reuse-4x2"}) == (2, 8)
    assert grouping({"name": "reuse-1x4,4x1"}) == (5, 8)
    assert grouping({"name": "no such technique"}) is None


def test_runs_that_did_not_finish_are_shown_with_their_reason(parsed):
    text = section(parsed, "runs")
    assert "1 failed, 1 not run" in text
    assert text.index("loss was not finite after step 1250") < text.index("All 76 runs")


def test_runs_by_the_longer_recipe_stand_among_the_runs_and_in_a_table_of_their_own(results):
    rows = [[cell.text for cell in row] for row in run_grid(all_runs(results)).rows]
    assert len(rows) == len(results["runs"]) + 2
    assert ["diagonal", "prompts:en", "0", "finished", "4,000"] in [row[:5] for row in rows]
    (full, diagonal) = longer_grid(results).rows
    before = results["techniques"][0]["scores"]["prompts:en"]["cer"]
    assert [cell.value for cell in full] == [None, 0.101, 0.31, 0.0, 0.0, before]
    assert diagonal[3].text == "worse"
    assert diagonal[3].small == "+2.0 [+1.1, +2.9] points"


def test_the_script_of_the_page_is_javascript(results):
    script = re.findall(r"<script>(.*?)</script>", page(results), re.DOTALL)[-1]
    assert "figure[data-plot]" in script
    MiniRacer().eval(f"new Function({json.dumps(script)})")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a page in a browser, runs a script in it, and gives what is then in `main`; fails on any complaint."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine to open the page with")

    def opened(results, script=""):
        directory = tmp_path_factory.mktemp("page")
        text = page(results).replace("</body>", f"<script>{script}</script></body>")
        (directory / "page.html").write_text(text, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'user'}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=390,900", "--dump-dom"]
        ran = subprocess.run(
            [*command, (directory / "page.html").as_uri()], capture_output=True, text=True, timeout=240, check=True
        )
        assert "CONSOLE" not in ran.stderr
        return ran.stdout.split("<main>")[1].split("</main>")[0]

    return opened


def test_a_browser_draws_every_plot_and_sorts_by_numbers(results, opened):
    sort = "document.querySelectorAll('#techniques-table thead button')[14].click()"
    drawn = opened(results, sort)
    plots = re.findall(r'<figure class="plot" data-plot="([^"]*)".*?</figure>', drawn, re.DOTALL)
    assert plots == [
        "pareto",
        "grouping",
        "speed",
        "breakdown",
        "breakdown",
        *["similarity"] * 3,
        "phonemes",
        "curves",
    ]
    for figure in re.findall(r'<figure class="plot".*?</figure>', drawn, re.DOTALL):
        assert "main-svg" in figure
    assert "31 of 31 rows" in drawn
    assert "reusing layer: the map of layer 0" in drawn

    table = Parsed(drawn[drawn.index('<table id="techniques-table"') :].split("</table>")[0] + "</table>")
    assert [e["attrs"]["aria-sort"] for e in table.all("th", scope="col")].index("ascending") == 14
    assert table.all("th", scope="col")[14]["text"] == "latency÷ full's, T = 1000"
    rows = [row.split("<td")[14] for row in drawn.split("<table")[1].split("<tr>")[2:]]
    values = [float(re.search(r'data-value="([^"]*)"', row)[1]) for row in rows]
    assert len(values) == 31
    assert values == sorted(values)
    assert values != [cell.value for row in technique_grid(results).rows for cell in [row[14]]]


def test_a_browser_draws_what_there_is_of_half_a_study(opened):
    results = study_results()
    for index, technique in enumerate(results["techniques"]):
        if index != 2:
            technique["scores"] = {}
        if index % 3:
            del technique["latency"]
    del results["techniques"][0]["scores"], results["techniques"][2]["scores"]["prompts:en"]
    results["techniques"][2]["latency"] = {"250": {"median": 0.1, "spread": 0.1}}
    results["maps"]["techniques"]["full"]["layers"][1] = []
    results["similarity"] = {"layers": [[1.0]]}
    results["runs"] = results["runs"][-1:]
    drawn = opened(results)
    assert 'id="plot-pareto"' in drawn
    assert "layer 1 has no attention map" in drawn
    assert drawn.count('<p class="absent">not measured</p>') > 3
