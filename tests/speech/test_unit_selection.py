"""Concatenated speech says what it is asked to, in the voice it is given, the same every time."""

import random

import numpy as np
import pytest
import soundfile
from voices import BANDS, RATE, heard, say

from mapreuse.speech import evaluate
from mapreuse.speech._forced_alignment import PAUSE, Phone
from mapreuse.speech._synthesis import cut_of
from mapreuse.speech._unit_selection import Voice, concatenate


@pytest.fixture(scope="module")
def voice():
    generator = np.random.default_rng(0)
    recordings = [say([generator.choice(list(BANDS), size=6).tolist()], generator) for _ in range(40)]
    phones = [[Phone(name, start, stop) for name, start, stop in times] for _, times in recordings]
    return Voice.of([samples for samples, _ in recordings], phones, RATE)


def without_repeats(phones):
    return [phone for index, phone in enumerate(phones) if index == 0 or phones[index - 1] != phone]


@pytest.mark.parametrize("seed", range(8))
def test_phones_in_a_new_order_are_heard_in_that_order(voice, seed):
    wanted = without_repeats(random.Random(seed).choices(list(BANDS), k=9))
    samples = voice.say(wanted, random.Random(seed))

    assert [phone for phone in heard(samples) if phone != "_"] == wanted


def test_two_phones_that_were_never_neighbours_are_joined():
    generator = np.random.default_rng(0)
    recordings = [say([word], generator) for word in (["a", "b"], ["c", "d"]) for _ in range(5)]
    phones = [[Phone(name, start, stop) for name, start, stop in times] for _, times in recordings]
    few = Voice.of([samples for samples, _ in recordings], phones, RATE)

    assert [p for p in heard(few.say(["a", "d", "b", "c"], random.Random(0))) if p != "_"] == ["a", "d", "b", "c"]


def test_what_was_recorded_in_one_piece_is_taken_in_one_piece():
    generator = np.random.default_rng(0)
    samples, times = say([["a", "c", "e"]], generator)
    one = Voice.of([samples], [[Phone(name, start, stop) for name, start, stop in times]], RATE)
    said = one.say(["a", "c", "e"], random.Random(0))
    lags = np.lib.stride_tricks.sliding_window_view(samples, len(said))

    assert np.abs(lags - said).max(axis=1).min() == 0


def test_nothing_is_said_for_a_phone_that_was_never_recorded(voice):
    assert voice.say(["a", "x"], random.Random(0)) is None


def test_the_same_seed_says_it_the_same_way_and_another_another(voice):
    phones = ["a", "b", "a", "c"]
    one, same, other = (voice.say(phones, random.Random(seed)) for seed in (0, 0, 1))

    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_recordings_that_begin_at_once_are_given_pauses(voice):
    samples, times = say([["a", "b"]], np.random.default_rng(0), pause=0.0)
    phones = [Phone(name, start, stop) for name, start, stop in times if name != PAUSE]
    bare = Voice.of([samples], [phones], RATE)

    assert [p for p in heard(bare.say(["a", "b"], random.Random(0))) if p != "_"] == ["a", "b"]


@pytest.fixture(scope="module")
def cuts(prompts):
    return [cut for cut in prompts.train if cut.duration < 2.5][:100]


TEXTS = [
    f"press {one} to {two} the {three}"
    for one in ("one", "nine")
    for two in ("call", "enter", "erase")
    for three in ("number", "message", "list")
]


@pytest.fixture(scope="module")
def made(cuts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("concatenated")
    return directory, concatenate(cuts, TEXTS, "en", directory, seed=0, sampling_rate=8000)


def test_a_real_voice_says_sentences_it_never_said(baseline, made):
    _, sentences = made

    assert [cut.supervisions[0].text for cut in sentences] == TEXTS
    assert evaluate(baseline, sentences).cer < 0.4


def test_sentences_are_made_once_and_an_interrupted_run_goes_on(cuts, made):
    directory, sentences = made
    files = sorted(directory.rglob("*.wav"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    for path in files[::4]:
        path.unlink()
    again = concatenate(cuts, TEXTS, "en", directory, seed=0, sampling_rate=8000)

    assert [cut.id for cut in again] == [cut.id for cut in sentences]
    for number, path in enumerate(files):
        assert path.read_bytes() == before[path][0]
        assert (path.stat().st_mtime_ns == before[path][1]) == (number % 4 != 0)


def test_a_text_that_cannot_be_said_is_left_out(tmp_path):
    samples, _ = say([["a", "b"]], np.random.default_rng(0))
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    cuts = [cut_of(tmp_path / "a.wav", "a", "hello", "en")]

    assert concatenate(cuts, ["zoo"], "en", tmp_path, seed=0, sampling_rate=RATE) == []
