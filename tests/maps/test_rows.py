"""The softmax of a block, by every core, against PyTorch's softmax in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mapreuse.maps._softmax import softmax_of_sum


@pytest.fixture(autouse=True, scope="module")
def _without_a_tape():
    """Where gradients are needed, softmax is PyTorch's."""
    with torch.no_grad():
        yield


def slanted(heads, rows, keys):
    """Memory like that of positional scores: every row begins one place before the row above it."""
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
def test_rows_are_the_softmax_of_the_sum(heads, rows, keys, spread, with_addend, in_place):
    scores = torch.randn(heads, rows, keys) * spread
    addend = slanted(heads, rows, keys) if with_addend else None
    expected = (scores if addend is None else scores + addend).double().softmax(-1)
    # A place between the rows of a larger map, or the scores' own.
    out = scores if in_place else torch.full((heads, rows + 2, keys + 3), 7.0)[:, 1:-1, :keys]
    softmax_of_sum(scores, addend, out)
    torch.testing.assert_close(out.double(), expected, atol=1e-9, rtol=1e-4)


def test_nothing_beside_the_place_is_touched():
    whole = torch.full((2, 5, 40), 7.0)
    softmax_of_sum(torch.randn(2, 3, 33), slanted(2, 3, 33), whole[:, 1:4, :33])
    assert (whole[:, 1:4, :33] < 1).all()
    whole[:, 1:4, :33] = 7
    assert (whole == 7).all()


def test_ordinary_scores_are_good_to_four_millionths():
    scores = torch.randn(2, 64, 2000) * 3
    expected = scores.double().softmax(-1)
    softmax_of_sum(scores, None, scores)
    assert ((scores - expected).abs() / expected).max() < 4e-6
    assert (scores.double().sum(-1) - 1).abs().max() < 1e-5


def test_small_weights_are_good_too():
    scores = torch.tensor([[[0.0, -20.0, -50.0, -80.0]]])
    expected = scores.double().softmax(-1)
    softmax_of_sum(scores, None, scores)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


def test_what_is_masked_gets_exactly_nothing_and_a_row_without_keys_is_even():
    least = torch.finfo(torch.float32).min
    scores = torch.tensor([[[1.0, least, 2.0, float("-inf")], [least] * 4]])
    softmax_of_sum(scores, None, scores)
    assert scores[0, 0, 1] == scores[0, 0, 3] == 0
    torch.testing.assert_close(scores[0, 1], torch.full((4,), 0.25))


def test_a_score_that_is_not_a_number_shows():
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
