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
