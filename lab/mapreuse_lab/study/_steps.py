"""Finished work is never repeated: every step of a study leaves a small JSON file named after its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mapreuse
from mapreuse.measure import machine
from mapreuse_lab.training import write_whole


class Steps:
    """Results of a study's steps, kept in a directory under the digest of what they depend on.

    A step's file is named after its name, its inputs and the package's source code, so that a changed input or a
    changed program runs it again, and nothing else does.

    Args:
        directory: where the files live; made if need be.
        sources: the folders and files of the package whose code the steps depend on; all where None.
    """

    def __init__(self, directory: Path, sources: Sequence[str] | None = None) -> None:
        self.directory = directory
        self._source = source_digest(sources)

    def do(self, name: str, inputs: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this step: read where it is there already, else made by `run` and written whole."""
        file = self.directory / f"{self.key(name, inputs)}.json"
        if file.is_file():
            return json.loads(file.read_text())
        result = run()
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda unfinished: unfinished.write_text(json.dumps(result, indent=1) + "\n"))
        return json.loads(file.read_text())

    def is_done(self, name: str, inputs: dict[str, Any]) -> bool:
        """True where the step's result is there."""
        return (self.directory / f"{self.key(name, inputs)}.json").is_file()

    def key(self, name: str, inputs: dict[str, Any]) -> str:
        """Name and digest of a step, also used for its directory of checkpoints."""
        text = json.dumps([name, inputs, self._source], sort_keys=True)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def where() -> dict[str, Any]:
    """What a time depends on beside the code: processor, instructions, threads, GPU and version of torch."""
    here = machine()
    return {name: here[name] for name in ("processor", "instructions", "threads", "gpu", "torch")}


def source_digest(sources: Sequence[str] | None = None) -> str:
    """Digest of the package's files of Python and C, or of those in some of its folders."""
    root = Path(mapreuse.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(one for one in root.rglob("*") if one.suffix in (".py", ".c", ".h")):
        name = file.relative_to(root).as_posix()
        if sources is None or any(name == source or name.startswith(f"{source}/") for source in sources):
            digest.update(name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
