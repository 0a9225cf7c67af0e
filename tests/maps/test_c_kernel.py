"""The cores in C, where they are not asked for by name."""

import shutil

import pytest
import torch
from jaxtyping import TypeCheckError
from map_cases import make_case
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mapreuse.maps import DenseMap, _c_kernel, attend, compute


@pytest.fixture(scope="module", autouse=True)
def core():
    """As installed."""


def test_they_are_built_wherever_there_is_a_compiler():
    assert _c_kernel.library() is not None or shutil.which("cc") is None


@pytest.mark.parametrize("storage", ["dense", "dense8", "recompute"])
def test_they_compute_where_nothing_stands_against_it(monkeypatch, storage):
    if _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    called = []
    monkeypatch.setattr(_c_kernel, "_call", lambda name, arguments: called.append(name))
    case = make_case(num_queries=100, relative=True)
    with torch.no_grad():
        compute(case.scores, case.values, storage)[1].apply(case.values)
    reusing = "mapreuse_compute" if storage == "recompute" else "mapreuse_apply"
    assert called == ["mapreuse_compute"] * 2 + [reusing] * 2  # once for each of two items


def test_a_counter_of_flops_sees_the_products():
    case = make_case(batch=1, heads=2, num_queries=100, relative=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attend(case.scores, case.values, keep=True)
    assert counter.get_total_flops() >= 2 * 2 * 100 * 100 * (4 + 4 + 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_are_left_to_pytorch(monkeypatch, dtype):
    monkeypatch.setattr(_c_kernel, "_call", None)
    case = make_case(num_queries=100, relative=True, dtype=dtype)
    with torch.no_grad():
        context, _ = attend(case.scores, case.values, keep=True)
    assert context.dtype == dtype


class _Other(torch.Tensor):
    """A tensor whose memory may be anything."""


def test_what_follows_operators_is_left_to_pytorch(monkeypatch):
    if _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    tensor = torch.randn(3, 3)
    with torch.no_grad():
        assert _c_kernel.serves(tensor)
        assert not _c_kernel.serves(torch._neg_view(tensor))
        assert not _c_kernel.serves(tensor.as_subclass(_Other))
        assert _c_kernel.applies(tensor, tensor)
        assert not _c_kernel.applies(tensor.as_subclass(_Other), tensor)
        assert not _c_kernel.applies(torch._neg_view(tensor), tensor)
        assert not torch.func.vmap(lambda row: torch.tensor(_c_kernel.serves(row)), out_dims=None)(tensor)
        with forward_ad.dual_level():
            assert not _c_kernel.serves(tensor)
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert not _c_kernel.serves(tensor)
    assert not _c_kernel.serves(tensor)


def test_values_and_heads_that_are_not_of_the_map_are_refused():
    case = make_case(num_queries=100, num_keys=100)
    carried = DenseMap(case.map)
    with torch.no_grad():
        for values, heads in ((case.values[:, :, :50], None), (case.values[:, :1], None), (case.values, ((5, 0),))):
            with pytest.raises((ValueError, IndexError, RuntimeError, TypeCheckError)):  # checked shapes, too
                carried.apply(values, heads)
        assert carried.apply(case.values, ()).shape[1] == 0
        torch.testing.assert_close(DenseMap(case.map.mT).apply(case.values), case.map.mT @ case.values)
