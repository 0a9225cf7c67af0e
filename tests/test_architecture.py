"""Rooms depend on one another as docs/architecture.md says."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/mapreuse"
ROOMS = ("console", "plan", "maps", "models", "data", "exporting", "measure", "conversion", "advising")
ORDER = (*ROOMS, "__init__", "options", "commands", "cli")
"""From the lowest room up."""
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.glob("**/*.py"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_lower_rooms_and_only_what_they_list(file):
    room = Path(file).parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(room)])
    for node in ast.walk(ast.parse((SOURCE / file).read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            package, *inside = module.split(".")
            assert package != "mapreuse_lab"
            if package == "mapreuse" and inside and inside[0] != room:
                assert inside[0] in allowed
                assert len(inside) == 1, f"{module} is private"
