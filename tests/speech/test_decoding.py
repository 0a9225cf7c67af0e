import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapreuse.speech import NgramModel, beam_search, greedy

SENTENCES = [(1, 2, 1), (1, 1, 2), (2, 1), (1, 2, 2, 1)]


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(number for number, _ in itertools.groupby(path) if number)


def by_enumeration(log_probabilities, language_model=None, weight=0.0, bonus=0.0) -> dict[tuple[int, ...], float]:
    """Every text's score, from the definition: summed over every alignment."""
    frames, outputs = log_probabilities.shape
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(outputs), repeat=frames):
        score = sum(log_probabilities[frame, number] for frame, number in enumerate(path))
        sums[collapse(path)] = np.logaddexp(sums.get(collapse(path), -math.inf), score)
    for text in sums:
        sums[text] += bonus * len(text)
        if language_model:
            ended = (*text, 0)
            spoken = sum(language_model.log_probabilities(ended[:i])[ended[i]] for i in range(len(ended)))
            sums[text] += weight * spoken
    return sums


def random_frames(seed: int, frames: int, outputs: int, sharpness: float = 2.0) -> np.ndarray:
    logits = torch.from_numpy(sharpness * np.random.default_rng(seed).standard_normal((frames, outputs)))
    return logits.log_softmax(-1).numpy()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 6), outputs=st.integers(2, 4))
def test_beam_search_finds_the_likeliest_text_over_all_alignments(seed, frames, outputs):
    log_probabilities = random_frames(seed, frames, outputs)
    scores = by_enumeration(log_probabilities)
    found = tuple(beam_search(log_probabilities, width=5000, threshold=math.inf))
    assert scores[found] == pytest.approx(max(scores.values()))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), weight=st.floats(0.1, 2), bonus=st.floats(-1, 2))
def test_beam_search_with_a_language_model_maximises_the_sum_of_both(seed, weight, bonus):
    model = NgramModel.train(SENTENCES, 3, order=3)
    log_probabilities = random_frames(seed, 6, 3, sharpness=1.0)
    scores = by_enumeration(log_probabilities, model, weight, bonus)
    fused = {"language_model": model, "weight": weight, "bonus": bonus}
    found = tuple(beam_search(log_probabilities, width=5000, threshold=math.inf, **fused))
    assert scores[found] == pytest.approx(max(scores.values()))


def test_beam_search_prefers_the_summed_text_where_the_best_path_misleads():
    log_probabilities = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert greedy(torch.from_numpy(log_probabilities)[None], torch.tensor([2])) == [[]]
    assert beam_search(log_probabilities) == [1]


def test_repeats_merge_unless_a_blank_parts_them():
    path = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2, 2, 0]]), 3).float() * 10
    assert greedy(path, torch.tensor([7])) == [[1, 1, 2]]
    assert beam_search(path[0].log_softmax(-1).numpy()) == [1, 1, 2]


def test_greedy_hears_nothing_beyond_an_utterances_own_frames():
    path = torch.nn.functional.one_hot(torch.tensor([[1, 0, 2, 2]]), 3).float()
    assert greedy(path, torch.tensor([2])) == [[1]]


def test_a_long_utterance_is_decoded_like_its_parts():
    # Sharp enough that the beam agrees on everything but the last outputs, so that the beginning is set aside.
    path = np.random.default_rng(0).integers(1, 4, size=700)
    frames = np.full((2 * len(path), 4), 1e-3)
    frames[::2][np.arange(len(path)), path] = 1
    frames[1::2, 0] = 1
    log_probabilities = np.log(frames / frames.sum(1, keepdims=True))
    model = NgramModel.train(SENTENCES, 4, order=3)
    assert beam_search(log_probabilities) == path.tolist()
    assert beam_search(log_probabilities, language_model=model, weight=0.1) == path.tolist()


def test_the_language_model_is_a_distribution_after_every_history_seen_or_not():
    model = NgramModel.train(SENTENCES, 5, order=4)
    for history in itertools.chain.from_iterable(itertools.product(range(1, 5), repeat=n) for n in range(4)):
        assert np.exp(model.log_probabilities(history)).sum() == pytest.approx(1)


def test_kneser_ney_smoothing_follows_its_formula():
    model = NgramModel.train([(1, 2), (3, 2)], 4, order=2)
    # 2 occurs twice, after two characters; 1 and 3 once each, after the beginning; the end twice, after 2 only.
    unigrams = {1: 1, 2: 2, 3: 1}
    ends = 2  # an n-gram that begins with the boundary keeps its occurrences
    total = sum(unigrams.values()) + ends
    of_two = (unigrams[2] - 0.75 + 0.75 * 4 * 0.25) / total
    assert np.exp(model.log_probabilities((1,)))[2] == pytest.approx(1 - 0.75 + 0.75 * of_two)


def test_a_language_model_comes_back_from_disk_as_it_was(tmp_path):
    model = NgramModel.train(SENTENCES, 30, order=7)
    model.save(tmp_path / "lm.safetensors")
    again = NgramModel.load(tmp_path / "lm.safetensors")
    assert again.counts == model.counts
    assert np.array_equal(again.log_probabilities((1, 2)), model.log_probabilities((1, 2)))


def test_pruning_keeps_the_most_frequent_and_what_they_back_off_to():
    model = NgramModel.train(SENTENCES * 5 + [(3, 4, 3)], 5, order=4, max_entries=20)
    assert len(model.counts) == 20
    assert all(ngram[1:] in model.counts for ngram in model.counts if len(ngram) > 1)
    assert not any(number in (3, 4) for ngram in model.counts for number in ngram)


def test_a_language_model_that_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="order must be 1 to 9"):
        NgramModel.train(SENTENCES, 5, order=10)
