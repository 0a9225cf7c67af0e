"""Samples for recovery: recordings with another speed, level and noise."""

import numpy as np
import pytest
import soundfile
from lhotse import Recording
from mapreuse_lab.models._pauses import MAX_PIECE_SECONDS
from mapreuse_lab.models._varied_speech import varied_speech

RATE = 8000


@pytest.fixture
def tones(tmp_path):
    """Two sources of one recording each: a tone of 100 Hz and one of 300 Hz, two seconds long."""
    at = np.arange(2 * RATE) / RATE
    sources = []
    for pitch in (100, 300):
        file = tmp_path / f"{pitch}.wav"
        soundfile.write(file, np.sin(2 * np.pi * pitch * at) / 4, RATE)
        sources.append([Recording.from_file(file).to_cut()])
    return sources


def pitch_of(samples):
    return np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples)


def test_every_second_sample_is_from_the_first_source_and_its_speed_varies(tones):
    pitches = np.array([pitch_of(one) for one, _ in varied_speech(tones, RATE, 40)])
    for found, pitch in ((pitches[::2], 100), (pitches[1::2], 300)):
        assert ((found > 0.84 * pitch) & (found < 1.21 * pitch)).all()
        assert np.ptp(found) > 0.1 * pitch


def test_samples_differ_in_length_and_level_and_none_is_too_long(tones):
    samples = [one for one, _ in varied_speech(tones, RATE, 40)]
    lengths = [len(one) / RATE for one in samples]
    assert min(lengths) < 2.4 < 5 < max(lengths) <= MAX_PIECE_SECONDS
    levels = [np.abs(one).max() for one in samples]
    assert max(levels) <= 1
    assert max(levels) > 4 * min(levels)


def test_half_of_the_samples_have_noise_below_the_speech(tones):
    between = []  # power away from the tones, relative to the strongest frequency
    for one, _ in varied_speech(tones[:1], RATE, 60):
        power = np.square(np.abs(np.fft.rfft(one * np.hanning(len(one)))))
        between.append(np.median(power[len(power) // 4 :]) / power.max())
    noisy = np.array(between) > 1e-9
    assert 0.25 < noisy.mean() < 0.75
    assert max(between) < 1e-2


def test_the_seed_decides(tones):
    first, again, other = (varied_speech(tones, RATE, 3, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(first, again, strict=True))
    assert len(first[0][0]) != len(other[0][0])


def test_a_single_source_gives_all_samples(tones):
    assert all(pitch_of(one) < 130 for one, _ in varied_speech(tones[:1], RATE, 6))
