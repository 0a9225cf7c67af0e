"""Maps on their way from computing to reusing layers."""

import pytest
import torch
from map_cases import make_case

from mapreuse.maps import DenseMap, RecomputedMap, SharedMaps
from mapreuse.maps._scores import shift


def dense():
    return DenseMap(make_case(batch=1).map)


def test_a_published_map_is_read_until_it_is_released():
    maps, attention_map = SharedMaps(), dense()
    maps.publish(3, attention_map)
    assert maps.read(3) is attention_map
    maps.release(3)
    assert maps.read(3) is None


def test_a_layer_that_did_not_run_has_no_map():
    maps = SharedMaps()
    assert maps.read(0) is None
    maps.release(0)


def test_the_memory_of_a_released_map_is_handed_out_once():
    maps, attention_map = SharedMaps(), dense()
    weights = attention_map.weights
    maps.publish(0, attention_map)
    assert maps.buffer(weights, weights.shape) is None, "it is still being read"
    maps.release(0)
    assert maps.buffer(weights, weights.shape) is weights
    assert maps.buffer(weights, weights.shape) is None


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_memory_that_does_not_fit_is_not_handed_out(change):
    maps, attention_map = SharedMaps(), dense()
    weights = attention_map.weights
    maps.publish(0, attention_map)
    maps.release(0)
    like = weights.double() if change == "dtype" else weights
    shape = (1, 1, 1, 1) if change == "shape" else weights.shape
    assert maps.buffer(like, shape) is None


def test_a_recomputed_map_leaves_no_memory_to_recycle():
    case, maps = make_case(), SharedMaps()
    maps.publish(0, RecomputedMap(case.scores))
    maps.release(0)
    assert maps.buffer(case.map, case.map.shape) is None


def test_retained_maps_outlive_their_last_reader_and_are_never_written_over():
    maps, attention_map = SharedMaps(retain=True), dense()
    maps.publish(0, attention_map)
    maps.release(0)
    assert maps.read(0) is attention_map
    assert maps.buffer(attention_map.weights, attention_map.weights.shape) is None


def test_a_map_without_gradients_is_refused_in_a_pass_that_needs_them():
    maps = SharedMaps(differentiable=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer 2 .*use_reentrant"):
        maps.publish(2, dense())
    maps.publish(2, dense())
    assert maps.read(2) is not None


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shift_reads_the_same_memory_from_one_column_further_left_in_each_row(length):
    scores = torch.arange(2 * length * (2 * length - 1)).float().view(1, 2, length, 2 * length - 1)
    expected = torch.stack([scores[0, :, i, length - 1 - i : 2 * length - 1 - i] for i in range(length)], 1)
    assert torch.equal(shift(scores)[0], expected)
    assert shift(scores).data_ptr() == scores.data_ptr() + 4 * (length - 1)
    assert torch.equal(shift(scores.mT.contiguous().mT)[0], expected), "whatever its strides"
