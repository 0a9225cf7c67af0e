"""Models that reuse maps, on disk: safetensors and JSON, never pickle."""

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

from mapreuse.models._apply import applied_to, apply, refuse_save_pretrained
from mapreuse.plan import ReusePlan

_FORMAT = "mapreuse"
_VERSIONS = (1, 2)
"""What can be read; the last is written. The first had the heads of plans that speak of heads in another order."""
_CONFIG = "config.json"
_WEIGHTS = "mapreuse.safetensors"
_MODELS = "transformers.models."
_FOREIGN = ("model*.safetensors*", "pytorch_model*.bin*")
_FIELDS = {"class": str, "config": dict, "dtype": str, "sha256": str}
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
    """Write a model, its plans included, to the directory `path`: `config.json` and `mapreuse-….safetensors`.

    The names keep a plain `from_pretrained` from opening the directory: it finds no weights that it knows, rather
    than fill the projections that were removed with random numbers. For the same reason a directory that holds
    `transformers`' own weights is refused. A directory that is there already keeps its other
    files (a tokenizer, say), and its old model until the new one is complete: the weights are named by their
    checksum, and replacing `config.json`, which names them, is the one step that makes them the directory's model.

    Args:
        model: a `transformers` model, with or without a plan in force.
        path: the directory.
        dtype: floating-point type on disk (`torch.float16` halves the file); the model's own if None.
            `load` restores the model's own type.

    Raises:
        ValueError: where the model, its directory or the type cannot be served; nothing is written then.
    """
    cls = type(model)
    if not isinstance(model, PreTrainedModel) or not cls.__module__.startswith(_MODELS):
        raise ValueError(f"only a whole model that transformers defines can be saved, got {cls.__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"weights are stored as floating-point numbers, such as torch.float16, not as {dtype!r}")
    path = Path(path)
    if foreign := sorted(file.name for pattern in _FOREIGN for file in path.glob(pattern)):
        raise ValueError(f"{path} holds another model's weights ({foreign[0]}); save to a directory of its own")
    stored, description = dict(_stored_tensors(model)), _describe(path, model)
    _check_rebuilt(path, stored, description)
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
    """The model that `save` wrote to `path`, bit for bit, in evaluation mode.

    Of a sentence-transformers directory it is the transformer, its first module.

    Raises:
        ValueError: in one line, where the directory is not such a model, or is damaged.
    """
    path = transformer_directory(path)
    config = _read_config(path)
    weights = path / config.get("weights", _WEIGHTS)
    if not weights.is_file():
        raise ValueError(f"{path}: {weights.name} is missing; copy the whole directory that save() wrote")
    if _sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights} is truncated or damaged: its checksum is not the one in {_CONFIG}")
    model = _rebuilt(path, config)
    _fill(model, weights)
    return model.eval()


def _rebuilt(path: Path, config: dict[str, Any], device: str = "cpu") -> PreTrainedModel:
    """The model that `config` describes, its plans applied, with meaningless weights."""
    model = _build(path, config, device)
    for reuse in config.get("reuse", []):
        try:
            plan = ReusePlan.from_json(json.dumps(reuse["plan"]))
            budget = reuse.get("memory_budget")
            stack = model.get_submodule(reuse["stack"])
            apply(stack, plan, storage=str(reuse["storage"]), memory_budget=None if budget is None else int(budget))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its plan does not fit {config['class']}: {_one_line(error)}") from None
        if config["version"] == 1 and any(isinstance(source, tuple) for source in plan.layers):
            raise ValueError(f"{path}: heads were in another order in format version 1; convert the original again")
    for name in config.get("absent", []):
        parent, _, last = str(name).rpartition(".")
        try:
            model.get_submodule(name)
            setattr(model.get_submodule(parent), last, None)
        except AttributeError:
            raise ValueError(
                f"{path}: {_CONFIG} says that {name!r} is absent, which {config['class']} lacks"
            ) from None
    if applied_to(model):
        refuse_save_pretrained(model)
    return model


def transformer_directory(path: str | Path) -> Path:
    """Where in a sentence-transformers directory its transformer lies; any other directory as it is.

    Raises `ValueError` where `modules.json` does not say so.
    """
    path = Path(path)
    modules = path / "modules.json"
    if not modules.is_file():
        return path
    try:
        return path / str(json.loads(modules.read_text(encoding="utf-8"))[0]["path"])
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{modules.name} does not say where its modules lie") from None


