"""Sphinx settings of the documentation site: `make docs` builds it, and every warning is an error.

The API reference lists each public name under the room that exports it, whatever private file defines it.
"""

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import mapreuse

logger = getLogger(__name__)

project = "mapreuse"
copyright = "the mapreuse contributors"
version = release = mapreuse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mapreuse {version}"

nitpicky = True  # a reference to a public name that no page documents is a warning
nitpick_ignore_regex = [("py:.*", r"(?!mapreuse).*"), ("py:.*", r".*\._.*")]  # other packages; private type aliases

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

ROOMS = ["mapreuse", *(f"mapreuse.{room}" for room in ("maps", "models", "data", "measure", "conversion"))]
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields):$")


def setup(app: Sphinx) -> None:
    """Connect the hooks below."""
    _attribute_public_names()
    app.connect("source-read", _link_repository_files)
    app.connect("autodoc-skip-member", _skip_repeated)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)  # before napoleon
    app.connect("env-check-consistency", _check_every_public_name_is_documented)


def _attribute_public_names() -> None:
    """Tell public objects which room exports them, and rooms the docstrings of the constants that they export."""
    for room in reversed(ROOMS):  # `mapreuse` last: a name that it lists, too, belongs to it
        module = importlib.import_module(room)
        analyzer = ModuleAnalyzer.for_module(room)
        analyzer.analyze()
        for statement in ast.parse(Path(str(module.__file__)).read_text()).body:
            if not isinstance(statement, ast.ImportFrom) or statement.module is None:
                continue
            for name in {alias.name for alias in statement.names} & set(module.__all__):
                value, defining = getattr(module, name), ModuleAnalyzer.for_module(statement.module)
                defining.analyze()
                analyzer.tagorder |= defining.tagorder  # methods in the order of the source
                if inspect.isclass(value) or inspect.isfunction(value):
                    value.__module__ = room
                else:
                    analyzer.attr_docs["", name] = defining.attr_docs.get(("", name), [])


def _check_every_public_name_is_documented(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domains.python_domain.objects
    for room in ROOMS:
        for name in importlib.import_module(room).__all__:
            if name != "__version__" and f"{room}.{name}" not in documented and f"mapreuse.{name}" not in documented:
                logger.warning("%s.%s is public, but not in the API reference", room, name)


def _link_repository_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Offer Markdown files outside docs/ for download: MyST would look for them among the pages."""
    source[0] = re.sub(r"\]\((?=(\.\./)+(lab|src|tests|examples)/)", "](path:", source[0])


def _skip_repeated(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out of a room's page what the page of `mapreuse` documents."""
    repeated = what == "module" and name in mapreuse.__all__ and app.env.docname != "api/mapreuse"
    return True if repeated else None


def _prepare_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _formulas_as_literals(lines)


def _formulas_as_literals(lines: list[str]) -> list[str]:
    """Docstring lines in which an indented paragraph, such as a formula, is a literal block."""
    result: list[str] = []
    in_section = in_literal = False
    for number, line in enumerate(lines):
        indented, before = line.startswith("    "), lines[number - 1] if number else ""
        if line and not indented:
            in_section, in_literal = bool(SECTION.match(line)), False
        elif indented and not in_section and not in_literal and (not before or before.endswith(":")):
            result += ["", "::", ""]
            in_literal = True
        is_plain = not in_literal and "`" not in line and ">>>" not in line
        result.append(line.replace("|", r"\|") if is_plain else line)  # |x| would be a substitution
    return result
