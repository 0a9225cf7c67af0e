"""Shapes are checked while tests run, as in tests/conftest.py."""

from jaxtyping import install_import_hook

install_import_hook(["mapreuse_lab.techniques"], "beartype.beartype")
