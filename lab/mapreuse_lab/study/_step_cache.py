"""Results of finished steps, so that a study continues where it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mapreuse
import mapreuse_lab
from mapreuse.measure import machine
from mapreuse_lab.training import write_whole


class StepCache:
    """JSON results of steps in a directory, one file each.

    The file name is a digest of the step's name, its inputs and the source code. A step runs again only if one of
    these changes.

    Args:
        directory: where the files are. It is made with the first result.
        sources: files and folders of `mapreuse` or `mapreuse_lab` that the results depend on; None for all.
    """

    def __init__(self, directory: Path, sources: Sequence[str] | None = None) -> None:
        self.directory = directory
        self._source = source_digest(sources)

    def get(self, name: str, inputs: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step, from its file if there is one; otherwise `run` computes it and it is written."""
        file = self.directory / f"{self.key(name, inputs)}.json"
        if not file.is_file():
            text = json.dumps(run(), indent=1) + "\n"
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda unfinished: unfinished.write_text(text))
        return json.loads(file.read_text())

    def has(self, name: str, inputs: dict[str, Any]) -> bool:
        """True if there is a result of this step."""
        return (self.directory / f"{self.key(name, inputs)}.json").is_file()

    def key(self, name: str, inputs: dict[str, Any]) -> str:
        """Name and digest of a step."""
        text = json.dumps([name, inputs, self._source], sort_keys=True)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def timing_environment() -> dict[str, Any]:
    """What a latency depends on besides the code: processor, instructions, threads, GPU and version of torch."""
    here = machine()
    return {name: here[name] for name in ("processor", "instructions", "threads", "gpu", "torch")}


def source_digest(sources: Sequence[str] | None = None) -> str:
    """Digest of the Python and C code of both packages, or of these files and folders in them."""
    digest = hashlib.sha256()
    for package in (mapreuse, mapreuse_lab):
        root = Path(str(package.__file__)).parent
        for file in sorted(one for one in root.rglob("*") if one.suffix in (".py", ".c", ".h")):
            name = file.relative_to(root).as_posix()
            if sources is None or any(name == source or name.startswith(f"{source}/") for source in sources):
                digest.update(name.encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
