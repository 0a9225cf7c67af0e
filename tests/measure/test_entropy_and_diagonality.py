"""Entropy and diagonality: against loops over every element, and on maps whose values are known."""

import itertools
import math

import pytest
import torch
from families import build

from mapreuse.measure import analyze, concentration, diagonality, entropy, similarity
from mapreuse.measure._diagonality import diagonality_of, summed_diagonality
from mapreuse.measure._entropy import summed_entropy
from mapreuse.models import MapRecorder


def maps_without_padding(model, batch):
    """The maps of one sequence after another, (layers, heads, positions, positions)."""
    recording = MapRecorder(model)(batch)
    for item, rows in enumerate(recording[1]):
        yield torch.stack([weights[item][:, rows][:, :, rows] for weights in recording[0]]).double()


def entropy_of_rows(weights):
    return [-sum(p * math.log(p) for p in row if p > 0) for row in weights.tolist()]


def mass_within(weights, reach):
    """Of every query, the mass of keys at most `reach` positions away."""
    return [
        sum(p for key, p in enumerate(row) if abs(key - query) <= reach) for query, row in enumerate(weights.tolist())
    ]


@pytest.mark.parametrize("family", ["bert", "gpt2", "parakeet"])
def test_entropy_is_that_of_every_row_that_is_not_padding(family):
    model, batch = build(family)
    found = entropy(model, [batch])

    sequences = list(maps_without_padding(model, batch))

    for layer, head in itertools.product(range(4), range(4)):
        nats, relative = [], []
        for maps in sequences:
            rows = entropy_of_rows(maps[layer, head])
            nats += rows
            relative += [value / math.log(len(rows)) for value in rows]
        assert found.heads[layer, head].item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)
        assert found.relative[layer, head].item() == pytest.approx(sum(relative) / len(relative), abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "parakeet"])
def test_the_curve_of_diagonality_is_the_mass_within_every_range_without_padding(family):
    model, batch = build(family)
    found = diagonality(model, [batch])

    sequences = list(maps_without_padding(model, batch))

    assert found.ranges.tolist() == pytest.approx([step / 20 for step in range(21)])
    for layer, head, step in itertools.product(range(4), range(4), range(21)):
        within = [
            mass
            for maps in sequences
            for mass in mass_within(maps[layer, head], step * (maps.shape[-1] - 1) / 20 + 1e-9)
        ]
        assert found.curve[layer, head, step].item() == pytest.approx(sum(within) / len(within), abs=1e-5)


@pytest.mark.parametrize(("lengths", "fineness"), [((5, 9), 40), ((2, 6, 11), 50)])
def test_diagonality_is_the_area_under_the_mass_within_every_range(lengths, fineness):
    generator = torch.Generator().manual_seed(3)
    summed, areas = torch.zeros(1, 1, 22, dtype=torch.float64), []
    for length in lengths:
        weights = torch.softmax(3 * torch.randn(length, length, generator=generator, dtype=torch.float64), -1)
        summed = summed + summed_diagonality(weights[None, None])
        for step in range(fineness):  # T − 1 divides the number of steps: the curve is constant between them
            within = mass_within(weights, (step + 0.5) / fineness * (length - 1))
            areas.append(sum(within) / fineness)

    assert diagonality_of(summed / sum(lengths)).heads.item() == pytest.approx(sum(areas) / sum(lengths))


def test_a_map_on_the_diagonal_has_no_entropy_and_diagonality_1():
    identity = torch.eye(7)[None, None]

    assert summed_entropy(identity).flatten().tolist() == [0, 0]
    found = diagonality_of(summed_diagonality(identity) / 7)
    assert found.heads.item() == 1
    assert found.curve.flatten().tolist() == [1] * 21


@pytest.mark.parametrize("length", [2, 10, 33])
def test_a_uniform_map_has_the_entropy_of_all_its_keys_and_known_diagonality(length):
    uniform = torch.full((1, 1, length, length), 1 / length)
    nats, relative = (summed_entropy(uniform) / length).flatten().tolist()
    found = diagonality_of(summed_diagonality(uniform) / length)

    assert nats == pytest.approx(math.log(length))
    assert relative == pytest.approx(1)
    assert found.heads.item() == pytest.approx(1 - (length + 1) / (3 * length))
    assert found.curve[0, 0, -1].item() == pytest.approx(1)
    assert found.curve[0, 0, 0].item() == pytest.approx(1 / length)


def test_a_map_that_attends_as_far_away_as_it_can_has_little_diagonality():
    crossed = torch.eye(2).flip(0)[None, None]

    assert summed_diagonality(crossed)[0, 0, 0].item() == 0


def test_a_sequence_of_one_position_is_on_its_diagonal_and_certain():
    only = torch.ones(1, 1, 1, 1)

    assert summed_entropy(only).flatten().tolist() == [0, 0]
    assert summed_diagonality(only).flatten().tolist() == [1] * 22


def test_one_pass_finds_what_the_four_measures_find_by_themselves():
    model, batch = build("bert")
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 2), slice(2, 3))]
    found = analyze(model, halves, epsilon=0.1, block_rows=3)

    torch.testing.assert_close(found.similarity.heads, similarity(model, [batch]).heads)
    torch.testing.assert_close(found.entropy.heads, entropy(model, [batch]).heads)
    torch.testing.assert_close(found.entropy.relative, entropy(model, [batch]).relative)
    torch.testing.assert_close(found.diagonality.heads, diagonality(model, [batch]).heads)
    torch.testing.assert_close(found.diagonality.curve, diagonality(model, [batch]).curve)
    kept = concentration(model, [batch], epsilon=0.1, block_rows=3)
    torch.testing.assert_close(found.concentration.heads, kept.heads)
    assert (found.concentration.epsilon, found.concentration.block_rows) == (0.1, 3)
    assert found.similarity.num_queries == 16


def test_every_batch_is_run_once_and_progress_counts_them(monkeypatch):
    model, batch = build("bert")
    runs, seen = [], []
    record = MapRecorder.__call__
    monkeypatch.setattr(MapRecorder, "__call__", lambda self, batch: runs.append(batch) or record(self, batch))
    analyze(model, [batch, batch, batch], progress=lambda doing, done, total: seen.append((done, total)))

    assert len(runs) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("measure", [entropy, diagonality, similarity, analyze])
def test_no_batches_and_maps_that_are_not_finite_are_refused(measure):
    model, batch = build("bert")
    with pytest.raises(ValueError, match="no calibration batches"):
        measure(model, [])
    with torch.no_grad():
        model.encoder.layer[2].attention.self.query.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        measure(model, [batch])


def test_an_epsilon_that_is_off_is_refused_before_anything_runs():
    model, batch = build("bert")
    with pytest.raises(ValueError, match=r"epsilon must be between 0 and 1, got 0"):
        analyze(model, [batch], epsilon=0.0)
