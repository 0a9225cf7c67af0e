import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapreuse.speech import LanguageModel, beam_search, greedy

CHARACTERS = [" ", "a", "b"]
TEXTS = ["ab a", "a b", "b ab a", "a ab"]


def language_model():
    return LanguageModel.train(TEXTS, CHARACTERS, "en", num_words=50, fewest=1)


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


def frame_by_frame(log_probabilities, width, language_model, weight, bonus) -> tuple[int, ...]:
    """Prefix beam search as it is defined: every prefix by every output, then the `width` best."""

    def language(text: tuple[int, ...]) -> float:
        spoken = sum(language_model.log_probabilities(text[:i])[text[i]] for i in range(len(text)))
        return weight * spoken + bonus * sum(1 for number in text if number)

    beam = {(): (0.0, -math.inf)}  # alignments that end in blank, and in the last output
    for frame in log_probabilities:
        after: dict[tuple[int, ...], list[float]] = {}
        for prefix, (in_blank, in_output) in beam.items():
            for number, score in enumerate(frame):
                total = np.logaddexp(in_blank, in_output)
                ways = [(prefix, 0, total)] if number == 0 else [((*prefix, number), 1, total)]
                if number and prefix[-1:] == (number,):
                    ways = [(prefix, 1, in_output), ((*prefix, number), 1, in_blank)]
                for text, ending, reached in ways:
                    sums = after.setdefault(text, [-math.inf, -math.inf])
                    sums[ending] = np.logaddexp(sums[ending], reached + score)
        best = sorted(after, key=lambda text: -(np.logaddexp(*after[text]) + language(text)))[:width]
        beam = {text: tuple(after[text]) for text in best}
    return max(beam, key=lambda text: np.logaddexp(*beam[text]) + language((*text, 0)))


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
    model = language_model()
    log_probabilities = random_frames(seed, 5, 4, sharpness=1.0)
    scores = by_enumeration(log_probabilities, model, weight, bonus)
    fused = {"language_model": model, "weight": weight, "bonus": bonus}
    found = tuple(beam_search(log_probabilities, width=5000, threshold=math.inf, **fused))
    assert scores[found] == pytest.approx(max(scores.values()))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 8), weight=st.floats(0.1, 2), bonus=st.floats(-1, 2))
def test_a_narrow_beam_keeps_the_best_of_all_that_it_could_go_on_with(seed, width, weight, bonus):
    model = language_model()
    log_probabilities = random_frames(seed, 12, 4, sharpness=1.0)
    found = beam_search(
        log_probabilities, width=width, threshold=math.inf, language_model=model, weight=weight, bonus=bonus
    )
    assert tuple(found) == frame_by_frame(log_probabilities, width, model, weight, bonus)


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
    assert beam_search(log_probabilities) == path.tolist()
    assert beam_search(log_probabilities, language_model=language_model(), weight=0.1) == path.tolist()
