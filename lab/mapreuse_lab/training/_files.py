"""The cache directory, atomic writes, and error messages that fit on one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class CorpusError(ValueError):
    """A corpus cannot be opened. The message is one line with the cause and the remedy."""


def cache_dir() -> Path:
    """The cache directory, `$XDG_CACHE_HOME/mapreuse` or `~/.cache/mapreuse`; it is created if missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapreuse"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` makes it under a temporary name, then one rename moves it into place.

    Several processes may write the same file at the same time.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, file)