def _check_rebuilt(path: Path, stored: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Raises `ValueError` where `load` could not fill the model that it makes of `description` with these tensors."""
    name = description["class"]
    if empty := [key for key, tensor in stored.items() if tensor.is_meta]:
        raise ValueError(f"{empty[0]} of this {name} is on the meta device and holds no numbers; load weights first")
    wanted = _places(_rebuilt(path, description, "meta"), stored)
    shapes = [
        f"{key} is {tuple(stored[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in stored.keys() & wanted.keys()
        if stored[key].shape != wanted[key].shape
    ]
    lacking = [f"{key} is missing" for key in wanted.keys() - stored.keys()]
    added = [f"{key} is not part of it" for key in stored.keys() - wanted.keys()]
    if differences := [*sorted(lacking), *sorted(added), *sorted(shapes)]:
        more = f" and {len(differences) - 3} others" if len(differences) > 3 else ""
        raise ValueError(
            f"this {name} cannot be saved: it is not the one that its configuration describes, and load would refuse "
            f"it: {'; '.join(differences[:3])}{more}"
        )


def _describe(path: Path, model: PreTrainedModel) -> dict[str, Any]:
    """What `config.json` says beside the name and the checksum of the weights, as it will be read.

    Raises `ValueError` where that cannot be written as JSON, or describes no model.
    """
    reuse = [
        {
            "stack": path,
            "storage": applied.storage,
            "memory_budget": applied.memory_budget,
            "plan": json.loads(applied.plan.to_json()),
        }
        for path, applied in applied_to(model).items()
    ]
    config = {
        "model_type": _FORMAT,
        "version": _VERSIONS[-1],
        "class": type(model).__name__,
        "module": type(model).__module__,
        "dtype": _name(model.dtype),
        "dtypes": {name: _name(t.dtype) for name, t in _floating_tensors(model) if t.dtype != model.dtype},
        "attn_implementation": model.config._attn_implementation,
        "reuse": reuse,
        "transformers_version": transformers.__version__,
        "config": model.config.to_dict(),
    }
    if (generation := getattr(model, "generation_config", None)) is not None:
        config["generation_config"] = generation.to_dict()
    try:
        config = json.loads(json.dumps(config))
    except TypeError as error:
        name = config["class"]
        raise ValueError(f"the configuration of this {name} cannot be written as JSON: {_one_line(error)}") from None
    absent = list(_absent(model, _rebuilt(path, config, "meta")))
    return config | {"absent": absent} if absent else config


def _absent(model: nn.Module, described: nn.Module) -> Iterator[str]:
    """Modules that a model is described with and has None for, such as the pooler after `add_pooling_layer=False`."""
    modules = dict(model.named_modules())
    for name in sorted(dict(described.named_modules()).keys() - modules.keys()):
        parent, _, last = name.rpartition(".")
        if parent in modules and getattr(modules[parent], last, described) is None:
            yield name


def _build(path: Path, config: dict[str, Any], device: str) -> PreTrainedModel:
    """The model before any plan, in the right types, with meaningless weights."""
    name, module = config["class"], config.get("module", "transformers")
    if module != "transformers" and not module.startswith(_MODELS):
        raise ValueError(f"{path}: {module}.{name} is not a model that transformers defines")
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
        types = {name: _dtype(value) for name, value in config.get("dtypes", {}).items()}
        usual = _dtype(config["dtype"])
    except Exception as error:
        # What a model's constructor raises on settings that do not make sense is not documented anywhere.
        raise ValueError(f"{path}: {_CONFIG} does not describe a {name}: {_one_line(error)}") from None
    for name, tensor in _floating_tensors(model):
        tensor.data = tensor.data.to(types.get(name, usual))
    return model


def _fill(model: PreTrainedModel, weights: Path) -> None:
    """Give a model the weights of a file that holds these and no others."""
    name = type(model).__name__
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a safetensors file: {_one_line(error)}") from None
    wanted = _places(model, stored)
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())
        raise ValueError(f"{weights} does not hold the weights of this {name}: {odd[0]} and {len(odd) - 1} others")
    for key, tensor in wanted.items():
        if tensor.shape != stored[key].shape:
            shapes = f"{tuple(stored[key].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{weights} does not hold the weights of this {name}: {key} is {shapes}")
    for key, tensor in wanted.items():
        tensor.data = stored[key].to(tensor.dtype, copy=True)  # the file's own pages would change with the file


def _places(model: PreTrainedModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are to be filled with those stored, by name; what was tied is tied again."""
    wanted = dict(_stored_tensors(model))
    if stored.keys() != wanted.keys():
        model.tie_weights()  # a model that is built without initialisation has nothing tied yet
        wanted = dict(_stored_tensors(model))
    return wanted


def _stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers; one that several modules share comes once, under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _floating_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers that hold floating-point numbers."""
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
        known = " and ".join(map(str, _VERSIONS))
        raise ValueError(f"{path}: format version {config.get('version')!r} is not supported, only {known}")
    for name, kind in (_FIELDS | _OPTIONAL).items():
        if name in _FIELDS and name not in config:
            raise ValueError(f"{file} lacks {name!r}")
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{file}: {name!r} is {config[name]!r}, not a {kind.__name__}")
    weights = config.get("weights", _WEIGHTS)
    if Path(weights).name != weights:
        raise ValueError(f"{file}: 'weights' must name a file in the same directory, got {weights!r}")
    return config


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is not a floating-point type")
    return dtype


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
