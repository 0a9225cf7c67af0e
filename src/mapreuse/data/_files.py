"""Texts, recordings and images from disk."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mapreuse.console import one_line, refused_in_one_line
from mapreuse.data._audio import MIN_SECONDS, as_waveform, open_sound, resample

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SECONDS = 20.0
"""Maximum length of the part of a recording that is read."""

Sample = tuple[Path | io.BytesIO, str]
"""A recording or an image: a file or its contents, and a name for messages."""

_SUFFIXES = {"audio": (".wav", ".flac"), "image": (".png", ".jpg", ".jpeg")}
_DATASETS = ("dataset_info.json", "dataset_dict.json")


def sound_files(folder: str | Path) -> list[Path]:
    """Find the wav and flac files in a folder and its subfolders, sorted by path.

    Raises:
        ValueError: if there are none, or if there are images as well.
    """
    return _find_files(Path(folder), "audio")


def samples_of(path: Path, kind: str) -> Iterator[Any]:
    """The samples of a file, a folder or a datasets directory.

    Args:
        path: where they are.
        kind: "text" for strings, without empty ones; "audio" or "image" for `Sample`.
    """
    if any((path / name).is_file() for name in _DATASETS):
        return _rows(path, kind)
    if kind == "text":
        return _lines(path)
    return ((file, str(file)) for file in _find_files(path, kind))


def read_audio(sample: Sample, rate: int) -> np.ndarray:
    """Read the first `MAX_SECONDS` of a recording as mono audio at `rate` Hz."""
    file, name = sample
    with open_sound(file, name) as sound:
        source = sound.samplerate
        samples = sound.read(round(MAX_SECONDS * source), dtype="float32", always_2d=True).mean(1)
    if len(samples) < MIN_SECONDS * source:
        raise ValueError(f"{name}: too short, {len(samples) / source:.3f} s; the minimum is {MIN_SECONDS} s")
    return resample(as_waveform(samples, name), source, rate)


def read_image(sample: Sample) -> Image:
    """Read an image in RGB, rotated upright."""
    from PIL import Image, ImageOps  # an optional dependency

    file, name = sample
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(f"{name}: not a readable image ({one_line(problem)})") from None


def _lines(path: Path) -> Iterator[str]:
    if path.is_dir():
        raise ValueError(f"{path}: expected a text file with one sentence per line, or a datasets directory")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{path}: not a text file")
                if line.strip():
                    yield line.strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def _find_files(folder: Path, kind: str) -> list[Path]:
    suffixes = _SUFFIXES[kind]
    names = " or ".join(suffix[1:] for suffix in suffixes[:2])
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder of {names} files")
    samples = {suffix for all_of_kind in _SUFFIXES.values() for suffix in all_of_kind}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in samples and file.is_file()]
    found = [file for file in files if file.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{folder}: contains no {names} files")
    if len(found) < len(files):
        other = next(file for file in files if file.suffix.lower() not in suffixes)
        raise ValueError(
            f"{folder}: contains both audio and images, such as {found[0].relative_to(folder)} and "
            f"{other.relative_to(folder)}; expected only {names} files"
        )
    return found


def _rows(path: Path, kind: str) -> Iterator[Any]:
    """The rows of a datasets directory, without decoding audio and images."""
    import datasets  # an optional dependency

    with refused_in_one_line(f"{path}: "):
        try:
            loaded = datasets.load_from_disk(str(path))
        except IndexError:  # a split without a table
            raise ValueError(f"{path}: contains no rows, or a split contains none") from None
    if isinstance(loaded, datasets.DatasetDict):
        if not loaded:
            raise ValueError(f"{path}: contains no split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if not len(loaded):
        raise ValueError(f"{path}: contains no rows")
    types = {name: getattr(feature, "dtype", "") or str(feature) for name, feature in loaded.features.items()}
    feature = {"audio": datasets.Audio, "image": datasets.Image}.get(kind)
    if feature is None:
        columns = [name for name, dtype in types.items() if dtype in ("string", "large_string")]
    else:
        columns = [name for name, found in loaded.features.items() if isinstance(found, feature)]
    if kind not in columns and len(columns) != 1:
        listed = ", ".join(f"{name} ({dtype})" for name, dtype in types.items())
        raise ValueError(f"{path}: expected a column {kind!r}, or one column of that type; found {listed}")
    column = kind if kind in columns else columns[0]
    loaded = loaded.select_columns([column])  # rows decode all their columns
    if feature is None:
        yield from (row[column] for row in loaded if row[column] and row[column].strip())
        return
    for number, row in enumerate(loaded.cast_column(column, feature(decode=False))):
        if (found := row[column]) is not None and (found["bytes"] or found["path"]):
            yield io.BytesIO(found["bytes"]) if found["bytes"] else Path(found["path"]), f"{path}, row {number}"
