"""Shapes are checked while tests run: every jaxtyping annotation of the tensor rooms becomes an assertion."""

import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# The speech room is left out: its class methods return typing.Self, which beartype checks in decorated classes only.
CHECKED = [f"mapreuse.{room}" for room in ("plan", "maps", "models", "measure", "convert", "techniques")]
install_import_hook(CHECKED, "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # processes that share the cores would wait for each other's threads

# The same examples every time, however loaded the machine.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # lhotse's CutSet derives from typing.Iterable, which beartype calls outdated wherever a signature names a CutSet.
    category = "beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    config.addinivalue_line("filterwarnings", f"ignore::{category}")
