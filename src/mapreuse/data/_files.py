"""Texts, recordings and images on disk, of which calibration batches are made."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from scipy.signal import resample_poly

if TYPE_CHECKING:
    from PIL.Image import Image

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
"""What transformers and datasets raise on directories that are damaged or foreign."""

LONGEST = 20.0
"""Seconds of a recording that are read."""

Sample = tuple[Path | io.BytesIO, str]
"""A file, or its contents, and a name for it."""

_SHORTEST = 0.05  # seconds of audio
_SOUNDS = (".wav", ".flac")
_IMAGES = (".png", ".jpg", ".jpeg")
_DATASETS = ("dataset_info.json", "dataset_dict.json")


def sound_files(folder: str | Path) -> list[Path]:
    """The wav and flac files below a folder, in order of their paths.

    Raises `ValueError` where there are none, or images beside them.
    """
    return _files(Path(folder), _SOUNDS, "wav or flac")


def texts_of(path: Path) -> Iterator[str]:
    """The lines of a text file that are not empty, or the texts of a datasets directory."""
    if path.is_dir():
        if not _is_dataset(path):
            raise ValueError(f"{path}: give a text file, one sentence per line, or a datasets directory")
        lines: Iterable[str] = _column(path, "text")
        yield from (line for line in lines if line and line.strip())
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{path}: not a text file")
                if line.strip():
                    yield line.strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def sounds_of(path: Path) -> Iterator[Sample]:
    """The recordings of a folder, or of a datasets directory."""
    return _rows(path, "audio") if _is_dataset(path) else ((file, str(file)) for file in sound_files(path))


def images_of(path: Path) -> Iterator[Sample]:
    """The images of a folder, or of a datasets directory."""
    if _is_dataset(path):
        return _rows(path, "image")
    return ((file, str(file)) for file in _files(path, _IMAGES, "png or jpg"))


def read_audio(sample: Sample, rate: int) -> np.ndarray:
    """The first seconds of a recording at `rate` Hz, mono."""
    file, name = sample
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{name}: to read it, install soundfile: pip install 'mapreuse[speech]'") from None
    try:
        with soundfile.SoundFile(file) as sound:
            source = sound.samplerate
            samples = sound.read(round(LONGEST * source), dtype="float32", always_2d=True).mean(1)
    except soundfile.LibsndfileError as problem:
        raise ValueError(f"{name}: not a readable wav or flac file ({problem.error_string.rstrip('.')})") from None
    if len(samples) < _SHORTEST * source:
        raise ValueError(f"{name}: lasts {len(samples) / source:.3f} s; at least {_SHORTEST} s are wanted")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are not finite numbers")
    if source == rate:
        return samples
    ratio = Fraction(rate, source)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def read_image(sample: Sample) -> Image:
    """An image in RGB, upright."""
    file, name = sample
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(f"{name}: not a readable image ({one_line(problem)})") from None


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def _files(folder: Path, wanted: tuple[str, ...], kind: str) -> list[Path]:
    """Files below a folder whose names end so."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder of {kind} files")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SOUNDS + _IMAGES and file.is_file())
    found = [file for file in files if file.suffix.lower() in wanted]
    if not found:
        raise ValueError(f"{folder}: holds no {kind} files")
    if len(found) < len(files):
        other = next(file for file in files if file.suffix.lower() not in wanted)
        raise ValueError(
            f"{folder}: holds both audio and images, such as {found[0].relative_to(folder)} and "
            f"{other.relative_to(folder)}; give a folder of {kind} files"
        )
    return found


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in _DATASETS)


def _rows(path: Path, name: str) -> Iterator[Sample]:
    for number, row in enumerate(_column(path, name)):
        if row is not None and (row["bytes"] or row["path"]):
            yield io.BytesIO(row["bytes"]) if row["bytes"] else Path(row["path"]), f"{path}, row {number}"


def _column(path: Path, name: str) -> Iterator[Any]:
    """The column of texts, or of undecoded audio or images, of a datasets directory."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: to read it, install the package datasets: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError:  # of no table
        raise ValueError(f"{path}: holds no rows, or none in one of its splits") from None
    except UNREADABLE as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if not loaded:
            raise ValueError(f"{path}: holds no split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if not len(loaded):
        raise ValueError(f"{path}: holds no rows")
    decoded = {"audio": datasets.Audio, "image": datasets.Image}.get(name)
    columns = {
        column
        for column, kind in loaded.features.items()
        if (isinstance(kind, decoded) if decoded else getattr(kind, "dtype", "") in ("string", "large_string"))
    }
    if name not in columns and len(columns) != 1:
        found = ", ".join(f"{column} of {getattr(kind, 'dtype', kind)}" for column, kind in loaded.features.items())
        raise ValueError(f"{path}: one column should hold {name}, and if there are several, be named so; got {found}")
    chosen = name if name in columns else columns.pop()
    loaded = loaded.select_columns([chosen])  # a row would decode all its columns
    if decoded:
        loaded = loaded.cast_column(chosen, decoded(decode=False))
    return (row[chosen] for row in loaded)
