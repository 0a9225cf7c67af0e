"""Save and load models with shared maps: safetensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mapreuse.console import one_line
from mapreuse.models._apply import applied_plans, apply, refuse_save_pretrained
from mapreuse.plan import ReusePlan

_FORMAT = "mapreuse"
_VERSIONS = (1, 2, 3)
"""Versions of the format that `load` reads. `save` writes the last one.

Version 1 ordered the heads of plans with head assignments differently. Before version 3, "storage" was "strategy".
"""
_CONFIG = "config.json"
_WEIGHTS = "mapreuse.safetensors"
_MODELS = "transformers.models."
_FOREIGN = ("model*.safetensors*", "pytorch_model*.bin*")
_REQUIRED = {"class": str, "config": dict, "dtype": str, "sha256": str}
_OPTIONAL = {
    "absent": list,
    "attn_implementation": str,
    "dtypes": dict,
    "generation_config": dict,
    "module": str,
    "reuse": list,
    "weights": str,
}


def save(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model and its plans to the directory `path`, as `config.json` and `mapreuse-….safetensors`.

    Under these names, `from_pretrained` finds no weights and raises an error. Under its own names, it would fill the
    removed projections with random numbers. For the same reason, a directory with weights of `transformers` is
    refused. Other files in the directory, such as a tokenizer, are kept. An interrupted save leaves the previous
    model intact: the weights are named by their checksum, and `config.json`, which names them, is replaced last.

    Args:
        model: a `transformers` model, with or without a plan.
        path: the directory. It is created if it does not exist.
        dtype: floating-point type of the stored weights, such as `torch.float16`; None to keep those of the model.
            `load` converts the weights back to the types of the model.

    Raises:
        ValueError: if the model cannot be saved, the type is not a floating-point type, or the directory holds other
            weights. Nothing is written.
    """
    cls = type(model)
    if not isinstance(model, PreTrainedModel) or not cls.__module__.startswith(_MODELS):
        raise ValueError(
            f"only a whole model of a class that transformers defines can be saved, got {cls.__name__}; save the "
            "transformers model inside it"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type, such as torch.float16, or None, got {dtype!r}")
    path = Path(path)
    if foreign := sorted(file.name for pattern in _FOREIGN for file in path.glob(pattern)):
        raise ValueError(f"{path} holds another model's weights ({foreign[0]}); save to another directory")
    stored, description = dict(_stored_tensors(model)), _describe(model)
    rebuilt = _rebuilt(path, description, "meta")
    if absent := list(_absent(model, rebuilt)):
        description["absent"] = absent
        _remove(path, rebuilt, absent)
    _check_rebuilt(rebuilt, stored)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as directory:
        weights, config_file = Path(directory) / _WEIGHTS, Path(directory) / _CONFIG
        save_file({name: _as_stored(tensor, dtype) for name, tensor in stored.items()}, weights)
        checksum = _sha256(weights)
        named = f"mapreuse-{checksum[:12]}.safetensors"
        config = description | {"weights": named, "sha256": checksum}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(weights, path / named)
        os.replace(config_file, path / _CONFIG)
    for other in (*path.glob("mapreuse-*.safetensors"), path / _WEIGHTS):
        if other.name != named:
            other.unlink(missing_ok=True)


def load(path: str | Path) -> PreTrainedModel:
    """Open the model that `save` wrote to `path`, in evaluation mode. Its weights are the same bit for bit.

    Args:
        path: the directory. In a sentence-transformers directory, this opens the transformer, its first module.

    Raises:
        ValueError: if the directory is not a saved model, or is damaged.
    """
    path = transformer_directory(path)
    config = _read_config(path)
    weights = path / config.get("weights", _WEIGHTS)
    if not weights.is_file():
        raise ValueError(f"{path}: {weights.name} is missing; copy the whole directory that save() wrote")
    if _sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights} is truncated or damaged: its checksum is not the one in {_CONFIG}")
    model = _rebuilt(path, config)
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a safetensors file: {one_line(error)}") from None
    destinations = _destinations(model, stored)
    if differences := _differences(stored, destinations):
        raise ValueError(f"{weights} does not hold the weights of this {type(model).__name__}: {differences}")
    for key, tensor in destinations.items():
        tensor.data = stored[key].to(tensor.dtype, copy=True)  # without a copy, the model would change with the file
    return model.eval()


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


def _rebuilt(path: Path, config: dict[str, Any], device: str = "cpu") -> PreTrainedModel:
    """The model that `config` describes, with its plans applied and arbitrary weights."""
    model = _build(path, config, device)
    modules = dict(model.named_modules())
    for reuse in config.get("reuse", []):
        problem = f"{path}: its plan does not fit {config['class']}"
        entry: dict[str, Any] = reuse if isinstance(reuse, dict) else {}
        stack, storage = entry.get("stack"), entry.get("storage") or entry.get("strategy", "")
        if not (isinstance(stack, str) and stack in modules):
            raise ValueError(f"{problem}: it has no module {stack!r}")
        try:
            plan = ReusePlan.from_json(json.dumps(entry.get("plan")))
            apply(modules[stack], plan, storage=storage, memory_budget=entry.get("memory_budget"))
        except ValueError as error:
            raise ValueError(f"{problem}: {one_line(error)}") from None
        if config["version"] == 1 and any(isinstance(source, tuple) for source in plan.layers):
            raise ValueError(
                f"{path}: format version 1 stored the heads of this plan in another order; convert the original again"
            )
    _remove(path, model, config.get("absent", []))
    if applied_plans(model):
        refuse_save_pretrained(model)
    return model


