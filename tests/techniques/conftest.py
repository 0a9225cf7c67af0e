"""Shapes of the techniques are checked while their tests run."""

from jaxtyping import install_import_hook

install_import_hook("mapreuse.techniques", "beartype.beartype")
