"""Output directories of conversions, which appear only when they are complete, and their work directories."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from mapreuse.console import check_new_directory
from mapreuse.models import transformer_directory

LEARNED, REFITTED, DISTILLED, _WRITTEN = _PARTS = ("learned", "refitted", "distill", "written")
"""The contents of a work directory."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")
_NOT_COPIED = (*_WEIGHTS, "config.json", "onnx", "openvino")
_NEVER_COPIED = (".git*", "__pycache__")


def work_dir_of(out: str | Path) -> Path:
    """`<out>.work`, which holds the work of an unfinished conversion."""
    out = Path(out).resolve()
    return out.with_name(f"{out.name}.work")


def check_output(out: str | Path) -> None:
    """Raises `ValueError` if `out` cannot become a new directory, or its work directory holds other files."""
    check_new_directory(Path(out).resolve())
    _check_work(work_dir_of(out))


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block ends; then the work directory is deleted.

    If the block raises, there is no `out`, and the work directory stays.
    """
    out, work = Path(out).resolve(), work_dir_of(out)
    _check_work(work)
    shutil.rmtree(work / _WRITTEN, ignore_errors=True)
    (work / _WRITTEN).mkdir(parents=True)
    yield work / _WRITTEN
    check_new_directory(out)
    if out.exists():
        out.rmdir()
    (work / _WRITTEN).rename(out)
    for part in (LEARNED, REFITTED, DISTILLED):
        shutil.rmtree(work / part, ignore_errors=True)
    if not any(work.iterdir()):
        work.rmdir()


def copy_companions(source: str | Path, written: str | Path) -> None:
    """Copy the files that belong to a model but are not its weights: tokenizer, feature extractor, model card.

    The other modules of a sentence-transformers model are copied with their weights. Folders with weights of other
    models, such as checkpoints of a trainer, are left out.

    Args:
        source: the model's directory.
        written: from `new_directory`. Its work directory is left out if it lies in `source`.
    """
    of_model, never = shutil.ignore_patterns(*_NOT_COPIED), shutil.ignore_patterns(*_NEVER_COPIED)
    weights, work = transformer_directory(source).resolve(), Path(written).resolve().parent
    listed = Path(source) / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    parts = {(Path(source) / str(module.get("path", ""))).resolve() for module in modules}

    def ignored(directory: str, names: list[str]) -> set[str]:
        here = Path(directory).resolve()
        left_out = never(directory, names)
        left_out |= {name for name in names if here / name == work or _is_another_model(here / name, parts)}
        return left_out | of_model(directory, names) if here == weights else left_out

    shutil.copytree(
        source,
        written,
        ignore=ignored,
        copy_function=shutil.copyfile,
        ignore_dangling_symlinks=True,
        dirs_exist_ok=True,
    )
    for folder in (Path(written), *(path for path in Path(written).rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)  # the source's may be read-only
    if (weights / "vocab.txt").is_file() and not (weights / "tokenizer_config.json").is_file():
        # The class of the tokenizer then follows from the original's config.json, which is not copied.
        AutoTokenizer.from_pretrained(weights).save_pretrained(
            Path(written) / weights.relative_to(Path(source).resolve())
        )


def _is_another_model(path: Path, parts: Set[Path]) -> bool:
    return path.is_dir() and path not in parts and any(next(path.glob(kind), None) for kind in _WEIGHTS)


def _check_work(work: Path) -> None:
    if work.exists() and not work.is_dir():
        raise ValueError(f"{work} is a file: move it, or choose another --out")
    others = sorted({one.name for one in work.iterdir()} - set(_PARTS)) if work.exists() else []
    if others:
        raise ValueError(
            f"{work} holds {others[0]}, but the conversion keeps its work there: move it, or choose another --out"
        )
