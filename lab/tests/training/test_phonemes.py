"""Synthetic speech with the times of its phonemes, and phoneme labels of encoder frames."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mapreuse_lab.training import phoneme_batches
from mapreuse_lab.training._normalise import LANGUAGES
from mapreuse_lab.training._phonemes import PAUSE, speak_with_phonemes
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise

from mapreuse.models import MapRecorder

RATE = 8000


def names(spoken):
    return [phone.name for phone in spoken.phonemes if phone.name != PAUSE]


def loudness(spoken, phone, rate=RATE):
    return np.sqrt(np.mean(spoken.samples[round(phone.start * rate) : round(phone.stop * rate)] ** 2))


@pytest.mark.parametrize("language", LANGUAGES)
def test_phonemes_cover_the_whole_waveform(language):
    for spoken in speak_with_phonemes(generate_sentences(5, language, seed=2), language, seed=0):
        phones = spoken.phonemes
        assert phones[0].start == 0
        assert phones[-1].stop == len(spoken.samples) / RATE
        assert all(one.stop == other.start for one, other in pairwise(phones))
        assert all(phone.start < phone.stop for phone in phones)
        assert not any(one.name == other.name == PAUSE for one, other in pairwise(phones))
        assert 4 < len(names(spoken)) / phones[-1].stop < 25  # a second
        assert not set("ˈˌ()") & set("".join(names(spoken)))


def test_the_waveform_equals_that_of_synthesise(tmp_path):
    texts = generate_sentences(4, "en", seed=6)
    cuts = synthesise(texts, "en", tmp_path, seed=3)
    for cut, spoken in zip(cuts, speak_with_phonemes(texts, "en", seed=3), strict=True):
        soundfile.write(tmp_path / "again.wav", spoken.samples, RATE, subtype="PCM_16")
        assert (tmp_path / "again.wav").read_bytes() == Path(cut.recording.sources[0].source).read_bytes()


def test_known_words_have_their_known_phonemes_in_every_voice():
    for seed in range(8):
        (spoken,) = speak_with_phonemes(["see me"], "en", seed=seed)
        assert [name[0] for name in names(spoken)] == ["s", "i", "m", "i"]
    (spoken,) = speak_with_phonemes(["aaa"], "es", seed=0)
    assert set(names(spoken)) == {"a"}


def test_the_times_of_phonemes_agree_with_the_sound():
    """An s is a faint noise of high frequencies, an o is loud and low."""

    def share_above(spoken, phone, hertz):
        part = spoken.samples[round(phone.start * RATE) : round(phone.stop * RATE)]
        power = np.abs(np.fft.rfft(part)) ** 2
        return power[np.fft.rfftfreq(len(part), 1 / RATE) > hertz].sum() / power.sum()

    for seed in range(4):
        (spoken,) = speak_with_phonemes(["so so, so so"], "en", seed=seed)
        hissing = [phone for phone in spoken.phonemes if phone.name == "s"]
        voiced = [phone for phone in spoken.phonemes if phone.name not in ("s", PAUSE)]
        assert len(hissing) == len(voiced) == 4
        assert min(share_above(spoken, s, 2000) for s in hissing) > 3 * max(
            share_above(spoken, o, 2000) for o in voiced
        )
        assert 3 * max(loudness(spoken, s) for s in hissing) < min(loudness(spoken, o) for o in voiced)


def test_each_frame_is_labelled_with_the_phoneme_at_its_centre(baseline):
    batches, labels, phonemes = phoneme_batches(baseline, "en", sentences=11, seed=5)
    texts = generate_sentences(11, "en", seed=5)
    spoken = sorted(speak_with_phonemes(texts, "en", seed=5), key=lambda one: len(one.samples))
    recordings = map(MapRecorder(baseline.model), batches)

    assert [len(row) for row in labels] == [8, 3]
    assert len(set(phonemes)) == len(phonemes) > 20
    assert PAUSE not in phonemes
    for classes, recorded, first in zip(labels, recordings, (0, 8), strict=True):
        assert classes.shape == recorded.valid.shape
        assert (classes[~recorded.valid] == -1).all()
        for found, one, valid in zip(classes, spoken[first:], recorded.valid, strict=False):
            for frame, number in enumerate(found[: int(valid.sum())].tolist()):
                centre = 0.0125 + 4 * 0.008 * frame
                expected = next((p.name for p in one.phonemes if p.start <= centre < p.stop), one.phonemes[-1].name)
                assert number == (phonemes.index(expected) if expected in phonemes else -1)


def test_rare_phonemes_are_left_out_and_similar_ones_are_side_by_side(tiny):
    _, labels, phonemes = phoneme_batches(tiny, "en", sentences=30)
    counts = torch.cat([row[row >= 0] for row in labels]).bincount(minlength=len(phonemes))

    assert counts.min() >= 0.005 * counts.sum()
    assert phonemes.index("p") < phonemes.index("s") < phonemes.index("m") < phonemes.index("l") < phonemes.index("ə")
    assert abs(phonemes.index("s") - phonemes.index("z")) == 1


def test_unknown_languages_are_refused():
    with pytest.raises(ValueError, match="no synthetic voices for language 'xx'"):
        speak_with_phonemes(["x"], "xx", seed=0)
