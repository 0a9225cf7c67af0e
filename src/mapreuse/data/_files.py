"""Texts, recordings and images from disk."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

if TYPE_CHECKING:
    from PIL.Image import Image

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""Exceptions that transformers and datasets raise on damaged or foreign files. Catch them around their calls only."""

MAX_SECONDS = 20.0
"""Maximum length of the part of a recording that is read."""

Sample = tuple[Path | io.BytesIO, str]
"""A file or its contents, and a name for messages."""

_MIN_SECONDS = 0.05
_SOUNDS = (".wav", ".flac")
_IMAGES = (".png", ".jpg", ".jpeg")
_DATASETS = ("dataset_info.json", "dataset_dict.json")


def sound_files(folder: str | Path) -> list[Path]:
    """Find the wav and flac files in a folder and its subfolders, sorted by path.

    Raises:
        ValueError: if there are none, or if there are images as well.
    """
    return _find_files(Path(folder), _SOUNDS, "wav or flac")


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a text file, one per line, or of a datasets directory. Empty lines are skipped."""
    if path.is_dir():
        if not _is_dataset(path):
            raise ValueError(f"{path}: expected a text file with one sentence per line, or a datasets directory")
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
    """The recordings of a folder or of a datasets directory."""
    return _rows(path, "audio") if _is_dataset(path) else ((file, str(file)) for file in sound_files(path))


def images_of(path: Path) -> Iterator[Sample]:
    """The images of a folder or of a datasets directory."""
    if _is_dataset(path):
        return _rows(path, "image")
    return ((file, str(file)) for file in _find_files(path, _IMAGES, "png or jpg"))


def read_audio(sample: Sample, rate: int) -> np.ndarray:
    """Read the first `MAX_SECONDS` of a recording as mono audio at `rate` Hz."""
    file, name = sample
    soundfile = _optional("soundfile", name)
    try:
        with soundfile.SoundFile(file) as sound:
            source_rate = sound.samplerate
            samples = sound.read(round(MAX_SECONDS * source_rate), dtype="float32", always_2d=True).mean(1)
    except soundfile.LibsndfileError as problem:
        raise ValueError(f"{name}: not a readable wav or flac file ({problem.error_string.rstrip('.')})") from None
    if len(samples) < _MIN_SECONDS * source_rate:
        raise ValueError(f"{name}: too short, {len(samples) / source_rate:.3f} s; the minimum is {_MIN_SECONDS} s")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: contains samples that are not finite numbers")
    if source_rate == rate:
        return samples
    from scipy.signal import resample_poly  # slow to import

    ratio = Fraction(rate, source_rate)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def read_image(sample: Sample) -> Image:
    """Read an image in RGB, rotated upright."""
    file, name = sample
    pil, operations = _optional("PIL.Image", name), _optional("PIL.ImageOps", name)
    try:
        with pil.open(file) as image:
            return operations.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as problem:
        raise ValueError(f"{name}: not a readable image ({one_line(problem)})") from None


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def _optional(module: str, name: str) -> Any:
    """Import an optional dependency that reading `name` needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module)
        raise ValueError(f"{name}: reading it needs {package}; pip install 'mapreuse[data]'") from None


def _find_files(folder: Path, suffixes: tuple[str, ...], kind: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder of {kind} files")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SOUNDS + _IMAGES and file.is_file())
    found = [file for file in files if file.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{folder}: contains no {kind} files")
    if len(found) < len(files):
        other = next(file for file in files if file.suffix.lower() not in suffixes)
        raise ValueError(
            f"{folder}: contains both audio and images, such as {found[0].relative_to(folder)} and "
            f"{other.relative_to(folder)}; expected only {kind} files"
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
    datasets = _optional("datasets", str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError:  # a split without a table
        raise ValueError(f"{path}: contains no rows, or a split contains none") from None
    except LIBRARY_ERRORS as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if not loaded:
            raise ValueError(f"{path}: contains no split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if not len(loaded):
        raise ValueError(f"{path}: contains no rows")
    feature = {"audio": datasets.Audio, "image": datasets.Image}.get(name)
    columns = {
        column
        for column, kind in loaded.features.items()
        if (isinstance(kind, feature) if feature else getattr(kind, "dtype", "") in ("string", "large_string"))
    }
    if name not in columns and len(columns) != 1:
        found = ", ".join(f"{column} ({getattr(kind, 'dtype', kind)})" for column, kind in loaded.features.items())
        raise ValueError(f"{path}: expected a column {name!r}, or one column of that type; found {found}")
    chosen = name if name in columns else columns.pop()
    loaded = loaded.select_columns([chosen])  # rows decode all their columns
    if feature:
        loaded = loaded.cast_column(chosen, feature(decode=False))
    return (row[chosen] for row in loaded)
