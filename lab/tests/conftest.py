"""As in tests/conftest.py: shapes are checked while tests run, and hypothesis draws the same examples every time."""

import os

import hypothesis
import torch
from jaxtyping import install_import_hook

install_import_hook(["mapreuse_lab.techniques"], "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")
