"""Stored and recomputed maps give the same result when other layers apply them."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, defined_map, make_case, with_gradients

from mapreuse.maps import DenseMap, RecomputedMap, Scores, as_index, compute

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = ["dense", "recompute"]


def make_map(kind, case):
    return DenseMap(case.map) if kind == "dense" else RecomputedMap(case.scores)


@given(cases(), st.sampled_from(KINDS), st.booleans(), st.data())
def test_applying_a_map_is_a_matrix_product(case, kind, grad_mode, data):
    """For any pairing of map heads and value heads."""
    batch, heads, _, num_keys = case.scores.shape
    value_heads = data.draw(st.integers(1, 4))
    values = torch.randn(batch, num_keys, value_heads, 3).transpose(1, 2)
    pair = st.tuples(st.integers(0, heads - 1), st.integers(0, value_heads - 1))
    pairs = tuple(data.draw(st.lists(pair, min_size=1, max_size=6)))
    with torch.set_grad_enabled(grad_mode):
        context = make_map(kind, case).apply(values, pairs)
    expected = torch.stack([case.map[:, m] @ values[:, v] for m, v in pairs], 1)
    torch.testing.assert_close(context, expected, **CLOSE)


@given(cases(), st.sampled_from(KINDS), st.booleans())
def test_without_an_assignment_equal_heads_are_paired(case, kind, grad_mode):
    with torch.set_grad_enabled(grad_mode):
        context = make_map(kind, case).apply(case.values)
    torch.testing.assert_close(context, case.context, **CLOSE)


@given(cases())
def test_the_weights_of_a_recomputed_map_match_the_definition(case):
    recomputed = RecomputedMap(case.scores)
    torch.testing.assert_close(recomputed.dense(), case.map, **CLOSE)
    assert recomputed.num_heads == DenseMap(case.map).num_heads == case.map.shape[1]


@pytest.mark.parametrize("pairs", [None, ((0, 0), (0, 1), (0, 2)), ((2, 0), (0, 2))])
def test_a_map_is_applied_without_its_padding(pairs):
    """Two items with valid lengths 9 and 4; values after them may be NaN."""
    case = make_case(batch=2, num_queries=9, num_keys=9)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    scores = replace(case.scores, mask=real[:, None, :, None] & real[:, None, None, :])
    with torch.no_grad():
        values = case.values.clone()
        values[1, :, 4:] = float("nan")
        context = compute(scores, case.values, "dense")[1].apply(values, pairs)
    expected = defined_map(scores)
    heads = pairs or tuple((head, head) for head in range(3))
    expected = torch.stack([expected[:, m] @ case.values[:, v] for m, v in heads], 1)
    torch.testing.assert_close(context, expected, **CLOSE)


@pytest.mark.parametrize("pairs", [((0, 0), (0, 1), (0, 2)), ((1, 1), (1, 2), (0, 0)), ((2, 0), (2, 2), (2, 1))])
def test_consecutive_value_heads_of_one_map_head_share_a_product(kernel, monkeypatch, pairs):
    if kernel != "PyTorch":
        pytest.skip("products in C cannot be counted")
    case = make_case(batch=1)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(b.shape[1]) or mm(a, b, out=out))
    with torch.no_grad():
        context = DenseMap(case.map).apply(case.values, pairs)
    monkeypatch.undo()
    torch.testing.assert_close(context, torch.stack([case.map[:, m] @ case.values[:, v] for m, v in pairs], 1))
    expected = {((0, 0), (0, 1), (0, 2)): [15], ((1, 1), (1, 2), (0, 0)): [10, 5]}
    assert products == expected.get(pairs, [5, 5, 5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [True, False])
def test_gradients_flow_through_a_map_to_its_source(kind, relative):
    case = make_case(relative=relative, mask="queries and keys")
    pairs = ((0, 1), (2, 2), (2, 0), (1, 1))
    found, leaves = with_gradients(case)
    make_map(kind, found).apply(found.values, pairs).square().sum().backward()
    reference, same_leaves = with_gradients(case)
    torch.stack([reference.map[:, m] @ reference.values[:, v] for m, v in pairs], 1).square().sum().backward()
    for leaf, same in zip(leaves, same_leaves, strict=True):
        assert leaf.grad.abs().max() > 1e-3
        torch.testing.assert_close(leaf.grad, same.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("pairs", [None, ((0, 0), (0, 1), (1, 2))])
def test_every_call_draws_its_own_dropout(kind, grad_mode, pairs):
    """If the values are ones, the context is the sum of the weights that are not dropped."""
    case = make_case(batch=1, num_queries=40, num_keys=40)
    ones = torch.ones(1, 3, 40, 1)
    attention_map = make_map(kind, case)
    before = case.map.clone()
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad_mode):
        first = attention_map.apply(ones, pairs, dropout_p=0.5)
        second = attention_map.apply(ones, pairs, dropout_p=0.5)
    assert (first - second).abs().mean() > 0.1
    assert (first[:, 0] - first[:, 1]).abs().mean() > 0.1, "heads that share a product draw separately"
    assert first.mean() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(case.map, before), "the map does not change"


def test_a_map_reports_the_size_of_its_tensors():
    case = make_case(batch=2, heads=3, num_queries=7, num_keys=7, relative=True)
    assert DenseMap(case.map).nbytes == 2 * 3 * 7 * 7 * 4
    relative = case.scores.relative
    assert RecomputedMap(case.scores).nbytes == 4 * (
        2 * 2 * 3 * 7 * 4 + relative.query.numel() + relative.key.numel()
    )


def test_a_recomputed_map_grows_linearly_with_the_length_and_a_dense_map_quadratically():
    def sizes(length):
        case = make_case(num_queries=length, num_keys=length)
        return DenseMap(case.map).nbytes, RecomputedMap(case.scores).nbytes

    (dense, recomputed), (dense_twice, recomputed_twice) = sizes(32), sizes(64)
    assert dense_twice == 4 * dense
    assert recomputed_twice == 2 * recomputed


@pytest.mark.parametrize("relative", [True, False])
def test_converted_scores_have_one_type_and_a_finite_bias(relative):
    case = make_case(relative=relative, bias="heads")
    case.scores.bias[0, 0, 0] = torch.finfo(torch.float32).min
    half = case.scores.to(torch.bfloat16)
    tensors = [half.query, half.key, half.bias] + ([half.relative.query, half.relative.key] if relative else [])
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert half.to(torch.bfloat16) is half
    unbiased = Scores(case.scores.query, case.scores.key.bfloat16(), 1.0).to(torch.bfloat16)
    assert unbiased.query.dtype == torch.bfloat16


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8) | st.integers(1, 8).map(lambda n: list(range(n))))
def test_only_heads_that_are_not_consecutive_are_copied(heads):
    tensor = torch.arange(16).view(2, 8)
    selected = tensor[:, as_index(heads)]
    consecutive = all(after == before + 1 for before, after in itertools.pairwise(heads))

    assert selected.tolist() == [[row[head] for head in heads] for row in tensor.tolist()]
    assert (selected.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()) is consecutive
