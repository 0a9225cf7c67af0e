"""Texts for calibration and evaluation, from Debian packages and Python's documentation."""

from __future__ import annotations

import gzip
import pydoc_data.topics
import random
import re
import struct
import subprocess

from mapreuse_lab.training import cache_dir, fetch_packages

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n|^%$", re.MULTILINE)
_REFERENCE = re.compile(r"^\S+\d+:\d+ ", re.MULTILINE)
_COMPRESS_HEADER = b"\x1f\x9d\x90"  # of the program compress, with codes of up to 16 bits
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def fortunes() -> list[str]:
    """Debian's fortunes (`fortunes`, `fortunes-min`) in random order: quotations, verse, jokes and facts."""
    folder = fetch_packages(["fortunes", "fortunes-min"], cache_dir() / "fortunes", "calibrating on fortunes")
    files = sorted(file for file in folder.rglob("usr/share/games/fortunes/*") if not file.suffix)
    texts = "\n%\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    found = sorted({text.strip() for text in texts.split("\n%\n") if text.strip()})
    random.Random(0).shuffle(found)
    return found


def bible() -> str:
    """The King James Version, from Debian's `bible-kjv-text`: books of verses, without their numbers.

    The file has a header of 84 bytes, then the size of a window of text, the number of windows, and where each
    starts. Every window is compressed by itself, in the format of the program compress.
    """
    folder = fetch_packages(["bible-kjv-text"], cache_dir() / "bible", "evaluating on the Bible")
    data = (folder / "usr/lib/bible.data").read_bytes()
    (number,) = struct.unpack_from(">I", data, 88)
    starts = struct.unpack_from(f">{number}I", data, 92)
    windows = [_COMPRESS_HEADER + data[a:b] for a, b in zip(starts, (*starts[1:], len(data)), strict=True)]
    texts = [subprocess.run(["gzip", "-dc"], input=one, capture_output=True, check=True).stdout for one in windows]
    _, _, verses = b"".join(texts).decode("ascii").partition("\n")
    return _REFERENCE.sub("", verses)


def essays() -> str:
    """Essays on politics, economics and history, from Debian's `anarchism`, without marks of Markdown."""
    folder = fetch_packages(["anarchism"], cache_dir() / "anarchism", "evaluating on essays")
    files = sorted((folder / "usr/share/doc/anarchism/markdown").glob("sec*.md.gz"))
    written = "\n\n".join(gzip.decompress(file.read_bytes()).decode("utf-8") for file in files)
    paragraphs = [" ".join(one.split()) for one in _LINK.sub(r"\1", written).split("\n\n")]
    return "\n\n".join(re.sub(r"[*_\\]|^#+ ", "", one) for one in paragraphs if len(one) > 200)


def python_reference() -> str:
    """Python's language reference (`pydoc_data.topics`)."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def sentences(text: str) -> list[str]:
    """Sentences of at least four words, each once, in random order."""
    parts = {" ".join(part.split()) for part in _SENTENCE_END.split(text)}
    found = sorted(part for part in parts if 20 <= len(part) <= 300 and part[0].isalpha() and part.count(" ") >= 3)
    random.Random(0).shuffle(found)
    return found
