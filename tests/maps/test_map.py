"""Stored and recomputed maps give the same result when other layers apply them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, make_case, with_gradients

from mapreuse.maps import DenseMap, RecomputedMap, Scores, as_index
from mapreuse.maps._scores import product_of_heads

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = ["dense", "recompute"]


def make_map(kind, case):
    return DenseMap(case.map) if kind == "dense" else RecomputedMap(case.scores)


@given(cases(), st.sampled_from(KINDS), st.booleans(), st.data())
def test_applying_a_map_is_a_matrix_product_for_any_pairs_of_heads(case, kind, grad_mode, data):
    batch, heads, _, num_keys = case.scores.shape
    value_heads = data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, heads - 1), st.integers(0, value_heads - 1))
    pairs = data.draw(st.none() | st.lists(pair, min_size=1, max_size=6).map(tuple))
    values = torch.randn(batch, num_keys, value_heads if pairs else heads, 3).transpose(1, 2)
    with torch.set_grad_enabled(grad_mode):
        context = make_map(kind, case).apply(values, pairs)
    equal_heads = tuple((head, head) for head in range(heads))
    expected = torch.stack([case.map[:, m] @ values[:, v] for m, v in pairs or equal_heads], 1)
    torch.testing.assert_close(context, expected, **CLOSE)


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


@pytest.mark.parametrize(
    "choice", [[0, 0, 1, 1], [0, 1, 2, 3], [2, 2, 2, 2], [1, 0, 0, 3, 1], [0, 2], [3, 1], [2, 2, 3, 3]]
)
def test_heads_of_a_step_multiply_matrices_that_they_share(choice):
    rows, matrices = torch.randn(2, len(choice), 1, 5), torch.randn(2, 4, 5, 3)
    product = product_of_heads(rows, matrices, choice)
    torch.testing.assert_close(product, rows @ matrices[:, choice])
    weights = rows.softmax(-1)
    pairs = tuple((len(choice) - 1 - head, matrix) for head, matrix in enumerate(choice))
    torch.testing.assert_close(DenseMap(weights).apply(matrices, pairs), weights.flip(1) @ matrices[:, choice])
