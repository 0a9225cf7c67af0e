"""A model under a plan gives the defined numbers whatever records, transforms or watches it, or says why not."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from measured import output
from verdicts import cases, distance, is_accepted, result, sample
from watched import FAMILIES, LENGTHS, PLANS, Defined, inputs
from watchers import PARALLEL, WATCHERS


@pytest.fixture(scope="module")
def worker():
    """A process without the checks of shapes, which cannot be traced."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


@pytest.mark.parametrize("case", sample(), ids=str)
def test_a_watched_model_gives_the_defined_numbers_or_is_refused_in_one_line(worker, case):
    found = worker.submit(result, case).result()
    assert is_accepted(case, found), found


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [case for tool in PARALLEL for case in cases(tool, "BERT") if case.length in (12, 91)], ids=str
)
def test_two_processes_learn_from_the_gradients_of_one(worker, case):
    found = worker.submit(result, case).result()
    assert found.status == "right", found


def test_every_tool_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs/works_with.md").read_text()
    listed = set(re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE))
    assert WATCHERS.keys() - {*PARALLEL} <= listed <= WATCHERS.keys()


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_changes_the_output_so_that_a_comparison_can_fail(family, plan):
    for length in LENGTHS:
        tensors = inputs(family, 2, length, 0)
        original, shared = (output(Defined(family, length, one), tensors) for one in ("full", plan))
        assert distance(shared["output"], original, "output") > 0.1
