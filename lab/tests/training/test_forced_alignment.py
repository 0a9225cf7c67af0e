"""Forced alignment: the path is the likeliest there is, and phones are found where they are said."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapreuse_lab.training._forced_alignment import PAUSE, align_phones, viterbi
from mapreuse_lab.training._synthesis import pronounce
from voices import BANDS, RATE, say


def allowed(path, skippable):
    last = len(skippable) - 1
    starts = path[0] == 0 or (path[0] == 1 and skippable[0])
    ends = path[-1] == last or (path[-1] == last - 1 and skippable[-1])
    steps = (b - a in (0, 1) or (b - a == 2 and skippable[a + 1]) for a, b in itertools.pairwise(path))
    return starts and ends and all(steps)


@given(st.integers(0, 10_000), st.lists(st.booleans(), min_size=2, max_size=5))
def test_the_path_is_the_likeliest_of_all_that_are_allowed(seed, skippable):
    scores = np.random.default_rng(seed).standard_normal((5, len(skippable)))
    paths = itertools.product(range(len(skippable)), repeat=5)
    best = max(sum(scores[range(5), path]) for path in paths if allowed(path, skippable))
    found = viterbi(scores, np.array(skippable))

    assert allowed(found.tolist(), skippable)
    assert scores[range(5), found].sum() == pytest.approx(best)


def test_too_few_frames_for_a_chain_are_refused():
    with pytest.raises(ValueError, match="2 frames are too few for a chain of 4 states"):
        viterbi(np.zeros((2, 4)), np.zeros(4, dtype=bool))


@pytest.fixture(scope="module")
def recordings():
    generator = np.random.default_rng(0)
    words = [
        [
            generator.choice(list(BANDS), size=generator.integers(1, 5)).tolist()
            for _ in range(generator.integers(1, 4))
        ]
        for _ in range(60)
    ]
    return words, [say(one, generator, pause=generator.uniform(0.05, 0.2)) for one in words]


def test_phones_are_found_where_they_are_said(recordings):
    words, said = recordings
    aligned = align_phones([samples for samples, _ in said], words, RATE)
    late = []
    for phones, word_list, (samples, times) in zip(aligned, words, said, strict=True):
        assert [p.name for p in phones if p.name != PAUSE] == [phone for word in word_list for phone in word]
        assert phones[0].start == 0
        assert phones[-1].stop == pytest.approx(len(samples) / RATE, abs=0.01)
        assert all(one.stop == other.start for one, other in itertools.pairwise(phones))
        spoken = [(start, stop) for phone, start, stop in times if phone != "_"]
        found = [(p.start, p.stop) for p in phones if p.name != PAUSE]
        late += [
            abs(a - b) for one, other in zip(spoken, found, strict=True) for a, b in zip(one, other, strict=True)
        ]

    assert np.mean(late) < 0.01
    assert np.quantile(late, 0.95) < 0.03


def test_a_recording_too_short_for_its_words_has_no_phones(recordings):
    words, said = recordings
    audio = [samples for samples, _ in said]
    aligned = align_phones([*audio, audio[0][:400]], [*words, [["a", "b", "c", "d", "e"] * 4]], RATE, rounds=2)

    assert aligned[-1] == []
    assert all(aligned[:-1])


def test_pauses_of_real_recordings_are_quiet(prompts):
    cuts = [cut for cut in prompts.train if cut.duration < 2.0][:60]
    audio = [cut.load_audio()[0] for cut in cuts]
    aligned = align_phones(audio, pronounce([cut.supervisions[0].text for cut in cuts], "en"), 8000, rounds=6)
    levels = {True: [], False: []}
    for samples, phones in zip(audio, aligned, strict=True):
        for phone in phones:
            part = samples[round(phone.start * 8000) : round(phone.stop * 8000)]
            levels[phone.name == PAUSE].append(10 * np.log10(np.mean(part**2) + 1e-10))

    assert np.median(levels[False]) - np.median(levels[True]) > 15


def test_pronunciations_are_phones_word_by_word():
    (hello,) = pronounce(["hello world"], "en")

    assert [len(word) for word in hello] == [4, 4]
    assert hello[1][0] == "w"
    assert pronounce(["hola"], "es") != pronounce(["hola"], "en")
    with pytest.raises(ValueError, match="no pronunciation for language 'de'"):
        pronounce(["hallo"], "de")
