"""Audio as the recogniser hears it: files and waveforms, checked, at one sampling rate, long ones in pieces."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from mapreuse_lab.training._features import resample
from mapreuse_lab.training._files import one_line, write_whole

# Longer audio is recognised in pieces: what one piece decides, and what it hears on either side, in seconds. Both are
# whole numbers of the recogniser's frames (40 or 32 ms).
PIECE, CONTEXT, LONGEST_WHOLE = 32.0, 4.0, 60.0
_SHORTEST = 0.05

Piece = tuple[np.ndarray, float, bool]


def file_pieces(path: str | Path, rate: int) -> Iterator[Piece]:
    """Pieces of an audio file at `rate` Hz, mono: (samples, seconds of context before, whether more follow).

    Reads no more of the file at a time than one piece. Raises `ValueError` with one line for what is not audio.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: a directory; a wav or flac file is wanted")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            source = file.samplerate
            _check_length(file.frames, source, str(path))
            for start, end, before, more in _spans(file.frames, source):
                file.seek(start)
                samples = file.read(end - start, dtype="float32", always_2d=True).mean(1)
                yield resample(check_waveform(samples, str(path)), source, rate), before, more
    except soundfile.LibsndfileError as problem:
        raise ValueError(f"{path}: not a readable wav or flac file ({problem.error_string.rstrip('.')})") from None
    except (TypeError, RuntimeError) as problem:  # a raw file, of which nothing says what it holds; no end to seek
        raise ValueError(f"{path}: not a readable wav or flac file ({problem})") from None


def waveform_of(cut: Cut, rate: int) -> np.ndarray:
    """The samples of a cut's first channel at `rate` Hz.

    Raises `ValueError` with one line where they cannot be read, or are not finite.
    """
    try:
        samples = cut.load_audio()
    except (AudioLoadingError, AssertionError, OSError) as problem:
        raise ValueError(f"{cut.id}: its recording cannot be read ({one_line(problem)})") from None
    return resample(check_waveform(samples[0], cut.id), cut.sampling_rate, rate)


def waveform_pieces(samples: np.ndarray, source: int, rate: int, what: str = "the waveform") -> Iterator[Piece]:
    """The same of a waveform at `source` Hz; integers are taken as 16-bit samples."""
    samples = check_waveform(samples, what)
    _check_length(len(samples), source, what)
    for start, end, before, more in _spans(len(samples), source):
        yield resample(samples[start:end], source, rate), before, more


def check_waveform(samples: np.ndarray, what: str) -> np.ndarray:
    """The waveform in float32; raises `ValueError` if it is not one-dimensional and finite."""
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(f"{what}: one channel is wanted, as an array of shape (samples,); got shape {samples.shape}")
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / np.float32(32768)
    samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError(f"{what}: holds samples that are not finite numbers")
    return samples


def _check_length(num_samples: int, rate: int, what: str) -> None:
    if num_samples < _SHORTEST * rate:
        raise ValueError(f"{what}: lasts {num_samples / rate:.3f} s; at least {_SHORTEST} s are wanted")


def _spans(num_samples: int, rate: int) -> Iterator[tuple[int, int, float, bool]]:
    """(first sample, last sample + 1, seconds of context before, whether more follow) of every piece."""
    if num_samples <= LONGEST_WHOLE * rate:
        yield 0, num_samples, 0.0, False
        return
    number, more = 0, True
    while more:
        before = CONTEXT if number else 0.0
        start = round((number * PIECE - before) * rate)
        end = round(((number + 1) * PIECE + CONTEXT) * rate)
        more = end < num_samples
        yield start, min(end, num_samples), before, more
        number += 1


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """A wav file of 16 bits, whole or not at all."""
    write_whole(path, lambda file: soundfile.write(file, samples, rate, subtype="PCM_16", format="WAV"))
