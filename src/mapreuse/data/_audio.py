"""Recordings: reading files and waveforms, and resampling."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mapreuse.console import check_number

if TYPE_CHECKING:
    from soundfile import SoundFile

MIN_SECONDS = 0.05
"""Minimum length of a recording."""

_MAX_RATE = 1_000_000
_RIFF_SIZE = slice(4, 8)
_UNFINISHED = (8).to_bytes(4, "little")
"""The size in a wav file's header for which libsndfile reads the samples after a data chunk of size 0."""
_OTHER_KINDS = (b"RF64", b"RIFX")
"""First bytes of wav files with other headers: of 64-bit sizes, and big-endian."""


@contextmanager
def open_sound(file: str | Path | io.BytesIO, name: str = "") -> Iterator[SoundFile]:
    """Open a wav or flac file with soundfile. A streamed wav file, whose header gives no size, is read to its end.

    Args:
        file: the file or its contents.
        name: for messages; default: the path.

    Raises:
        OSError: if there is no such file.
        ValueError: with one line, if it is not readable audio or has an impossible sampling rate. Also for what
            soundfile raises inside the block.
    """
    import soundfile  # an optional dependency

    name = name or str(file)
    try:
        with ExitStack() as opened:
            given: Any = file if isinstance(file, io.BytesIO) else opened.enter_context(open(file, "rb"))
            kind = given.read(4)
            given.seek(0)
            sound = opened.enter_context(soundfile.SoundFile(given))
            if sound.frames == 0 and kind == b"RIFF":
                sound = opened.enter_context(soundfile.SoundFile(_unfinished(given)))
            check_sampling_rate(sound.samplerate, name)
            if sound.frames == 0 and kind in _OTHER_KINDS:
                raise ValueError(_no_length(name, kind))
            yield sound
    except soundfile.LibsndfileError as problem:
        if kind in _OTHER_KINDS:
            raise ValueError(_no_length(name, kind)) from None
        raise ValueError(f"{name}: not a readable wav or flac file ({problem.error_string.rstrip('.')})") from None


def _no_length(name: str, kind: bytes) -> str:
    return (
        f"{name}: the header of this {kind.decode()} file does not give the number of its samples; write an ordinary "
        f"wav file first, such as by ffmpeg -i {name} -c:a pcm_s16le other.wav"
    )


def _unfinished(file: Any) -> Any:
    """A wav file with the header of one whose sizes were never filled in, if samples follow its empty data chunk."""
    contents: Any
    if isinstance(file, io.BytesIO):
        contents = bytearray(file.getvalue())
    else:
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if not _ends_in_chunks(contents):
        contents[_RIFF_SIZE] = _UNFINISHED
    return io.BytesIO(contents) if isinstance(contents, bytearray) else contents


def _ends_in_chunks(contents: Any) -> bool:
    """Whether only other chunks, such as a LIST of tags, follow the data chunk: then it is empty."""
    place, is_after_data = 12, False
    while place + 8 <= len(contents):
        name, size = contents[place : place + 4], int.from_bytes(contents[place + 4 : place + 8], "little")
        is_after_data |= name == b"data"
        if is_after_data and not bytes(name).isascii():
            return False
        place += 8 + size + size % 2
    return is_after_data and place in (len(contents), len(contents) + 1)


def as_waveform(samples: Any, name: str = "the waveform") -> np.ndarray:
    """One channel as a contiguous array in float32, full scale from −1 to 1.

    Args:
        samples: an array or a tensor of floats, or of 16-bit integers.
        name: for messages.

    Raises:
        ValueError: for another shape or type, or values that are not finite. The message begins with `name`.
    """
    if isinstance(samples, torch.Tensor):
        if samples.is_meta or samples.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor with data, got a {samples.layout} on {samples.device}")
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(f"{name}: expected one channel of shape (samples,), got shape {samples.shape}")
    if samples.dtype != np.int16 and samples.dtype.kind != "f":
        raise ValueError(f"{name}: expected floats from -1 to 1 or 16-bit integers, got {samples.dtype}")
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: contains samples that are not finite numbers")
    return samples


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resample a waveform from `source` Hz to `target` Hz with a polyphase filter; the result is in float32.

    Raises:
        ValueError: unless both rates are whole numbers from 1 to 1,000,000.
    """
    ratio = Fraction(check_sampling_rate(target), check_sampling_rate(source))
    if ratio == 1:
        return samples
    from scipy.signal import resample_poly  # slow to import

    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def check_sampling_rate(rate: Any, name: str = "") -> int:
    """The rate as an integer. Raises `ValueError` unless it is a whole number from 1 to 1,000,000."""
    check_number(f"{name}{': ' if name else ''}the sampling rate", rate, 1, _MAX_RATE, whole=True)
    return int(rate)
