import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mapreuse.speech import evaluate
from mapreuse.speech._splicing import align, cut_words, splice


def best_path(log_probabilities: np.ndarray, labels: tuple[int, ...]) -> float:
    """The score of the likeliest alignment, from the definition: every path that says `labels` is tried."""
    frames, outputs = log_probabilities.shape
    paths = itertools.product(range(outputs), repeat=frames)
    said = (path for path in paths if tuple(n for n, _ in itertools.groupby(path) if n) == labels)
    return max(sum(log_probabilities[frame, n] for frame, n in enumerate(path)) for path in said)


def score_of(log_probabilities: np.ndarray, labels: tuple[int, ...], spans: list[tuple[int, int]]) -> float:
    path = np.zeros(len(log_probabilities), dtype=int)
    for label, (first, last) in zip(labels, spans, strict=True):
        path[first:last] = label
    return float(log_probabilities[np.arange(len(path)), path].sum())


@given(st.integers(0, 10_000), st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple))
def test_the_alignment_is_the_likeliest_path_that_says_the_labels(seed, labels):
    logits = torch.from_numpy(2 * np.random.default_rng(seed).standard_normal((7, 3)))
    log_probabilities = logits.log_softmax(-1).numpy()
    spans = align(logits, labels)
    assert score_of(log_probabilities, labels, spans) == pytest.approx(best_path(log_probabilities, labels))
    assert all(first < last <= after for (first, last), (after, _) in itertools.pairwise(spans))


def test_repeated_labels_are_parted_by_a_blank():
    (one, other) = align(torch.zeros(5, 2), [1, 1])
    assert one[1] < other[0]


def test_too_few_frames_cannot_be_aligned():
    with pytest.raises(ValueError, match="2 frames are too few to align 2 labels"):
        align(torch.zeros(2, 2), [1, 1])


@pytest.fixture(scope="module")
def cuts(prompts):
    return [cut for cut in prompts.train if len(cut.supervisions[0].text.split()) >= 3 and cut.duration < 4][:25]


@pytest.fixture(scope="module")
def words(baseline, cuts):
    return cut_words(baseline, cuts)


def test_the_words_of_a_recording_are_all_of_it_in_order(baseline, cuts):
    complete = 0
    for cut in cuts[:8]:
        pieces = cut_words(baseline, [cut])
        spoken = cut.supervisions[0].text.split()
        assert set(pieces) <= set(spoken)
        # A word between two borders that fell together is left out; one said twice has two pieces.
        if [len(pieces.get(word, ())) for word in spoken] == [1] * len(spoken):
            whole = np.concatenate([pieces[word][0] for word in spoken])
            assert np.array_equal(whole, cut.load_audio()[0])
            complete += 1
    assert complete >= 4


def test_longer_words_last_longer(words):
    seconds = {word: np.mean([len(samples) for samples in pieces]) / 8000 for word, pieces in words.items()}
    short = np.mean([time for word, time in seconds.items() if len(word) <= 3])
    long = np.mean([time for word, time in seconds.items() if len(word) >= 7])
    assert 0.1 < short < long < 1.2


@pytest.fixture(scope="module")
def arguments(prompts):
    transcripts = sorted({cut.supervisions[0].text for cut in prompts.train})
    return {"seed": 0, "sampling_rate": 8000, "transcripts": transcripts, "exclude": prompts.held_out}


def test_spliced_sentences_say_recorded_words_and_no_held_out_transcript(prompts, words, arguments, tmp_path):
    spliced = splice(words, 60, "en", tmp_path, **arguments)
    texts = [cut.supervisions[0].text for cut in spliced]
    assert {word for text in texts for word in text.split()} <= set(words)
    assert len(set(texts)) > 20
    assert not [text for text in texts for held_out in prompts.held_out if f" {held_out} " in f" {text} "]


def test_splicing_resumes_where_it_stopped_and_repeats_itself_exactly(words, arguments, tmp_path):
    whole = splice(words, 20, "en", tmp_path / "whole", **arguments)
    first, *others = sorted((tmp_path / "whole").rglob("*.wav"))
    kept = first.read_bytes()
    for path in others[10:]:
        path.unlink()
    time = first.stat().st_mtime_ns
    resumed = splice(words, 20, "en", tmp_path / "whole", **arguments)
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (kept, time)
    fresh = splice(words, 20, "en", tmp_path / "fresh", **arguments)
    for one, other, another in zip(whole, resumed, fresh, strict=True):
        assert one.supervisions[0].text == other.supervisions[0].text == another.supervisions[0].text
        assert np.array_equal(other.load_audio(), another.load_audio())


def test_another_number_of_sentences_is_another_set(words, arguments, tmp_path):
    few = splice(words, 10, "en", tmp_path, **arguments)
    many = splice(words, 20, "en", tmp_path, **arguments)
    assert not {cut.recording.sources[0].source for cut in few} & {cut.recording.sources[0].source for cut in many}


def test_spliced_speech_is_still_understood(baseline, words, arguments, tmp_path):
    assert evaluate(baseline, splice(words, 30, "en", tmp_path, **arguments)).cer < 0.35
