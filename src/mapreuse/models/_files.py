"""Models that reuse maps, on disk: safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mapreuse.models._apply import applied_to, apply
from mapreuse.plan import ReusePlan

_FORMAT = "mapreuse"
_VERSION = 1
_WEIGHTS = "mapreuse.safetensors"
_CONFIG = "config.json"


def save(model: PreTrainedModel, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model, its plan included, to the directory `path`: `mapreuse.safetensors` and `config.json`.

    The names keep a plain `from_pretrained` from opening the directory: it would find no weights that it knows, rather
    than fill the projections that were removed with random numbers. A directory that is there already keeps its other
    files (a tokenizer, say); nothing is replaced until everything is written.

    Args:
        model: a `transformers` model, with or without a plan in force.
        path: the directory.
        dtype: floating-point type on disk (`torch.float16` halves the file); the model's own if None.
            `load` restores the model's own type.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"only a transformers model can be saved, got {type(model).__name__}")
    applied = applied_to(model)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as directory:
        weights = Path(directory) / _WEIGHTS
        with _stored_as(model, dtype):
            save_model(model, str(weights))
        config = {
            "model_type": _FORMAT,
            "version": _VERSION,
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "stack": None if applied is None else applied[0],
            "strategy": None if applied is None else applied[1].strategy,
            "plan": None if applied is None else json.loads(applied[1].plan.to_json()),
            "sha256": _sha256(weights),
            "transformers_version": transformers.__version__,
            "config": model.config.to_dict(),
        }
        (Path(directory) / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(weights, path / _WEIGHTS)
        os.replace(Path(directory) / _CONFIG, path / _CONFIG)


def load(path: str | Path) -> PreTrainedModel:
    """The model that `save` wrote to `path`, bit for bit, in evaluation mode.

    Raises:
        ValueError: in one line, where the directory is not such a model, or is damaged.
    """
    path = Path(path)
    config = _read_config(path)
    weights = path / _WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{path}: {_WEIGHTS} is missing; copy the whole directory that save() wrote")
    if _sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights} is truncated or damaged: its checksum is not the one in {_CONFIG}")
    model = _build(path, config)
    if config["plan"] is not None:
        plan = ReusePlan.from_json(json.dumps(config["plan"]))
        apply(model.get_submodule(config["stack"]), plan, strategy=config["strategy"])
    try:
        load_model(model, str(weights), strict=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights} does not hold the weights of {config['class']}: {reason}") from None
    return model.eval()


def _build(path: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The model with the right shape and meaningless weights."""
    cls = getattr(transformers, config["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {config['class']!r}")
    try:
        dtype = getattr(torch, config["dtype"])
        settings = dict(config["config"])
        with no_init_weights():
            model = cls(AutoConfig.for_model(settings.pop("model_type"), **settings))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_CONFIG} does not describe a {config['class']}: {error}") from None
    return model.to(dtype)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / _CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a saved model: it holds no {_CONFIG}")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{file} is not JSON: it is truncated or damaged") from None
    if not isinstance(config, dict) or config.get("model_type") != _FORMAT:
        raise ValueError(f"{path} was not written by mapreuse.save; open it with transformers' from_pretrained")
    if config.get("version") != _VERSION:
        raise ValueError(f"{path}: format version {config.get('version')!r} is not supported, only {_VERSION}")
    wanted = {"class", "dtype", "stack", "strategy", "plan", "sha256", "config"}
    if wanted - config.keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(wanted - config.keys()))}")
    return config


@contextmanager
def _stored_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """For the duration, the model's floating-point tensors in this type."""
    if dtype is None:
        yield
        return
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    kept = {key: tensor.data for key, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for key, tensor in tensors.items():
            tensor.data = kept[key]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
