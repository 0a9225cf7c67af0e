"""Attention of a computing layer, compared with the definition in `maps/reference.py`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, defined_map, make_case, on_leaves, with_gradients

from mapreuse.maps import DenseMap, RelativePositions, _attend, _blocked, _c_kernel, _operators, attend

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@given(cases(), st.booleans(), st.booleans())
def test_context_and_map_match_the_definition(case, keep, grad_mode):
    with torch.set_grad_enabled(grad_mode):
        context, weights = attend(case.scores, case.values, keep=keep)
    torch.testing.assert_close(context, case.context, **CLOSE)
    without_keys = (case.map == 0).all(-1)
    assert (context[without_keys] == 0).all()
    if keep:
        torch.testing.assert_close(weights, case.map, **CLOSE)
        assert (weights[without_keys] == 0).all()
    else:
        assert weights is None


@given(cases(), st.booleans())
def test_a_context_without_its_map_matches_the_definition_for_either_kernel(case, in_c):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_blocked, "_MAX_SHORT", 0)
        patch.setattr(_attend, "_MIN_SCORES", 0)
        patch.setattr(_attend, "_kernel_is_faster", lambda threads, dim: in_c)
        compute, calls = _c_kernel.compute, []
        patch.setattr(_c_kernel, "compute", lambda *args: calls.append(None) or compute(*args))
        context, _ = attend(case.scores, case.values, keep=False)
        if case.scores.relative is None and not case.scores.beyond_kernels:
            assert bool(calls) == (in_c and _c_kernel.computes(case.scores, case.values))
    torch.testing.assert_close(context, case.context, **CLOSE)


@pytest.mark.parametrize(("times", "expected"), [((1.0, 2.0), True), ((0.95, 1.0), False), ((2.0, 1.0), False)])
def test_the_c_kernel_is_used_if_it_is_clearly_faster_in_float32(monkeypatch, times, expected):
    called, types = [], set()
    monkeypatch.setattr(
        _c_kernel, "compute", lambda scores, _: called.append(times[0]) or types.add(scores.query.dtype)
    )
    monkeypatch.setattr(_attend, "_fused", lambda *args: called.append(times[1]))
    monkeypatch.setattr(_attend, "_seconds", lambda call: call() or called[-1])
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert _attend._kernel_is_faster.__wrapped__(1, 8) is expected
    assert types == {torch.float32}


@given(cases())
def test_a_map_in_a_used_buffer_is_the_same(case):
    used = torch.full(case.scores.shape, float("nan"))
    with torch.no_grad():
        context, weights = attend(case.scores, case.values, keep=True, buffer=used)
    assert weights.data_ptr() == used.data_ptr()
    torch.testing.assert_close(weights, case.map, **CLOSE)
    torch.testing.assert_close(context, case.context, **CLOSE)
    assert context.transpose(1, 2).is_contiguous(), "the order that output projections read"


@given(cases(dtype=torch.float64))
def test_the_rows_of_the_definition_are_distributions_over_the_allowed_keys(case):
    allowed = torch.ones(case.scores.shape, dtype=torch.bool)
    if case.scores.mask is not None:
        allowed = allowed & case.scores.mask
    if case.scores.is_causal:
        allowed = allowed.tril()
    assert (case.map[~allowed] == 0).all()
    if case.scores.sinks is None:
        torch.testing.assert_close(case.map.sum(-1), allowed.any(-1).double())
    assert (case.map.sum(-1) < 1 + 1e-9).all()


def test_relative_positions_depend_on_the_distance_of_query_and_key():
    case = make_case(batch=1, heads=1, num_queries=5, relative=True, dtype=torch.float64)
    scores, positions = case.scores, case.scores.relative
    expected = torch.empty(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            encoding = positions.key[0, 0, (5 - 1) - (i - j)]
            expected[i, j] = 0.7 * (scores.query[0, 0, i] @ scores.key[0, 0, j] + positions.query[0, 0, i] @ encoding)
    torch.testing.assert_close(case.map[0, 0], expected.softmax(-1))
    torch.testing.assert_close(scores.dense()[0, 0], expected)


@pytest.fixture(params=["whole", "in blocks"])
def of_any_size(request, monkeypatch):
    """Compute maps whole, or two rows at a time with the blocked backward pass; returns whether that ran."""
    calls = []
    if request.param == "whole":
        return lambda: True
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 1)
    monkeypatch.setattr(_blocked, "_BLOCK_SCORES", 8)
    monkeypatch.setattr(_blocked, "_MIN_ROWS", 2)
    monkeypatch.setattr(_blocked, "_MAX_ROWS", 2)
    written = _operators.blocked_gradients
    monkeypatch.setattr(_operators, "blocked_gradients", lambda *args: calls.append(None) or written(*args))
    return lambda: bool(calls)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    ("mask", "bias", "dropout_p"),
    [(None, None, 0.0), ("heads", "shared", 0.0), (None, "shared", 0.4), ("heads", None, 0.4)],
)
def test_gradients_match_finite_differences(keep, relative, mask, bias, dropout_p, of_any_size):
    """The same seed drops the same weights in every call."""
    case = make_case(
        batch=2, heads=2, num_queries=4, num_keys=5, relative=relative, mask=mask, bias=bias, dtype=torch.float64
    )
    _, leaves = with_gradients(case)

    def run(*tensors):
        varied = on_leaves(case, list(tensors))
        torch.manual_seed(0)
        return [
            out for out in attend(varied.scores, varied.values, keep=keep, dropout_p=dropout_p) if out is not None
        ]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert of_any_size() or not (keep or relative), "the blocked backward pass did not run"


@given(cases(lengths=(1, 5, 130)), st.booleans())
def test_gradients_match_the_definition(case, keep):
    def loss(context, weights):
        return context.square().sum() + (weights.square().sum() if keep else 0.0)

    found, leaves = with_gradients(case)
    loss(*attend(found.scores, found.values, keep=keep)).backward()
    reference, same_leaves = with_gradients(case)
    loss(reference.context, reference.map).backward()
    for leaf, same in zip(leaves, same_leaves, strict=True):
        expected = torch.zeros_like(same) if same.grad is None else same.grad
        torch.testing.assert_close(leaf.grad, expected, atol=2e-4, rtol=1e-3)


def test_gradients_with_dropout_do_not_depend_on_the_number_of_threads():
    """The backward pass computes the dropout of the forward pass again, in other blocks."""
    found = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        case, leaves = with_gradients(make_case(batch=2, heads=6, num_queries=65, relative=True))
        torch.manual_seed(0)
        torch.set_num_threads(3)
        context, _ = attend(case.scores, case.values, keep=True, dropout_p=0.3)
        torch.set_num_threads(count)
        found.append(torch.autograd.grad(context.pow(3).sum(), leaves))
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    ("mask", "bias", "dropout_p"),
    [(None, None, 0.0), ("heads", "shared", 0.0), (None, "shared", 0.4), ("queries and keys", None, 0.4)],
)
def test_second_derivatives_match_finite_differences(keep, relative, mask, bias, dropout_p, of_any_size):
    if not (keep or relative):
        pytest.skip("PyTorch's fused attention has no second derivatives")
    case = make_case(
        batch=2, heads=2, num_queries=4, num_keys=5, relative=relative, mask=mask, bias=bias, dtype=torch.float64
    )
    _, leaves = with_gradients(case)

    def run(*tensors):
        varied = on_leaves(case, list(tensors))
        torch.manual_seed(0)
        context, weights = attend(varied.scores, varied.values, keep=keep, dropout_p=dropout_p)
        return context.sin().sum() + (weights.cos().sum() if keep else 0.0)

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [True, False])
def test_the_softmax_of_half_precision_runs_in_float32(monkeypatch, grad_mode, dtype, relative):
    case = make_case(num_queries=65, num_keys=65, relative=relative, dtype=dtype, mask="queries and keys")
    softmax, precisions = torch.softmax, []

    def recording(input, dim, dtype=None, **kwargs):
        precisions.append(dtype)
        return softmax(input, dim, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch, "softmax", recording)
    with torch.set_grad_enabled(grad_mode):
        context, weights = attend(case.scores, case.values, keep=True)
    monkeypatch.undo()
    assert precisions
    assert set(precisions) == {torch.float32}
    assert context.dtype == weights.dtype == dtype
    exact = make_case(num_queries=65, num_keys=65, relative=relative, dtype=torch.float64, mask="queries and keys")
    tolerance = 0.03 if dtype == torch.float16 else 0.15
    torch.testing.assert_close(weights.double(), exact.map, atol=tolerance, rtol=0)


def test_a_half_precision_row_of_many_equal_scores_sums_to_one():
    """A sum in bfloat16 would stop growing at 256 keys of weight one."""
    case = make_case(batch=1, heads=1, num_queries=64, num_keys=2048, dtype=torch.bfloat16)
    case.scores.query.zero_()
    with torch.no_grad():
        _, weights = attend(case.scores, case.values, keep=True)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(1, 1, 64), atol=1e-2, rtol=0)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_dropout_keeps_the_mean_and_drops_the_right_share(keep, relative, grad_mode):
    """If the values are the identity, the context is the map after dropout."""
    case = make_case(batch=1, heads=2, num_queries=40, num_keys=40, relative=relative)
    identity = torch.eye(40).expand(1, 2, 40, 40)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad_mode):
        contexts, maps = zip(
            *(attend(case.scores, identity, keep=keep, dropout_p=0.25) for _ in range(200)), strict=True
        )
    draws = torch.stack(contexts)
    if keep:
        torch.testing.assert_close(maps[0], case.map, **CLOSE)
    torch.testing.assert_close(draws.mean(0), case.map, atol=0.12, rtol=0)
    assert (draws - case.map).mean().abs() < 1e-3
    assert (draws == 0).float().mean() == pytest.approx(0.25, abs=0.01)


def test_a_map_that_is_not_kept_is_not_saved_for_the_backward_pass():
    case, _ = with_gradients(make_case(batch=1, heads=2, num_queries=130, relative=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        context, _ = attend(case.scores, case.values, keep=False)
        assert sum(saved) < 130 * 130
        context.sum().backward()
    assert sum(saved) < 130 * 130


def padded(is_causal, relative, bias=None):
    """Two items with valid lengths 130 and 40."""
    case = make_case(
        batch=2, heads=2, num_queries=130, num_keys=130, is_causal=is_causal, relative=relative, bias=bias
    )
    real = torch.arange(130) < torch.tensor([[130], [40]])
    return replace(case.scores, mask=real[:, None, :, None] & real[:, None, None, :]), case.values


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_padding_is_never_read(keep, is_causal, relative):
    scores, values = padded(is_causal, relative, "heads")
    expected = defined_map(scores)
    context_expected = expected @ values
    spoiled = [scores.query, scores.key, values] + ([scores.relative.query] if relative else [])
    for tensor in spoiled:
        tensor[1, :, 40:] = float("nan")
    scores.bias[1, :, 40:] = scores.bias[1, :, :, 40:] = float("nan")
    with torch.no_grad():
        context, weights = attend(scores, values, keep=True if not relative else keep)
    torch.testing.assert_close(context, context_expected, **CLOSE)
    if weights is not None:
        torch.testing.assert_close(weights, expected, **CLOSE)


@pytest.mark.parametrize("length", [1, 5, 64, 129, 300])
@pytest.mark.parametrize("value_dim", [1, 16, 64, 70, 130])
@pytest.mark.parametrize("dim", [1, 36, 64])
def test_sizes_that_are_no_multiple_of_a_tile_match_the_definition(length, value_dim, dim):
    case = make_case(batch=1, num_queries=length, relative=True)
    scale = dim**-0.5
    query, key, relative_query = (torch.randn(1, 3, length, dim) for _ in range(3))
    relative = RelativePositions(relative_query, torch.randn(1, 3, 2 * length - 1, dim))
    scores = replace(case.scores, query=query, key=key, scaling=scale, relative=relative)
    values = torch.randn(1, 3, length, value_dim)
    with torch.no_grad():
        context, weights = attend(scores, values, keep=True)
        applied = DenseMap(weights).apply(values, ((1, 0), (2, 1), (1, 2)))
    expected = defined_map(scores)
    torch.testing.assert_close(weights, expected, **CLOSE)
    torch.testing.assert_close(context, expected @ values, **CLOSE)
    torch.testing.assert_close(applied, expected[:, [1, 2, 1]] @ values, **CLOSE)


def test_many_heads_match_the_definition_for_any_number_of_threads():
    case = make_case(batch=1, heads=16, num_queries=300, num_keys=300, relative=True)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            context, weights = attend(case.scores, case.values, keep=True)
            applied = DenseMap(weights).apply(case.values)
        torch.set_num_threads(threads)
        torch.testing.assert_close(weights, case.map, **CLOSE)
        torch.testing.assert_close(context, case.context, **CLOSE)
        torch.testing.assert_close(applied, case.context, **CLOSE)


def test_a_row_with_only_scores_of_minus_infinity_is_nan():
    case = make_case(batch=1, heads=1, num_queries=100, num_keys=100, bias="heads")
    case.scores.bias[0, 0, 3] = float("-inf")
    with torch.no_grad():
        context, weights = attend(case.scores, case.values, keep=True)
    assert context[0, 0, 3].isnan().all()
    assert weights[0, 0, 3].isnan().all()
    assert defined_map(case.scores)[0, 0, 3].isnan().all()
    assert context[0, 0, 4].isfinite().all()
