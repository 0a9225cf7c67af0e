"""Shared maps are published, read and released."""

import pytest
import torch
from map_cases import make_case

from mapreuse.maps import DenseMap, RecomputedMap, SharedMaps, compute
from mapreuse.maps._scores import shift


def dense():
    return DenseMap(make_case(batch=1).map)


def test_a_published_map_is_read_until_it_is_released():
    maps, attention_map = SharedMaps(), dense()
    maps.publish(3, attention_map)
    assert maps.read(3) is attention_map
    maps.release(3)
    assert maps.read(3) is None


def test_layers_can_share_other_objects_than_maps():
    maps, keys_and_values = SharedMaps(), (torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    maps.publish(0, keys_and_values)
    assert maps.read(0) is keys_and_values
    maps.release(0)
    assert maps.read(0) is None


def test_a_skipped_layer_has_no_map():
    maps = SharedMaps()
    assert maps.read(0) is None
    maps.release(0)


@pytest.mark.parametrize("storage", ["dense", "dense16", "dense8"])
def test_the_memory_of_a_released_map_is_reused_once(storage):
    case, maps = make_case(), SharedMaps(storage=storage)
    with torch.no_grad():
        attention_map = compute(case.scores, case.values, storage)[1]
        maps.publish(0, attention_map)
        assert maps.buffer(case.scores) is None, "it still has readers"
        maps.release(0)
        memory = maps.buffer(case.scores)
        assert memory is attention_map.weights
        assert maps.buffer(case.scores) is None
        expected = attention_map.dense().clone()
        memory.fill_(77)
        again = compute(case.scores, case.values, storage, buffer=memory)[1]
    assert again.weights is memory
    assert torch.equal(again.dense(), expected)


@pytest.mark.parametrize("change", ["shape", "dtype", "storage"])
def test_memory_that_does_not_fit_is_not_reused(change):
    case, maps = make_case(batch=1), SharedMaps(storage="dense8" if change == "storage" else "dense")
    maps.publish(0, DenseMap(case.map))
    maps.release(0)
    scores = case.scores.to(torch.float64) if change == "dtype" else case.scores
    assert maps.buffer(make_case(batch=2).scores if change == "shape" else scores) is None


def test_a_recomputed_map_leaves_no_memory():
    case, maps = make_case(), SharedMaps()
    maps.publish(0, RecomputedMap(case.scores))
    maps.release(0)
    assert maps.buffer(case.scores) is None


def test_a_retained_map_outlives_its_last_reader():
    case, maps = make_case(batch=1), SharedMaps(retain=True)
    attention_map = DenseMap(case.map)
    maps.publish(0, attention_map)
    maps.release(0)
    assert maps.read(0) is attention_map
    assert maps.buffer(case.scores) is None


def test_a_map_without_gradients_is_refused_in_a_pass_that_needs_them():
    maps = SharedMaps(differentiable=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer 2 .*use_reentrant"):
        maps.publish(2, dense())
    maps.publish(2, dense())
    assert maps.read(2) is not None


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shift_starts_one_column_further_left_in_each_row(length):
    scores = torch.arange(2 * length * (2 * length - 1)).float().view(1, 2, length, 2 * length - 1)
    expected = torch.stack([scores[0, :, i, length - 1 - i : 2 * length - 1 - i] for i in range(length)], 1)
    assert torch.equal(shift(scores)[0], expected)
    assert torch.equal(shift(scores.mT.contiguous().mT)[0], expected), "for any strides"
