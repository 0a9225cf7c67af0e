"""Files are written whole or not at all, also by several processes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, which then takes the place of `file` in one move."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, file)
