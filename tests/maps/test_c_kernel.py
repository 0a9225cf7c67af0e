"""When the C kernels are used, and what FLOP counters, compilers and transforms see of the operators."""

import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from jaxtyping import TypeCheckError
from map_cases import make_case, with_gradients
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
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


def test_kernels_compiled_from_another_version_are_refused(monkeypatch):
    if _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    monkeypatch.setattr(_c_kernel.ctypes, "sizeof", lambda structure: 8)  # as if an argument had been added since
    with pytest.raises(ImportError, match="compiled from another version of mapreuse; install mapreuse again"):
        _c_kernel.library.__wrapped__()


@pytest.mark.parametrize("storage", ["dense", "dense8", "recompute"])
def test_long_attentions_run_in_c(monkeypatch, storage):
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
    """2·B·H·T²·d FLOPs per product; a short attention multiplies all 2·T − 1 distances."""
    case = make_case(batch=2, heads=3, num_queries=length, num_keys=length, relative=relative)
    with torch.set_grad_enabled(grad_mode), FlopCounterMode(display=False) as counter:
        attend(case.scores, case.values, keep=keep)
    distances = {60: 2 * 60 - 1, 400: 400}[length] if relative else 0
    assert counter.get_total_flops() == 2 * 2 * 3 * length * (length * (4 + 5) + distances * 4)


@pytest.mark.parametrize("keep", [False, True])
def test_a_flop_counter_counts_two_products_backward_for_each_one_forward(keep):
    """Without the map, its two products are computed once more."""
    case, leaves = with_gradients(make_case(batch=2, heads=3, num_queries=400, relative=True))
    context, _ = attend(case.scores, case.values, keep=keep)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(context.sum(), leaves)
    scores, values = (2 if keep else 3) * (4 + 4), 2 * 5
    assert counter.get_total_flops() == 2 * 2 * 3 * 400**2 * (scores + values)


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


def seen_by(observer):
    """Names of the operators that an attention and its application consist of, under an observer."""
    case = make_case(num_queries=100, num_keys=100)

    class Recorder(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func._overloadpacket))
            return func(*args, **(kwargs or {}))

    def run(query):
        context, attention_map = compute(replace(case.scores, query=query), case.values, "dense")
        return context + attention_map.apply(case.values)

    with torch.no_grad(), Recorder() as recorder:
        observer(run, case.scores.query)
    return {name for name in recorder.names if name.startswith("mapreuse.")}


def test_what_is_recorded_for_others_or_transformed_consists_of_pytorchs_operators():
    def in_forward_mode(run, query):
        with forward_ad.dual_level():
            run(query)

    def traced(run, query):
        with pytest.MonkeyPatch.context() as patch:  # the checks of shapes in a test run cannot be traced
            patch.setattr(torch.jit, "is_tracing", lambda: True)
            run(query)

    operators = {"mapreuse.store_attention", "mapreuse.apply_map"}
    assert seen_by(lambda run, query: run(query)) == operators
    assert seen_by(lambda run, query: make_fx(run)(query)) == operators
    for observer in (
        traced,
        lambda run, query: torch.func.vmap(lambda one: run(query * one))(torch.ones(2)),
        lambda run, query: torch.func.grad(lambda one: run(one).sum())(query),
        lambda run, query: run(query.as_subclass(_Other)),
        in_forward_mode,
    ):
        assert seen_by(observer) == set()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_operators_follow_pytorchs_rules(keep, dropout_p):
    """Fake tensors, autograd and compiled code give the shapes, strides and numbers of a plain call."""
    case = make_case(num_queries=100, num_keys=100, relative=True, mask="queries and keys", bias="heads")
    scores, relative = case.scores, case.scores.relative
    leaves = [t.requires_grad_() for t in (scores.query, scores.key, case.values, scores.bias)]
    arguments = (*leaves[:3], 0.7, scores.mask, leaves[3], False, relative.query, relative.key)
    seed = torch.tensor(3) if dropout_p else None
    torch.library.opcheck(torch.ops.mapreuse.attention, (*arguments, keep, dropout_p, seed))
    memory = torch.empty(scores.shape), None
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.mapreuse.store_attention,
            (*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments), dropout_p, seed, *memory),
        )
    lengths = torch.tensor([[100, 90], [60, 100]])
    torch.library.opcheck(
        torch.ops.mapreuse.apply_map,
        (case.map.detach().requires_grad_(), None, leaves[2], lengths, [0, 2, 2], [1, 0, 2]),
    )


def test_values_and_heads_that_do_not_fit_the_map_are_refused():
    case = make_case(num_queries=100, num_keys=100)
    attention_map = DenseMap(case.map)
    with torch.no_grad():
        for values, heads in ((case.values[:, :, :50], None), (case.values[:, :1], None), (case.values, ((5, 0),))):
            with pytest.raises((ValueError, IndexError, RuntimeError, TypeCheckError)):
                attention_map.apply(values, heads)
        assert attention_map.apply(case.values, ()).shape[1] == 0
        torch.testing.assert_close(DenseMap(case.map.mT).apply(case.values), case.map.mT @ case.values)
