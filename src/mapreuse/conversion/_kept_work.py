"""What unfinished work leaves on disk, so that the same call continues from it after an interrupt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mapreuse.conversion._validation import digest

_SECONDS = 60.0
"""Seconds between two writes of unfinished sums. An interrupt writes them as well."""


def identity_of(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits for a model, its batches and the version of mapreuse."""
    config = getattr(original, "config", None)
    described = {"version": version("mapreuse"), "class": type(original).__name__, "config": str(config)}
    return digest([described, original.state_dict(), *batches])


def folder_in(cache: str | Path | None, identity: str) -> Path | None:
    """The folder `<cache>/<identity>`, made when something is kept in it; None without a cache.

    Raises:
        ValueError: if the cache is a file.
    """
    if cache is not None and Path(cache).is_file():
        raise ValueError(f"cache={str(cache)!r} is a file: choose a directory")
    return None if cache is None else Path(cache) / identity


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then rename it: an interrupt leaves the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    write(partial)
    partial.replace(file)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors of a file and its description; None if the file is missing or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()["kept"])  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], described: object) -> None:
    """Write what `read_tensors` reads."""
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(file, lambda partial: save_file(stored, partial, metadata={"kept": json.dumps(described)}))


def kept_json(file: Path | None, described: object, compute: Callable[[], Any]) -> Any:
    """The result of `compute`, or the one in the file if it was computed under the same description."""
    if file is None:
        return compute()
    described = json.loads(json.dumps(described))
    try:
        kept = json.loads(file.read_text())
        if kept["of"] == described:
            return kept["result"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    result = compute()
    write_atomically(file, lambda partial: partial.write_text(json.dumps({"of": described, "result": result})))
    return result


class LayerSums:
    """Sums over batches for each layer, on the CPU. In a `with` block they are kept in a file, batch by batch.

    Args:
        file: without one, nothing is kept.
        title: what is summed, for the note that an interrupt gets.
    """

    def __init__(self, file: Path | None, title: str) -> None:
        self._file, self._title = file, title
        self._sums: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self._written, self._is_written = time.monotonic(), True
        if file is not None and (found := read_tensors(file)) is not None:
            tensors, counts = found
            for layer, count in counts.items():
                own = {name.partition(".")[2]: one for name, one in tensors.items() if name.startswith(f"{layer}.")}
                self._sums[int(layer)] = count, own

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        """The sums of a layer; empty before its first batch."""
        return self._sums[layer][1] if layer in self._sums else {}

    def lacks(self, layer: int, number: int) -> bool:
        """Whether the sums of a layer lack the batch of this number."""
        return layer not in self._sums or self._sums[layer][0] <= number

    def add(self, layer: int, number: int, terms: Mapping[str, Tensor]) -> None:
        """Add terms to the sums of a layer, which then include the batch of this number."""
        before = self[layer]
        added = {name: before[name] + term.cpu() if name in before else term.cpu() for name, term in terms.items()}
        self._is_written = False
        self._sums[layer] = number + 1, before | added  # one assignment: an interrupt comes before or after it

    def keep(self) -> None:
        """Write the sums, unless they were written a moment ago."""
        if time.monotonic() - self._written > _SECONDS:
            self._write()

    def _write(self) -> None:
        if self._file is not None and not self._is_written:
            tensors = {f"{layer}.{name}": one for layer, (_, own) in self._sums.items() for name, one in own.items()}
            write_tensors(self._file, tensors, {layer: count for layer, (count, _) in self._sums.items()})
            self._written, self._is_written = time.monotonic(), True

    def __enter__(self) -> LayerSums:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._write()
        if isinstance(error, KeyboardInterrupt) and self._file is not None:
            done = min((count for count, _ in self._sums.values()), default=0)
            error.add_note(f"{self._title}: {done} batches are kept, batch {done} is repeated")
