"""Phoneme attention, compared with loops over pairs of frames, and on maps with known values."""

import itertools
import math

import pytest
import torch
from families import build
from mapreuse_lab.study._phoneme_attention import phoneme_attention
from mapreuse_lab.training import BASELINE, Recogniser, phoneme_batches

from mapreuse import ReusePlan, apply
from mapreuse.models import MapRecorder, Recording

CLASSES = 3


@pytest.fixture
def measure(monkeypatch):
    """Measure hand-made maps, one for each sequence."""

    def measured(*sequences, num_classes=CLASSES):
        monkeypatch.setattr(MapRecorder, "__init__", lambda self, model, under_plan: None)
        monkeypatch.setattr(MapRecorder, "__call__", lambda self, batch: batch["recording"])
        batches = []
        for weights, classes in sequences:
            valid = torch.ones(1, len(classes), dtype=torch.bool)
            values = torch.zeros(1, 1, len(classes), 1)
            batches.append({"recording": Recording([weights[None, None].float()], valid, [values])})
        labels = [torch.tensor([classes]) for _, classes in sequences]
        found = phoneme_attention(torch.nn.Identity(), batches, labels, num_classes=num_classes)
        return found.matrices[0, 0], found.same.item()

    return measured


def random_map(length, seed=0):
    return torch.softmax(2 * torch.randn(length, length, generator=torch.Generator().manual_seed(seed)), -1)


def in_one_run(classes, query, key):
    low, high = sorted((query, key))
    return all(classes[frame] == classes[query] for frame in range(low, high + 1))


def by_loops(sequences):
    attended = [[0.0] * CLASSES for _ in range(CLASSES)]
    uniform = [[0.0] * CLASSES for _ in range(CLASSES)]
    for weights, classes in sequences:
        attention = weights.tolist()
        for query, key in itertools.product(range(len(classes)), repeat=2):
            if classes[query] >= 0 and classes[key] >= 0 and not in_one_run(classes, query, key):
                attended[classes[query]][classes[key]] += attention[query][key]
                uniform[classes[query]][classes[key]] += 1 / len(classes)
    ratio = [
        [a / b if b else math.nan for a, b in zip(*rows, strict=True)] for rows in zip(attended, uniform, strict=True)
    ]
    return ratio, sum(attended[c][c] for c in range(CLASSES)) / sum(uniform[c][c] for c in range(CLASSES))


def agrees(found, expected):
    torch.testing.assert_close(found[0], torch.tensor(expected[0]), equal_nan=True, rtol=1e-4, atol=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


UTTERANCES = [
    [0, 0, 1, 1, 0, 2, 2, 2, 1, 0],
    [-1, 2, 2, -1, 2, 1, 1, 0, -1, -1, 1, 2, 0],
    [1, 1],
    [0],
]


def test_it_equals_loops_over_all_pairs_of_frames(measure):
    sequences = [(random_map(len(classes), seed), classes) for seed, classes in enumerate(UTTERANCES)]
    agrees(measure(*sequences), by_loops(sequences))


@pytest.mark.parametrize("family", ["parakeet", "bert"])
def test_every_layer_and_head_of_a_model_counts_and_padding_does_not(family):
    model, batch = build(family)
    recording = MapRecorder(model)(batch)
    labels = torch.randint(-1, CLASSES, recording.valid.shape, generator=torch.Generator().manual_seed(1))
    found = phoneme_attention(model, [batch], [labels], num_classes=CLASSES)
    changed = phoneme_attention(model, [batch], [labels.masked_fill(~recording.valid, 7)], num_classes=CLASSES)

    assert not recording.valid.all()
    for layer, head in itertools.product(range(4), range(4)):
        sequences = [
            (recording.maps[layer][item, head][rows][:, rows], labels[item][rows].tolist())
            for item, rows in enumerate(recording.valid)
        ]
        agrees((found.matrices[layer, head], found.same[layer, head].item()), by_loops(sequences))
    torch.testing.assert_close(vars(changed), vars(found), equal_nan=True)


def test_two_batches_give_the_same_result_as_one():
    model, batch = build("bert")
    labels = torch.randint(0, CLASSES, MapRecorder(model)(batch).valid.shape)
    parts = slice(0, 1), slice(1, 3)
    whole = phoneme_attention(model, [batch], [labels], num_classes=CLASSES)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in parts]
    found = phoneme_attention(model, iter(halves), iter([labels[part] for part in parts]), num_classes=CLASSES)

    torch.testing.assert_close(vars(found), vars(whole), equal_nan=True)


def test_a_reusing_layer_counts_with_the_map_that_it_applies():
    model, batch = build("parakeet")
    labels = torch.randint(0, CLASSES, MapRecorder(model)(batch).valid.shape)
    found = phoneme_attention(apply(model, ReusePlan.grouped(4, 2)), [batch], [labels], num_classes=CLASSES)

    torch.testing.assert_close(found.matrices[1], found.matrices[0])
    torch.testing.assert_close(found.matrices[3], found.matrices[2])
    assert (found.matrices[2] - found.matrices[0]).abs().max() > 0.1


def test_a_diagonal_map_attends_to_its_own_run_only(measure):
    matrix, same = measure((torch.eye(8), [0, 0, 1, 1, 0, 0, 1, 1]), num_classes=2)

    assert matrix.tolist() == [[0, 0], [0, 0]]
    assert same == 0


def test_a_map_that_attends_to_all_frames_of_its_phoneme_has_a_large_value(measure):
    classes = [0, 1, 2, 3, 0, 1, 2, 3]
    alike = torch.tensor(classes)[:, None] == torch.tensor(classes)
    matrix, same = measure((alike / 2, classes), num_classes=4)

    torch.testing.assert_close(matrix, 4 * torch.eye(4))
    assert same == pytest.approx(4)


def test_the_shipped_recogniser_attends_the_same_phonemes_in_lower_layers():
    baseline = Recogniser.load(BASELINE)
    batches, labels, phonemes = phoneme_batches(baseline, "en", sentences=24)
    found = phoneme_attention(baseline.model, batches, labels, num_classes=len(phonemes))
    moved = [row.roll(20, 1) for row in labels]  # 0.8 s later
    chance = phoneme_attention(baseline.model, batches, moved, num_classes=len(phonemes))

    lower, upper = found.same.unflatten(0, (2, 4)).mean((1, 2)).tolist()
    assert lower > 1.3 > 1.2 > upper
    assert chance.same[:4].mean() < 1.1
