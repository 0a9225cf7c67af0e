"""The cores in C, where they are not asked for by name."""

import shutil

import pytest
import torch
from map_cases import make_case
from torch.utils.flop_counter import FlopCounterMode

from mapreuse.maps import _in_c, attend, compute


@pytest.fixture(scope="module", autouse=True)
def core():
    """As installed."""


def test_they_are_built_wherever_there_is_a_compiler():
    assert _in_c.library() is not None or shutil.which("cc") is None


@pytest.mark.parametrize("strategy", ["dense", "dense8", "recompute"])
def test_they_compute_where_nothing_stands_against_it(monkeypatch, strategy):
    if _in_c.library() is None:
        pytest.skip("the package was installed without a C compiler")
    called = []
    monkeypatch.setattr(_in_c, "_call", lambda name, arguments: called.append(name))
    case = make_case(num_queries=100, relative=True)
    with torch.no_grad():
        compute(case.scores, case.values, strategy)[1].apply(case.values)
    reusing = "mapreuse_compute" if strategy == "recompute" else "mapreuse_apply"
    assert called == ["mapreuse_compute"] * 2 + [reusing] * 2  # once for each of two items


def test_a_counter_of_flops_sees_the_products():
    case = make_case(batch=1, heads=2, num_queries=100, relative=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attend(case.scores, case.values, keep=True)
    assert counter.get_total_flops() >= 2 * 2 * 100 * 100 * (4 + 4 + 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_are_left_to_pytorch(monkeypatch, dtype):
    monkeypatch.setattr(_in_c, "_call", None)
    case = make_case(num_queries=100, relative=True, dtype=dtype)
    with torch.no_grad():
        context, _ = attend(case.scores, case.values, keep=True)
    assert context.dtype == dtype


def test_memory_that_cannot_be_had_is_an_error(monkeypatch):
    class Library:
        mapreuse_compute = staticmethod(lambda arguments: 1)

    monkeypatch.setattr(_in_c, "library", Library)
    case = make_case(num_queries=100, relative=True)
    with torch.no_grad(), pytest.raises(MemoryError, match="rows of an attention map"):
        attend(case.scores, case.values, keep=True)
