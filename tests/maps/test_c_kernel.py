"""When the C kernels are used, and what a FLOP counter sees."""

import shutil

import pytest
import torch
from jaxtyping import TypeCheckError
from map_cases import make_case, with_gradients
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mapreuse.maps import STORAGES, DenseMap, _c_kernel, attend, compute


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """Override the fixture that tries every kernel: these tests use the installed one."""


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Override the fixture that makes blocks small."""


def test_the_kernels_are_compiled_if_there_is_a_compiler():
    assert _c_kernel.library() is not None or shutil.which("cc") is None


@pytest.mark.parametrize("storage", ["dense", "dense8", "recompute"])
def test_the_kernels_run_if_nothing_observes_the_tensors(monkeypatch, storage):
    if _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    called = []
    monkeypatch.setattr(_c_kernel, "_call", lambda name, arguments: called.append(name))
    case = make_case(num_queries=100, relative=True)
    with torch.no_grad():
        compute(case.scores, case.values, storage)[1].apply(case.values)
    reusing = "mapreuse_compute" if storage == "recompute" else "mapreuse_apply"
    assert called == ["mapreuse_compute"] * 2 + [reusing] * 2  # once for each of two items


@pytest.mark.parametrize("length", [60, 400])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_flop_counter_counts_every_product_of_a_computing_layer(length, relative, keep, grad_mode):
    """2·B·H·T²·d FLOPs per product; by position, each block of R rows computes its T + R − 1 distances."""
    case = make_case(batch=2, heads=3, num_queries=length, num_keys=length, relative=relative)
    with torch.set_grad_enabled(grad_mode), FlopCounterMode(display=False) as counter:
        attend(case.scores, case.values, keep=keep)
    expected = 2 * 2 * 3 * length**2 * (4 + 5)
    if relative:
        blocks = {60: [60], 400: [128, 128, 128, 16]}[length]
        expected += sum(2 * 2 * 3 * rows * (length + rows - 1) * 4 for rows in blocks)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("length", [60, 400])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("heads", [None, ((0, 0), (0, 1), (2, 2))])
def test_a_flop_counter_counts_every_product_of_a_reusing_layer(length, relative, storage, heads):
    case = make_case(batch=2, heads=3, num_queries=length, num_keys=length, relative=relative)
    with torch.no_grad():
        attention_map = compute(case.scores, case.values, storage)[1]
        with FlopCounterMode(display=False) as recomputing:
            attend(case.scores, case.values, keep=False)
        with FlopCounterMode(display=False) as counter:
            attention_map.apply(case.values, heads)
    expected = recomputing.get_total_flops() if storage == "recompute" else 2 * 2 * 3 * length**2 * 5
    assert counter.get_total_flops() == expected


def test_a_flop_counter_counts_the_backward_pass_of_fused_attention():
    case, _ = with_gradients(make_case(batch=2, heads=3, num_queries=60, num_keys=60))
    values = case.values[..., :4]  # PyTorch fuses attention only if values are as wide as keys
    with FlopCounterMode(display=False) as counter:
        attend(case.scores, values, keep=False)[0].sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * 60**2 * 4 * (2 + 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_are_left_to_pytorch(monkeypatch, dtype):
    monkeypatch.setattr(_c_kernel, "_call", None)
    case = make_case(num_queries=100, relative=True, dtype=dtype)
    with torch.no_grad():
        context, _ = attend(case.scores, case.values, keep=True)
    assert context.dtype == dtype


class _Other(torch.Tensor):
    """A tensor subclass, which may define its own operations."""


def test_observed_tensors_are_left_to_pytorch(monkeypatch):
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


def test_values_and_heads_that_do_not_fit_the_map_are_refused():
    case = make_case(num_queries=100, num_keys=100)
    attention_map = DenseMap(case.map)
    with torch.no_grad():
        for values, heads in ((case.values[:, :, :50], None), (case.values[:, :1], None), (case.values, ((5, 0),))):
            with pytest.raises((ValueError, IndexError, RuntimeError, TypeCheckError)):
                attention_map.apply(values, heads)
        assert attention_map.apply(case.values, ()).shape[1] == 0
        torch.testing.assert_close(DenseMap(case.map.mT).apply(case.values), case.map.mT @ case.values)