def _remove(path: Path, model: PreTrainedModel, absent: list[Any]) -> None:
    """Replace modules by None."""
    modules = dict(model.named_modules())
    for name in absent:
        if not (isinstance(name, str) and name in modules):
            raise ValueError(
                f"{path}: {_CONFIG} lists {name!r} as absent, but {type(model).__name__} has no such module"
            )
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, None)


def _build(path: Path, config: dict[str, Any], device: str) -> PreTrainedModel:
    """The model without plans, with the right types and arbitrary weights."""
    name, module = config["class"], config.get("module", "transformers")
    if module != "transformers" and not module.startswith(_MODELS):
        raise ValueError(f"{path}: {module}.{name} is not a model class that transformers defines")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {name!r}")
    cls: Any = found
    try:
        settings = cls.config_class.from_dict(dict(config["config"]))
        settings._attn_implementation = config.get("attn_implementation", "sdpa")
        with no_init_weights(), torch.device(device):
            model = cls(settings)
        if "generation_config" in config:
            model.generation_config = GenerationConfig.from_dict(config["generation_config"])
    except Exception as error:  # transformers raises various exceptions for invalid settings
        raise ValueError(f"{path}: {_CONFIG} does not describe a {name}: {one_line(error)}") from error
    types = {name: _dtype(path, value) for name, value in config.get("dtypes", {}).items()}
    usual = _dtype(path, config["dtype"])
    for name, tensor in _floating_tensors(model):
        tensor.data = tensor.data.to(types.get(name, usual))
    return model


def _check_rebuilt(rebuilt: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Raise `ValueError` if `load` could not fill the model that it rebuilds with these tensors."""
    name = type(rebuilt).__name__
    if empty := [key for key, tensor in stored.items() if tensor.is_meta]:
        raise ValueError(f"{empty[0]} of this {name} is on the meta device and has no data; load its weights first")
    if differences := _differences(stored, _destinations(rebuilt, stored)):
        raise ValueError(
            f"this {name} cannot be saved, because it is not the model that its configuration describes, and load "
            f"would refuse it: {differences}"
        )


def _differences(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How stored tensors differ from the expected ones, in names and shapes; empty if they do not."""
    missing = [f"{key} is missing" for key in expected.keys() - stored.keys()]
    extra = [f"{key} is not part of it" for key in stored.keys() - expected.keys()]
    shapes = [
        f"{key} is {tuple(stored[key].shape)}, not {tuple(expected[key].shape)}"
        for key in stored.keys() & expected.keys()
        if stored[key].shape != expected[key].shape
    ]
    found = [*sorted(missing), *sorted(extra), *sorted(shapes)]
    return "; ".join(found[:3]) + (f" and {len(found) - 3} others" if len(found) > 3 else "")


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """The contents of `config.json`, without absent modules and without name and checksum of the weights."""
    config = {
        "model_type": _FORMAT,
        "version": _VERSIONS[-1],
        "class": type(model).__name__,
        "module": type(model).__module__,
        "dtype": _name(model.dtype),
        "dtypes": {name: _name(t.dtype) for name, t in _floating_tensors(model) if t.dtype != model.dtype},
        "attn_implementation": model.config._attn_implementation,
        "reuse": [
            {
                "stack": stack,
                "storage": applied.storage,
                "memory_budget": applied.memory_budget,
                "plan": json.loads(applied.plan.to_json()),
            }
            for stack, applied in applied_plans(model).items()
        ],
        "transformers_version": transformers.__version__,
        "config": model.config.to_dict(),
    }
    if (generation := getattr(model, "generation_config", None)) is not None:
        config["generation_config"] = generation.to_dict()
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        name = config["class"]
        raise ValueError(f"the configuration of this {name} cannot be written as JSON: {one_line(error)}") from None


def _absent(model: nn.Module, described: nn.Module) -> Iterator[str]:
    """Modules of `described` that are None in the model, such as the pooler under `add_pooling_layer=False`."""
    modules = dict(model.named_modules())
    for name in sorted(dict(described.named_modules()).keys() - modules.keys()):
        parent, _, last = name.rpartition(".")
        if parent in modules and getattr(modules[parent], last, described) is None:
            yield name


def _destinations(model: PreTrainedModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that stored ones belong to, by name. Tied tensors are tied first."""
    tensors = dict(_stored_tensors(model))
    if stored.keys() != tensors.keys():
        model.tie_weights()  # a model built without initialisation has no tied tensors yet
        tensors = dict(_stored_tensors(model))
    return tensors


def _stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers. One that several modules share appears once, under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _floating_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers of floating-point types."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / _CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a saved model: it holds no {_CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is not JSON: it is truncated or damaged") from None
    if not isinstance(config, dict) or config.get("model_type") != _FORMAT:
        raise ValueError(f"{path} was not written by mapreuse.save; open it with transformers' from_pretrained")
    if config.get("version") not in _VERSIONS:
        raise ValueError(
            f"{path}: format version {config.get('version')!r} is not supported; this mapreuse reads versions "
            f"{_VERSIONS[0]} to {_VERSIONS[-1]}"
        )
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        if name in _REQUIRED and name not in config:
            raise ValueError(f"{file}: {name!r} is missing")
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{file}: {name!r} must be a {kind.__name__}, got {config[name]!r}")
    weights = config.get("weights", _WEIGHTS)
    if Path(weights).name != weights:
        raise ValueError(f"{file}: 'weights' must name a file in the same directory, got {weights!r}")
    return config


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(path: Path, name: object) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{path / _CONFIG}: {name!r} is not a floating-point type")
    return dtype


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
