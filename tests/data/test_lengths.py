"""Batches of chosen lengths keep the data's tokens and have no padding."""

import pytest
import torch

from mapreuse.data import batches_by_quantile, batches_of_lengths


def test_quantiles_are_the_medians_of_equal_parts():
    batches = [{"number": torch.tensor(number)} for number in range(12)]
    assert [int(batch["number"]) for batch in batches_by_quantile(batches, 3)] == [2, 6, 10]
    assert [int(batch["number"]) for batch in batches_by_quantile(batches, 1)] == [6]
    assert batches_by_quantile(batches[:2], 5) == batches[:2]


def test_a_batch_is_cut_or_repeated_to_its_length():
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    short, long = batches_of_lengths([{"input_ids": ids, "attention_mask": mask}], [2, 8], 3)
    assert short["input_ids"].tolist() == [[0, 1], [5, 6], [0, 1]]
    assert long["input_ids"][1].tolist() == [5, 6, 7, 8, 9, 5, 6, 7]
    assert bool((short["attention_mask"] == 1).all())
    assert bool((long["attention_mask"] == 1).all())
    (features,) = batches_of_lengths([{"input_features": torch.randn(1, 4, 3)}], [6], 2)
    assert features["input_features"].shape == (2, 6, 3)


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, 4, "images have no length"),
        ({"input_ids": torch.zeros(1, 3)}, 0, "a length must be a whole number, at least 1, got 0"),
    ],
)
def test_what_has_no_length_is_refused(batch, length, message):
    with pytest.raises(ValueError, match=message):
        batches_of_lengths([batch], [length], 1)
