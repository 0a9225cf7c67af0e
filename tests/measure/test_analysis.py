"""Measures of attention maps: against loops over every element, and on maps with known values."""

import itertools
import math

import pytest
import torch
from families import build
from torch import nn

from mapreuse.measure import analyze
from mapreuse.measure._analysis import summed_diagonality, summed_entropy, summed_similarity
from mapreuse.models import MapRecorder

CURVE = range(21)


def maps_without_padding(model, batch):
    """The maps of one sequence after another, (layers, heads, positions, positions)."""
    recording = MapRecorder(model)(batch)
    for item, rows in enumerate(recording.valid):
        yield torch.stack([weights[item][:, rows][:, :, rows] for weights in recording.maps]).double()


def entropy_of_rows(weights):
    return [-sum(p * math.log(p) for p in row if p > 0) for row in weights.tolist()]


def mass_within(weights, reach):
    """Attention of each query to keys at most `reach` positions away."""
    return [
        sum(p for key, p in enumerate(row) if abs(key - query) <= reach) for query, row in enumerate(weights.tolist())
    ]


def diagonality_and_curve(maps):
    """Diagonality and curve of one map, from rows of attention."""
    area, *curve = (summed_diagonality(maps[None, None]) / len(maps)).flatten().tolist()
    return area, curve


@pytest.mark.parametrize("family", ["bert", "gpt2", "parakeet"])
def test_entropy_and_diagonality_are_means_over_rows_that_are_not_padding(family):
    model, batch = build(family)
    found = analyze(model, [batch])
    sequences = list(maps_without_padding(model, batch))
    num_queries = sum(maps.shape[-1] for maps in sequences)

    assert found.similarity.num_queries == num_queries
    for layer, head in itertools.product(range(4), range(4)):
        nats, relative = [], []
        for maps in sequences:
            rows = entropy_of_rows(maps[layer, head])
            nats += rows
            relative += [value / math.log(len(rows)) for value in rows]
        assert found.entropy[layer, head].item() == pytest.approx(sum(nats) / num_queries, abs=1e-5)
        assert found.relative_entropy[layer, head].item() == pytest.approx(sum(relative) / num_queries, abs=1e-5)
        for step in CURVE:
            within = sum(
                sum(mass_within(maps[layer, head], step * (maps.shape[-1] - 1) / 20 + 1e-9)) for maps in sequences
            )
            assert found.diagonality_curve[layer, head, step].item() == pytest.approx(within / num_queries, abs=1e-5)


@pytest.mark.parametrize(("length", "fineness"), [(2, 10), (6, 50), (11, 50)])
def test_diagonality_is_the_area_under_the_mass_within_every_range(length, fineness):
    """T − 1 divides the number of steps, so the curve is constant within each of them."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.softmax(3 * torch.randn(length, length, generator=generator, dtype=torch.float64), -1)
    areas = [sum(mass_within(weights, (step + 0.5) / fineness * (length - 1))) / fineness for step in range(fineness)]

    assert diagonality_and_curve(weights)[0] == pytest.approx(sum(areas) / length)


@pytest.mark.parametrize("length", [1, 7])
def test_a_map_on_the_diagonal_has_no_entropy_and_diagonality_1(length):
    identity = torch.eye(length)

    assert summed_entropy(identity[None, None]).flatten().tolist() == [0, 0]
    assert diagonality_and_curve(identity) == (1, [1] * 21)
    assert diagonality_and_curve(torch.eye(2).flip(0))[0] == 0, "attention as far away as possible"


@pytest.mark.parametrize("length", [2, 33])
def test_a_uniform_map_has_the_entropy_of_all_its_keys_and_known_diagonality(length):
    uniform = torch.full((length, length), 1 / length)
    nats, relative = (summed_entropy(uniform[None, None]) / length).flatten().tolist()
    area, curve = diagonality_and_curve(uniform)

    assert (nats, relative) == pytest.approx((math.log(length), 1))
    assert area == pytest.approx(1 - (length + 1) / (3 * length))
    assert (curve[0], curve[-1]) == pytest.approx((1 / length, 1))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_similarity_is_one_minus_the_total_variation_of_the_models_own_maps_without_padding(monkeypatch, family):
    model, batch = build(family, implementation="eager")
    maps, softmax = [], nn.functional.softmax
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", lambda *a, **k: maps.append(softmax(*a, **k)) or maps[-1])
        model(**batch)
    valid = batch["attention_mask"].bool()
    expected = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    for source, layer, head, other in itertools.product(range(4), repeat=4):
        rows = (maps[source][:, head] - maps[layer][:, other]).abs().sum(-1)
        expected[source, head, layer, other] = (1 - rows / 2)[valid].double().mean()

    measured = analyze(model, [batch]).similarity

    assert measured.num_queries == int(valid.sum())
    torch.testing.assert_close(measured.heads.double(), expected, atol=1e-5, rtol=0)


def test_similarity_of_layers_takes_the_best_head():
    model, batch = build("parakeet")
    measured = analyze(model, [batch]).similarity

    assert (measured.layers.diagonal() > 0.999).all()
    assert measured.layers[0, 1] == pytest.approx(measured.heads[0, :, 1].amax(0).mean().item())


def test_similarity_of_long_peaked_maps_is_that_of_sums_in_float64():
    """At this length, few rows are compared at a time."""
    generator = torch.Generator().manual_seed(0)
    maps = (6 * torch.randn(2, 2, 2000, 2000, generator=generator)).softmax(-1)
    heads = maps.flatten(0, 1).double()
    variation = torch.stack([(heads - one).abs().sum((-2, -1)) / 2 for one in heads])

    measured = summed_similarity(maps)

    assert measured.dtype == torch.float64
    expected = (1 - variation / 2000).view(2, 2, 2, 2)
    torch.testing.assert_close(measured / 2000, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_are_compared_in_float32(precision):
    model, batch = build("bert")
    model.to(precision)
    batch = {"input_ids": batch["input_ids"]}
    maps = torch.stack(MapRecorder(model)(batch).maps, 1)
    assert maps.dtype == precision
    rows = maps.double().permute(0, 3, 1, 2, 4).flatten(2, 3)  # sequence, query, layer and head, key
    expected = 1 - (rows[:, :, :, None] - rows[:, :, None]).abs().sum(-1).mean((0, 1)) / 2

    measured = analyze(model, [batch]).similarity.heads.flatten(0, 1).flatten(1)
    torch.testing.assert_close(measured.double(), expected, atol=1e-6, rtol=0)


def test_batches_run_once_in_any_division(monkeypatch):
    model, batch = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = analyze(model, [batch])
    one_by_one = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
    runs = []
    record = MapRecorder.__call__
    monkeypatch.setattr(MapRecorder, "__call__", lambda self, batch: runs.append(batch) or record(self, batch))
    found = analyze(model, one_by_one)

    assert len(runs) == 3
    for one, other in (
        (found.similarity.heads, whole.similarity.heads),
        (found.entropy, whole.entropy),
        (found.diagonality, whole.diagonality),
    ):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_batches_and_maps_that_are_not_finite_are_refused():
    model, batch = build("bert")
    with pytest.raises(ValueError, match="no calibration batches"):
        analyze(model, [])
    with torch.no_grad():
        model.encoder.layer[2].attention.self.query.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        analyze(model, [batch])
