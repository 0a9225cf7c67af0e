"""Similarity of attention maps, against hooks on the original model."""

import pytest
import torch
from families import build
from torch import nn

from mapreuse.measure import analyze, similarity
from mapreuse.measure._similarity import summed_similarity
from mapreuse.models import MapRecorder


def eager_maps(monkeypatch, family):
    """The model's own maps: what `softmax` returns in the original, eager."""
    model, batch = build(family, implementation="eager")
    maps, softmax = [], nn.functional.softmax
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", lambda *a, **k: maps.append(softmax(*a, **k)) or maps[-1])
        with torch.no_grad():
            model(**batch)
    return model, batch, maps


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_similarity_is_one_minus_the_total_variation_of_the_models_own_maps_without_padding(monkeypatch, family):
    model, batch, maps = eager_maps(monkeypatch, family)
    valid = batch["attention_mask"].bool()
    expected = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    for source in range(4):
        for layer in range(4):
            for head in range(4):
                for other in range(4):
                    rows = (maps[source][:, head] - maps[layer][:, other]).abs().sum(-1)
                    expected[source, head, layer, other] = (1 - rows / 2)[valid].double().mean()

    measured = similarity(model, [batch])

    assert measured.num_queries == int(valid.sum())
    torch.testing.assert_close(measured.heads.double(), expected, atol=1e-5, rtol=0)


def test_similarity_streams_over_batches():
    model, batch = build("bert")
    one_by_one = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]

    torch.testing.assert_close(similarity(model, one_by_one).heads, similarity(model, [batch]).heads)


def test_every_map_is_most_like_itself_and_layers_take_the_best_head():
    model, batch = build("parakeet")
    measured = similarity(model, [batch])
    flat = measured.heads.flatten(0, 1).flatten(1)

    torch.testing.assert_close(flat.diagonal(), torch.ones(16))
    torch.testing.assert_close(flat, flat.T)
    assert (measured.layers.diagonal() > 0.999).all()
    assert measured.layers[0, 1] == pytest.approx(measured.heads[0, :, 1].amax(0).mean().item())


def test_similarity_of_long_peaked_maps_is_that_of_sums_in_float64():
    generator = torch.Generator().manual_seed(0)
    maps = (6 * torch.randn(2, 2, 2000, 2000, generator=generator)).softmax(-1)
    heads = maps.flatten(0, 1).double()
    variation = torch.stack([(heads - one).abs().sum((-2, -1)) / 2 for one in heads])

    measured = summed_similarity(maps)

    assert measured.dtype == torch.float64
    expected = (1 - variation / 2000).view(2, 2, 2, 2)
    torch.testing.assert_close(measured / 2000, expected, atol=1e-7, rtol=0)


def test_similarity_does_not_depend_on_how_many_rows_are_compared_at_a_time(monkeypatch):
    maps = torch.randn(3, 2, 21, 17, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole = summed_similarity(maps)
    monkeypatch.setattr("mapreuse.measure._similarity._MAX_COMPARED", 4 * 6 * 17)

    torch.testing.assert_close(summed_similarity(maps), whole)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_are_compared_in_float32(precision):
    model, batch = build("bert")
    model.to(precision)
    batch = {"input_ids": batch["input_ids"]}
    maps = torch.stack(MapRecorder(model)(batch).maps, 1)
    assert maps.dtype == precision
    rows = maps.double().permute(0, 3, 1, 2, 4).flatten(2, 3)  # sequence, query, layer and head, key
    expected = 1 - (rows[:, :, :, None] - rows[:, :, None]).abs().sum(-1).mean((0, 1)) / 2

    for measured in (similarity(model, [batch]), analyze(model, [batch]).similarity):
        torch.testing.assert_close(measured.heads.flatten(0, 1).flatten(1).double(), expected, atol=1e-6, rtol=0)


def test_the_model_is_left_as_it_was():
    model, batch = build("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    similarity(model, [batch])

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
