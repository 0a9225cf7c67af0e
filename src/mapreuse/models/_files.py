"""`save` and `load`: `save_pretrained` and `from_pretrained` with more checks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mapreuse.console import one_line
from mapreuse.models._from_pretrained import CONFIG, FORMAT, original_config
from mapreuse.models._save_pretrained import listed, weights_of, write

_MODELS = "transformers.models."


def save(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model and its plans to the directory `path`, as `model.save_pretrained(path)` does.

    After `import mapreuse`, `load` and `from_pretrained` open the directory. Without this package, `from_pretrained`
    raises an error. The previous model in the directory is replaced; other files, such as a tokenizer, are kept. If
    saving fails, the previous model is intact.

    Args:
        model: a `transformers` model, with or without a plan.
        path: the directory. It is created if it does not exist.
        dtype: floating-point type of the stored weights, such as `torch.float16`; None to keep those of the model.
            `load` converts the weights back to the types of the model.

    Raises:
        ValueError: if the model cannot be saved, the type is not a floating-point type, or `path` is a file. Nothing
            is written.
    """
    cls = type(model)
    if not isinstance(model, PreTrainedModel) or not cls.__module__.startswith(_MODELS):
        raise ValueError(
            f"only a whole model of a class that transformers defines can be saved, got {cls.__name__}; save the "
            "transformers model inside it"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type, such as torch.float16, or None, got {dtype!r}")
    state_dict = weights_of(model)
    if dtype is not None:
        distinct = {id(tensor): tensor.to(dtype) for tensor in state_dict.values() if tensor.is_floating_point()}
        state_dict = {name: distinct.get(id(tensor), tensor) for name, tensor in state_dict.items()}
    write(model, Path(path), {name: tensor.detach() for name, tensor in state_dict.items()})


def load(path: str | Path) -> PreTrainedModel:
    """Open the model that `save` or `save_pretrained` wrote to `path`, in evaluation mode, with its plans.

    Its weights are the same bit for bit.

    Args:
        path: the directory. In a sentence-transformers directory, this opens the transformer, its first module.

    Raises:
        ValueError: if the directory is not a saved model with plans, or is damaged.
    """
    path = transformer_directory(path)
    config = _read_config(path)
    entries = config["quantization_config"]
    cls = _model_class(path, entries)
    try:
        settings = cls.config_class.from_dict(dict(config))
        settings._attn_implementation = entries.get("attn_implementation", "sdpa")
        model, found = cls.from_pretrained(
            path,
            config=settings,
            use_safetensors=True,
            local_files_only=True,
            disable_mmap=True,  # the model would change with the file
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: the weights are truncated or damaged: {one_line(error)}") from None
    except OSError as error:
        raise ValueError(f"{path}: {one_line(error)}; copy the whole directory") from None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # transformers raises various exceptions for invalid settings
        raise ValueError(f"{path}: {CONFIG} does not describe a {cls.__name__}: {one_line(error)}") from error
    if differences := listed(
        [f"{key} is missing" for key in found["missing_keys"]],
        [f"{key} is not part of it" for key in found["unexpected_keys"]],
        [f"{key} is {tuple(stored)}, not {tuple(expected)}" for key, stored, expected in found["mismatched_keys"]],
    ):
        raise ValueError(f"{path} does not contain the weights of this {cls.__name__}: {differences}")
    return model


def transformer_directory(path: str | Path) -> Path:
    """The directory of the transformer in a sentence-transformers directory; any other directory as it is.

    Raises:
        ValueError: if `modules.json` does not name it.
    """
    path = Path(path)
    modules = path / "modules.json"
    if not modules.is_file():
        return path
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
    except ValueError:
        listed = None
    first = listed[0] if isinstance(listed, list) and listed else None
    if not (isinstance(first, dict) and isinstance(first.get("path"), str)):
        raise ValueError(f"{modules} does not name the directories of its modules; download the model again")
    return path / first["path"]


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a saved model: it contains no {CONFIG}")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{file} is not JSON: it is truncated or damaged") from None
    if not isinstance(config, dict) or config.get("model_type") != FORMAT:
        raise ValueError(f"{path} was not saved with mapreuse; open it with transformers' from_pretrained")
    try:
        return original_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model_class(path: Path, entries: dict[str, Any]) -> Any:
    name, module = entries["class"], entries.get("module", "transformers")
    if module != "transformers" and not module.startswith(_MODELS):
        raise ValueError(
            f"{path}: {module}.{name} is not a model class that transformers defines; call its own from_pretrained"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {name!r}")
    return found
