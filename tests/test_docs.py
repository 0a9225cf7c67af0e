"""README and the documentation pages say what is so. `make docs` checks links and the API reference."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny_models import SENTENCES, SIZE, tokenizer
from typer.main import get_command

import mapreuse as mr
from mapreuse import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in (*ROOT.glob("*.md"), *DOCS.glob("**/*.md"))}
WRITTEN = [name for name in PAGES if name != "docs/models.md"]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**SIZE | {"num_hidden_layers": 6}, vocab_size=40)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 12))
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(PAGES[page]))
    assert HUB_NAME in code
    found = {}
    exec(compile(code.replace(HUB_NAME, "model"), page, "exec"), found)
    assert isinstance(found["model"], tf.BertModel)
    assert mr.plan_of(found["model"]).num_layers == 6
    assert mr.plan_of(found["original"]) is None


def test_the_quickstart_shows_the_plan_that_it_prints():
    text = PAGES["docs/quickstart.md"].read_text()
    assert str(mr.ReusePlan.parse("1x2,2x2")) in text


@pytest.mark.parametrize("page", WRITTEN)
def test_code_on_a_page_is_python_and_uses_only_what_mapreuse_exports(page):
    for block in python_blocks(PAGES[page]):
        ast.parse(block)
    unknown = set(re.findall(r"\bmr\.(\w+)", PAGES[page].read_text())) - set(mr.__all__) - {"measure"}
    assert not unknown


@pytest.mark.parametrize("page", WRITTEN)
def test_files_and_imports_that_a_page_names_exist(page):
    text = PAGES[page].read_text()
    named = re.findall(r"`([\w/.]*\w\.(?:py|c|h|toml|md))`", text)
    files = [str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.*")] + [path.name for path in ROOT.glob("*")]
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []
    for module, names in re.findall(r"from (mapreuse[\w.]*) import ([\w, ]+)", text):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip())


def test_the_supported_versions_are_those_that_pip_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        project["requires-python"],
        *(d for d in project["dependencies"] if re.match("torch|transformers", d)),
    ]
    assert len(required) == 3
    text = PAGES["docs/troubleshooting.md"].read_text()
    assert [version for version in required if f"`{version}`" not in text] == []


def test_the_readme_is_one_screen_and_a_half():
    assert len(PAGES["README.md"].read_text().splitlines()) <= 110


def test_the_readme_counts_the_model_types_that_are_listed():
    counted = re.search(r"\[(\d+) model types\]", PAGES["README.md"].read_text())
    assert f"**{counted[1]} model types" in PAGES["docs/models.md"].read_text()


@pytest.mark.parametrize("page", [name for name in WRITTEN if not name.startswith("docs/")])
def test_a_link_outside_the_site_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page].read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_room_has_a_page_in_the_api_reference():
    rooms = {path.parent.name for path in (ROOT / "src/mapreuse").glob("*/__init__.py")} | {"mapreuse", "console"}
    assert {page.stem for page in (DOCS / "api").glob("*.md")} - {"index"} == rooms


def test_every_command_is_on_the_page_of_the_command_line():
    text = PAGES["docs/command_line.md"].read_text()
    assert [name for name in get_command(cli.app).commands if f"`mapreuse {name}`" not in text] == []


def raised_messages():
    """Text of every message in the library's source, with "…" for what is filled in."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        return "".join(map(text, node.values)) if isinstance(node, ast.JoinedStr) else "…"

    trees = [ast.parse(path.read_text()) for path in (ROOT / "src/mapreuse").glob("**/*.py")]
    return [text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]


def test_every_message_under_troubleshooting_is_one_that_the_library_raises():
    quoted = re.findall(r"^`(.+)`$", PAGES["docs/troubleshooting.md"].read_text(), re.MULTILINE)
    raised = raised_messages()
    assert len(quoted) > 50
    assert [message for message in quoted if not any(message in text for text in raised)] == []
