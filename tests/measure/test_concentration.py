"""Concentration: maps whose shape is known need the keys that they are made to need."""

import pytest
import torch
from families import build

from mapreuse.measure import concentration
from mapreuse.measure._concentration import summed_shares
from mapreuse.models import MapRecorder


def shares(rows, epsilon, block_rows):
    maps = torch.as_tensor(rows)[None, None]
    return (summed_shares(maps, epsilon, block_rows) / maps.shape[2]).item()


def test_a_uniform_map_needs_all_but_what_may_be_left_out():
    uniform = torch.full((8, 100), 0.01)
    assert shares(uniform, 0.1, 4) == pytest.approx(0.91, abs=0.011)


def test_a_diagonal_map_needs_one_key_a_row_and_a_block_as_many_as_it_has_rows():
    diagonal = torch.eye(20)
    assert shares(diagonal, 0.1, 1) == pytest.approx(1 / 20)
    assert shares(diagonal, 0.1, 5) == pytest.approx(5 / 20)


def test_the_brute_force_interval_is_no_shorter():
    generator = torch.Generator().manual_seed(0)
    rows = torch.softmax(4 * torch.randn(6, 30, generator=generator), -1)
    epsilon = 0.2
    needed = []
    for row in rows:
        first = next(a for a in range(30) if row[: a + 1].sum() > epsilon / 2)
        last = next(b for b in range(29, -1, -1) if row[b:].sum() > epsilon / 2)
        needed.append((first, last))
    expected = max(last for _, last in needed) - min(first for first, _ in needed) + 1
    assert shares(rows, epsilon, 6) == pytest.approx(expected / 30)


def test_padding_is_left_out_and_every_layer_and_head_is_measured():
    model, batch = build("bert")
    found = concentration(model, [batch], epsilon=0.1, block_rows=3)
    recording = MapRecorder(model)(batch)
    maps, valid = recording[0], recording[1]
    total = sum(
        summed_shares(torch.stack([m[item][:, rows][:, :, rows] for m in maps]), 0.1, 3)
        for item, rows in enumerate(valid)
    )
    torch.testing.assert_close(found.heads, (total / valid.sum()).float())
    assert found.heads.shape == (4, 4)
    assert (found.heads > 0).all()
    assert (found.heads <= 1).all()


def test_bad_input_is_refused():
    model, batch = build("bert")
    with pytest.raises(ValueError, match=r"epsilon must be between 0 and 1, got 1\.0"):
        concentration(model, [batch], epsilon=1.0)
    with pytest.raises(ValueError, match="no calibration batches"):
        concentration(model, [], epsilon=0.1)
