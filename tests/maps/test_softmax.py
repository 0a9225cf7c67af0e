"""The softmax of a block, compared with PyTorch in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mapreuse.maps._softmax import softmax_of_sum


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    """The C kernel runs only without gradients."""
    with torch.no_grad():
        yield


def slanted(heads, rows, keys):
    """A view like that of positional scores: each row starts one element before the row above it."""
    width = keys + rows - 1
    room = torch.randn(heads, rows, width)
    return room.as_strided((heads, rows, keys), (rows * width, width - 1, 1), rows - 1)


@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 9),
    keys=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    with_addend=st.booleans(),
    in_place=st.booleans(),
)
def test_rows_match_the_softmax_of_the_sum(heads, rows, keys, spread, with_addend, in_place):
    scores = torch.randn(heads, rows, keys) * spread
    addend = slanted(heads, rows, keys) if with_addend else None
    expected = (scores if addend is None else scores + addend).double().softmax(-1)
    # Part of a larger map, or the scores themselves.
    out = scores if in_place else torch.full((heads, rows + 2, keys + 3), 7.0)[:, 1:-1, :keys]
    softmax_of_sum(scores, addend, out)
    torch.testing.assert_close(out.double(), expected, atol=1e-9, rtol=1e-4)


def test_nothing_outside_the_output_is_written():
    whole = torch.full((2, 5, 40), 7.0)
    softmax_of_sum(torch.randn(2, 3, 33), slanted(2, 3, 33), whole[:, 1:4, :33])
    assert (whole[:, 1:4, :33] < 1).all()
    whole[:, 1:4, :33] = 7
    assert (whole == 7).all()


def test_weights_have_a_relative_error_below_4e_6():
    scores = torch.randn(2, 64, 2000) * 3
    expected = scores.double().softmax(-1)
    softmax_of_sum(scores, None, scores)
    assert ((scores - expected).abs() / expected).max() < 4e-6
    assert (scores.double().sum(-1) - 1).abs().max() < 1e-5


def test_small_weights_are_accurate():
    scores = torch.tensor([[[0.0, -20.0, -50.0, -80.0]]])
    expected = scores.double().softmax(-1)
    softmax_of_sum(scores, None, scores)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


def test_masked_keys_get_zero_and_a_fully_masked_row_is_uniform():
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor([[[1.0, lowest, 2.0, float("-inf")], [lowest] * 4]])
    softmax_of_sum(scores, None, scores)
    assert scores[0, 0, 1] == scores[0, 0, 3] == 0
    torch.testing.assert_close(scores[0, 1], torch.full((4,), 0.25))


def test_a_nan_score_makes_its_row_nan():
    scores = torch.zeros(1, 2, 20)
    scores[0, 1, 5] = float("nan")
    softmax_of_sum(scores, None, scores)
    assert scores[0, 1].isnan().all()
    assert not scores[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_are_left_to_pytorch(dtype):
    scores, addend = torch.randn(2, 3, 11).to(dtype), torch.randn(2, 3, 11).to(dtype)
    expected = (scores + addend).double().softmax(-1)
    out = torch.empty_like(scores)
    softmax_of_sum(scores, addend, out)
    torch.testing.assert_close(out.double(), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-12, rtol=1e-2)
