"""Varies recordings for recovery: speed, level, noise, and several recordings in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from lhotse.cut import Cut

from mapreuse_lab.models._pauses import MAX_PIECE_SECONDS
from mapreuse_lab.training import waveform_of

_SPEEDS = 0.85, 1.2
_GAINS_DB = -15.0, 6.0
_NOISE_DB = 15.0, 45.0
"""Ratio of signal to noise, for half of the samples."""

_PAUSES_SECONDS = 0.1, 0.6
_MAX_RECORDINGS = 3
"""Maximum number of recordings in one sample."""


def varied_speech(
    sources: Sequence[Sequence[Cut]], rate: int, number: int, seed: int = 0
) -> list[tuple[Float[np.ndarray, " samples"], list[Cut]]]:
    """Samples of speech with another speed, level and noise, each with its one to three recordings.

    Every second sample is from the first source, the others are from the other sources in turn. A sample has at most
    `MAX_PIECE_SECONDS`.

    Args:
        sources: recordings, such as those of one language each.
        rate: sampling rate of the result in Hz.
        number: number of samples.
        seed: of all choices.
    """
    random = np.random.default_rng(seed)
    first, *others = sources
    chosen = [others[index // 2 % len(others)] if index % 2 and others else first for index in range(number)]
    return [_varied(cuts, rate, random) for cuts in chosen]


def _varied(
    cuts: Sequence[Cut], rate: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, " samples"], list[Cut]]:
    parts: list[np.ndarray] = []
    recordings: list[Cut] = []
    for _ in range(random.integers(1, _MAX_RECORDINGS + 1)):
        recordings.append(cuts[int(random.integers(len(cuts)))])
        samples, speed = waveform_of(recordings[-1], rate), random.uniform(*_SPEEDS)
        at = np.arange(0, len(samples) - 1, speed)
        pause = np.zeros(round(random.uniform(*_PAUSES_SECONDS) * rate))
        parts += [np.interp(at, np.arange(len(samples)), samples), pause]
    speech = np.concatenate(parts[:-1])[: round(MAX_PIECE_SECONDS * rate)] * 10 ** (random.uniform(*_GAINS_DB) / 20)
    if random.random() < 0.5:
        level = np.sqrt(np.square(speech).mean()) * 10 ** (-random.uniform(*_NOISE_DB) / 20)
        speech = speech + level * random.standard_normal(len(speech))
    return np.clip(speech, -1, 1).astype(np.float32), recordings
