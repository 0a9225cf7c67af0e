"""Reads audio from files, waveforms and lhotse cuts, at one sampling rate; long audio is cut into pieces."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from mapreuse.console import one_line
from mapreuse.data import as_waveform, open_sound, resample

MAX_WHOLE_SECONDS = 60.0
"""Longer audio is cut into pieces of equal length."""

_MIN_SECONDS = 0.05


def file_pieces(path: str | Path, rate: int) -> Iterator[Float[np.ndarray, " samples"]]:
    """Pieces of an audio file at `rate` Hz, mono.

    Channels are averaged. Only one piece is in memory at a time.

    Raises:
        OSError: if there is no such file.
        ValueError: with one line, if the file is not readable audio, or is shorter than 0.05 s.
    """
    with open_sound(path) as file:
        source = file.samplerate
        for start, end in _spans(file.frames, source, str(path)):
            file.seek(start)
            samples = file.read(end - start, dtype="float32", always_2d=True).mean(1)
            yield resample(as_waveform(samples, str(path)), source, rate)


def cut_pieces(cut: Cut, rate: int) -> Iterator[Float[np.ndarray, " samples"]]:
    """Pieces of a cut's first channel at `rate` Hz."""
    samples = waveform_of(cut, rate)
    for start, end in _spans(len(samples), rate, cut.id):
        yield samples[start:end]


def waveform_of(cut: Cut, rate: int) -> Float[np.ndarray, " samples"]:
    """The samples of a cut's first channel at `rate` Hz.

    Raises:
        ValueError: with one line, if the recording cannot be read or contains values that are not finite.
    """
    try:
        samples = cut.load_audio()
    except (AudioLoadingError, AssertionError, OSError) as problem:
        raise ValueError(f"{cut.id}: its recording cannot be read ({one_line(problem)})") from None
    return resample(as_waveform(samples[0], cut.id), cut.sampling_rate, rate)


def whole_cut(recording: Recording, text: str, language: str | None = None) -> MonoCut:
    """The cut of an utterance that fills a whole recording."""
    supervision = SupervisionSegment(
        recording.id, recording.id, 0.0, recording.duration, text=text, language=language
    )
    return MonoCut(recording.id, 0.0, recording.duration, 0, supervisions=[supervision], recording=recording)


def _spans(num_samples: int, rate: int, name: str) -> Iterator[tuple[int, int]]:
    """First sample and last sample + 1 of every piece."""
    if num_samples < _MIN_SECONDS * rate:
        raise ValueError(f"{name}: {num_samples / rate:.3f} s long, at least {_MIN_SECONDS} s are needed")
    number = math.ceil(num_samples / (MAX_WHOLE_SECONDS * rate))
    edges = [index * num_samples // number for index in range(number + 1)]
    yield from itertools.pairwise(edges)
