"""Phoneme attention, compared with loops over pairs of frames, and on maps with known values."""

import itertools
import json
import math

import pytest
import torch
from families import build
from mapreuse_lab.study._phoneme_attention import phoneme_attention, phoneme_attention_data

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
        return found.matrices[0, 0], found.same.item(), found.same_or_own.item(), found.same_beyond_position.item()

    return measured


def random_map(length, seed=0):
    return torch.softmax(2 * torch.randn(length, length, generator=torch.Generator().manual_seed(seed)), -1)


def in_one_run(classes, query, key):
    low, high = sorted((query, key))
    return all(classes[frame] == classes[query] for frame in range(low, high + 1))


def pairs_apart(classes):
    """Pairs of frames with classes that are not in one run."""
    for query, key in itertools.product(range(len(classes)), repeat=2):
        if classes[query] >= 0 and classes[key] >= 0 and not in_one_run(classes, query, key):
            yield query, key


def by_loops(sequences, num_classes=CLASSES):
    attended = [[0.0] * num_classes for _ in range(num_classes)]
    even = [[0.0] * num_classes for _ in range(num_classes)]
    own, even_own, by_position = 0.0, 0.0, 0.0
    for weights, classes in sequences:
        attention = weights.tolist()
        pairs = list(pairs_apart(classes))
        for query, key in pairs:
            attended[classes[query]][classes[key]] += attention[query][key]
            even[classes[query]][classes[key]] += 1 / len(classes)
            if classes[query] == classes[key]:
                at_this_distance = [attention[i][j] for i, j in pairs if j - i == key - query]
                by_position += sum(at_this_distance) / len(at_this_distance)
        for query, key in itertools.product(range(len(classes)), repeat=2):
            if classes[query] == classes[key] >= 0:
                own += attention[query][key]
                even_own += 1 / len(classes)
    ratio = [
        [a / b if b else math.nan for a, b in zip(*rows, strict=True)] for rows in zip(attended, even, strict=True)
    ]
    same = sum(attended[c][c] for c in range(num_classes))
    return ratio, same / sum(even[c][c] for c in range(num_classes)), own / even_own, same / by_position


def agrees(found, expected):
    torch.testing.assert_close(found[0], torch.tensor(expected[0]), equal_nan=True, rtol=1e-4, atol=1e-6)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-4)


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
        summaries = found.same, found.same_or_own, found.same_beyond_position
        agrees((found.matrices[layer, head], *(s[layer, head].item() for s in summaries)), by_loops(sequences))
    counted = labels[recording.valid]
    assert found.num_frames.tolist() == [(counted == number).sum().item() for number in range(CLASSES)]
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


def test_uniform_attention_is_1_for_all_pairs_of_classes(measure):
    sequences = [(torch.full((len(c), len(c)), 1 / len(c)), c) for c in UTTERANCES]
    matrix, *summaries = measure(*sequences)

    torch.testing.assert_close(matrix, torch.ones(CLASSES, CLASSES))
    assert summaries == pytest.approx([1, 1, 1])


def test_a_diagonal_map_attends_to_its_own_run_only(measure):
    classes = [0, 0, 1, 1, 0, 0, 1, 1]
    matrix, same, same_or_own, _ = measure((torch.eye(8), classes), num_classes=2)

    assert matrix.tolist() == [[0, 0], [0, 0]]
    assert same == 0
    assert same_or_own == pytest.approx(2)


def test_a_map_that_attends_to_all_frames_of_its_phoneme_has_a_large_value(measure):
    classes = [0, 1, 2, 3, 0, 1, 2, 3]
    alike = torch.tensor(classes)[:, None] == torch.tensor(classes)
    matrix, same, same_or_own, beyond = measure((alike / 2, classes), num_classes=4)

    torch.testing.assert_close(matrix, 4 * torch.eye(4))
    assert (same, same_or_own) == pytest.approx((4, 4))
    assert beyond == pytest.approx(1)  # the phoneme repeats every 4 frames, so the distance alone explains it

    classes = [0, 1, 2, 3, 1, 0, 3, 2]
    alike = torch.tensor(classes)[:, None] == torch.tensor(classes)
    assert measure((alike / 2, classes), num_classes=4)[3] == pytest.approx(15 / 8)


def test_attention_to_another_phoneme_is_off_the_diagonal(measure):
    classes = [0, 1, 2, 0, 1, 2]
    weights = torch.tensor([[float(key == 1) if query != 2 else 1.0 for key in classes] for query in classes])
    matrix, *_ = measure((weights / weights.sum(1, keepdim=True), classes))

    torch.testing.assert_close(matrix[0], torch.tensor([0.0, 3, 0]))
    torch.testing.assert_close(matrix[2], torch.ones(3))


@pytest.mark.parametrize("reach", [0.3, 3.0])
def test_a_map_that_depends_on_the_distance_alone_has_the_value_1_beyond_position(measure, reach):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, CLASSES, (40,), generator=generator).tolist()
    steps = torch.arange(40.0)
    band = torch.exp(-(steps - steps[:, None]).abs() / reach)

    assert measure((band, classes))[3] == pytest.approx(1)


def test_json_has_every_class_and_null_for_pairs_without_frames():
    model, batch = build("parakeet")
    labels = torch.full(MapRecorder(model)(batch).valid.shape, -1)
    labels[:, :4] = torch.tensor([0, 0, 1, 0])
    found = phoneme_attention(model, [batch], [labels], num_classes=2)
    data = json.loads(json.dumps(phoneme_attention_data({"full": found}, ["a", "s"]), allow_nan=False))

    assert data["phonemes"] == ["a", "s"]
    assert data["frames"] == [6, 2]
    assert data["matrices"]["full"][2][0][1] == pytest.approx(found.matrices[2, :, 0, 1].mean().item(), abs=1e-4)
    assert data["matrices"]["full"][2][1][1] is None  # the only "s" of its sequence
    assert data["same_phoneme"]["full"][3] == pytest.approx(found.same[3].tolist(), abs=1e-4)
    assert data["same_phoneme_or_own"]["full"][3] == pytest.approx(found.same_or_own[3].tolist(), abs=1e-4)
    assert data["same_phoneme_beyond_position"]["full"][0] == pytest.approx(
        found.same_beyond_position[0].tolist(), abs=1e-4
    )


def test_maps_that_are_not_finite_are_refused():
    model, batch = build("parakeet")
    with torch.no_grad():
        model.layers[2].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        phoneme_attention(model, [batch], [torch.zeros(2, 23, dtype=torch.long)], num_classes=CLASSES)
