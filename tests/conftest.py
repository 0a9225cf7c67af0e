"""Shapes are checked while tests run: every jaxtyping annotation of the tensor rooms becomes an assertion."""

import os
import signal
import sys

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# The speech room is left out: its class methods return typing.Self, which beartype checks in decorated classes only.
CHECKED = [f"mapreuse.{room}" for room in ("plan", "maps", "models", "measure", "conversion")]
install_import_hook(CHECKED, "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # processes that share the cores would wait for each other's threads

# The same examples every time, however loaded the machine.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def interrupts():
    """A command ignores interrupts after the first one; the tests after it must not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def regular_times(monkeypatch):
    """A device on which every reusing head saves a twentieth, so that results do not hang on this machine's moods."""
    import mapreuse as mr

    def times(models, batch, **options):
        plans = {name: mr.plan_of(model) for name, model in models.items()}
        heads = {
            name: 0 if plan is None else sum(s is not None for l in range(plan.num_layers) for s in plan.heads(l, 4))
            for name, plan in plans.items()
        }
        return {name: 1 - number / 20 for name, number in heads.items()}

    monkeypatch.setattr(sys.modules[mr.search.__module__], "_times", times)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.sample(n)`: mark all but every n-th set of parameters of a test as `full`."""
    numbers: dict[str, int] = {}
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is not None:
            test = item.nodeid.partition("[")[0]
            numbers[test] = numbers.get(test, -1) + 1
            if numbers[test] % sample.args[0]:
                item.add_marker("full")


def pytest_configure(config: pytest.Config) -> None:
    # lhotse's CutSet derives from typing.Iterable, which beartype calls outdated wherever a signature names a CutSet.
    category = "beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    config.addinivalue_line("filterwarnings", f"ignore::{category}")
