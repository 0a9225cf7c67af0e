"""Reads audio from files, waveforms and lhotse cuts, at one sampling rate; long audio is cut into pieces."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from mapreuse.console import one_line
from mapreuse.data import as_waveform, check_sampling_rate, open_sound, resample

MAX_WHOLE_SECONDS = 60.0
"""Longer audio is recognised in pieces."""

# Whole numbers of the recogniser's frames, which are 40 or 32 ms long.
PIECE_SECONDS, CONTEXT_SECONDS = 32.0, 4.0

_MIN_SECONDS = 0.05

Piece = tuple[Float[np.ndarray, " samples"], float, bool]
"""Samples, seconds of context before the piece, and whether more pieces follow."""


def file_pieces(path: str | Path, rate: int) -> Iterator[Piece]:
    """Pieces of an audio file at `rate` Hz, mono.

    Channels are averaged. Only one piece is in memory at a time.

    Raises:
        OSError: if there is no such file.
        ValueError: with one line, if the file is not readable audio, or is shorter than 0.05 s.
    """
    with open_sound(path) as file:
        source = file.samplerate
        for start, end, before, more in _spans(file.frames, source, str(path)):
            file.seek(start)
            samples = file.read(end - start, dtype="float32", always_2d=True).mean(1)
            yield resample(as_waveform(samples, str(path)), source, rate), before, more


def waveform_pieces(samples: np.ndarray, source: int, rate: int, name: str = "the waveform") -> Iterator[Piece]:
    """Pieces at `rate` Hz of a waveform at `source` Hz. Integers are taken as 16-bit samples."""
    samples, source = as_waveform(samples, name), check_sampling_rate(source, name)
    for start, end, before, more in _spans(len(samples), source, name):
        yield resample(samples[start:end], source, rate), before, more


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


def _spans(num_samples: int, rate: int, name: str) -> Iterator[tuple[int, int, float, bool]]:
    """(first sample, last sample + 1, seconds of context before, whether more follow) of every piece."""
    if num_samples < _MIN_SECONDS * rate:
        raise ValueError(f"{name}: {num_samples / rate:.3f} s long, at least {_MIN_SECONDS} s are needed")
    if num_samples <= MAX_WHOLE_SECONDS * rate:
        yield 0, num_samples, 0.0, False
        return
    number, more = 0, True
    while more:
        before = CONTEXT_SECONDS if number else 0.0
        start = round((number * PIECE_SECONDS - before) * rate)
        end = round(((number + 1) * PIECE_SECONDS + CONTEXT_SECONDS) * rate)
        more = end < num_samples
        yield start, min(end, num_samples), before, more
        number += 1
