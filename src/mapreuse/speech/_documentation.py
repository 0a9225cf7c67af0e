"""English prose that every installation has: the docstrings of Python's standard library and of the dependencies."""

import ast
import hashlib
import importlib.metadata
import importlib.resources
import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from mapreuse.speech._files import write_whole
from mapreuse.speech._prompts import cache_dir

_PACKAGES = ("accelerate", "lhotse", "matplotlib", "numpy", "scipy", "torch", "transformers")
_NOT_PROSE = {"test", "tests", "site-packages", "dist-packages"}
_SENTENCE = re.compile(r"[A-Z]?[a-z' -]{20,90}[.,:;]?")


def documentation() -> list[str]:
    """Sentences and clauses of four words and more, in plain letters, sorted; the same for the same versions.

    Reading them takes half a minute; they are kept in `cache_dir()`.
    """
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    key = hashlib.sha256(json.dumps([sys.version, versions, _SENTENCE.pattern]).encode()).hexdigest()[:16]
    path = cache_dir() / f"documentation-{key}.txt"
    if not path.exists():
        files = [*_files(Path(sysconfig.get_path("stdlib")))]
        for package in _PACKAGES:
            files += _files(Path(str(importlib.resources.files(package))))
        found = {sentence for file in track(files, description="Reading docstrings") for sentence in _sentences(file)}
        write_whole(path, lambda unfinished: unfinished.write_text("\n".join(sorted(found))))
    return path.read_text().splitlines()


def _files(directory: Path) -> list[Path]:
    paths = (path.relative_to(directory) for path in directory.rglob("*.py"))
    return [directory / path for path in sorted(paths) if not _NOT_PROSE.intersection(path.parts)]


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a Python file's modules, classes and functions; none where it cannot be parsed."""
    try:
        with tokenize.open(file) as source:
            tree = ast.parse(source.read())
    except (SyntaxError, UnicodeDecodeError):  # files that are kept as examples of what does not parse
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def _sentences(file: Path) -> Iterator[str]:
    for text in docstrings(file):
        for part in re.split(r"(?<=[.:;,])\s+|\n\s*\n", text):
            sentence = " ".join(part.split())
            if _SENTENCE.fullmatch(sentence) and sentence.count(" ") >= 3:
                yield sentence.rstrip(".,:;").lower()
