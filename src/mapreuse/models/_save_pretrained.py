"""`save_pretrained` of `transformers`, for models that share attention maps.

Importing this module wraps `save_pretrained` of models and configurations. The whole model must be saved with the
plans of its parts, but a converted part does not know the whole. Models without plans are saved as always.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from mapreuse.console import one_line
from mapreuse.models._apply import applied_plans
from mapreuse.models._from_pretrained import (
    CONFIG,
    FORMAT,
    MESSAGE,
    VERSIONS,
    apply_saved_plans,
    floating_tensors,
    remove_modules,
    removed_names,
)

_WEIGHTS = r"model{0}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{0}\.json|mapreuse(-\w+)?\.safetensors"
"""Names of files with weights, also those of earlier versions of the format. {0} is the variant."""

_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _save_pretrained_with_plans(
    self: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    _forget_saved_plans(self)
    only_adapters = getattr(self, "_hf_peft_config_loaded", False)
    if not applied_plans(self) or only_adapters:
        if not only_adapters and _has_plans(Path(save_directory)):
            (Path(save_directory) / CONFIG).unlink(missing_ok=True)  # this model replaces it, plans included
        _save_pretrained(self, save_directory, *args, **kwargs)
        return
    path = Path(save_directory)
    bound = inspect.signature(_save_pretrained).bind(self, path, *args, **kwargs)
    hub = dict(bound.arguments.get("kwargs", {}))
    given = {
        name: value for name, value in bound.arguments.items() if name not in ("self", "save_directory", "kwargs")
    }
    write(self, path, **given | {"push_to_hub": False})
    if given.get("push_to_hub") and given.get("is_main_process", True):
        self.push_to_hub(hub.pop("repo_id", path.name), token=given.get("token"), **hub)


def _forget_saved_plans(model: PreTrainedModel) -> None:
    """A model that `from_config` built has the plans in its configuration, but they are not in force."""
    found = getattr(model.config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == FORMAT:
        del model.config.quantization_config


PreTrainedModel.save_pretrained = _save_pretrained_with_plans


def _has_plans(path: Path) -> bool:
    """True if the directory holds a model with plans."""
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == FORMAT


_save_config = PreTrainedConfig.save_pretrained


@functools.wraps(_save_config)
def _save_config_unless_plans(
    self: PreTrainedConfig, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    if _has_plans(Path(save_directory)):
        raise ValueError(
            f"{save_directory} holds a model that shares attention maps, and a configuration alone would lose its "
            "plans; call save_pretrained of the model"
        )
    _save_config(self, save_directory, *args, **kwargs)


PreTrainedConfig.save_pretrained = _save_config_unless_plans


def write(model: PreTrainedModel, path: Path, state_dict: dict[str, Any] | None = None, **options: Any) -> None:
    """Write a model, with or without plans, to the directory `path`.

    Files are written to a directory inside `path` and then moved, `config.json` last. If writing fails, the previous
    model is intact, and directories that were created are removed.

    Args:
        model: the model.
        path: the directory. It is created if it does not exist.
        state_dict: the weights; None for those of the model.
        options: other arguments of `save_pretrained`.

    Raises:
        ValueError: if `path` is a file, or the model could not be opened again. Nothing is written.
    """
    if existing := next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None):
        raise ValueError(f"{existing} is a file; save to a directory")
    if options.pop("distributed_checkpoint", False):
        raise ValueError("distributed_checkpoint=True does not save plans; save without it")
    _forget_saved_plans(model)
    entries = _describe(model)
    weights: dict[str, Any] = state_dict or model.state_dict()
    if lacking := [name for name in _distinct_tensors(model) if name not in weights]:
        raise ValueError(f"state_dict lacks weights of this {type(model).__name__}: {listed(lacking)}")
    weights = weights | {name: torch.empty(0, dtype=torch.uint8) for name in removed_names(model)}
    with _new_files(path, options.get("variant")) as directory:
        _save_pretrained(model, directory, state_dict=weights, **options | {"save_original_format": False})
        config_file = directory / CONFIG
        if config_file.is_file():  # otherwise another process saves
            plain = json.loads(config_file.read_text(encoding="utf-8"))
            config = {
                "model_type": FORMAT,
                "version": VERSIONS[-1],
                "transformers_version": transformers.__version__,
                "transformers_weights": MESSAGE,
                "config": plain | {"transformers_weights": MESSAGE, "quantization_config": entries},
            }
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _new_files(path: Path, variant: str | None) -> Iterator[Path]:
    """A new directory inside `path`, whose files replace those of the model in `path` at the end.

    `config.json` is removed first and written last, so that no directory mixes two models.
    """
    created = [one for one in (path, *path.parents) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as scratch:
            yield Path(scratch)
            files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == CONFIG)
            if not files:
                return
            (path / CONFIG).unlink(missing_ok=True)
            suffix = "" if variant is None else re.escape(f".{variant}")
            for old in path.iterdir():
                if re.fullmatch(_WEIGHTS.format(suffix), old.name):
                    old.unlink()
            for file in files:
                os.replace(file, path / file.name)
    except BaseException:
        for one in created:
            with suppress(OSError):  # it is not empty
                one.rmdir()
        raise


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of `ReuseConfig`. Raise `ValueError` if a model that they describe could not take the weights."""
    name = type(model).__name__
    try:
        json.dumps(config := model.config.to_dict())
    except TypeError as error:
        raise ValueError(f"the configuration of this {name} cannot be written as JSON: {one_line(error)}") from None
    if config.get("quantization_config") is not None:
        raise _quantised(model)
    entries = {
        "quant_method": FORMAT,
        "version": VERSIONS[-1],
        "class": name,
        "module": type(model).__module__,
        "dtype": _name(model.dtype),
        "dtypes": {key: _name(one.dtype) for key, one in floating_tensors(model) if one.dtype != model.dtype},
        "attn_implementation": model.config._attn_implementation,
        "absent": [],
        "reuse": [
            {
                "stack": stack,
                "storage": applied.storage,
                "memory_budget": applied.memory_budget,
                "plan": json.loads(applied.plan.to_json()),
            }
            for stack, applied in applied_plans(model).items()
        ],
    }
    try:
        with ContextManagers(model.get_init_context(model.dtype, True, True, False)):
            rebuilt = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # a class of the user's own may raise anything
        raise ValueError(f"{name} cannot be built from its configuration alone: {one_line(error)}") from None
    apply_saved_plans(rebuilt, entries)
    entries["absent"] = list(_absent(model, rebuilt))
    remove_modules(rebuilt, entries["absent"])
    stored, expected = _distinct_tensors(model), _distinct_tensors(rebuilt)
    if stored.keys() != expected.keys():
        rebuilt.tie_weights()  # a model built without initialisation has no tied tensors yet
        expected = _distinct_tensors(rebuilt)
    if not hasattr(model, "hf_device_map") and (empty := [key for key, tensor in stored.items() if tensor.is_meta]):
        raise ValueError(f"{empty[0]} of this {name} is on the meta device and has no data; load its weights first")
    if differences := _differences(stored, expected):
        raise ValueError(
            f"this {name} cannot be saved, because it is not the model that its configuration describes, and "
            f"from_pretrained would not restore it: {differences}"
        )
    return entries


def _differences(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How stored tensors differ from the expected ones, in names and shapes; empty if they do not."""
    return listed(
        [f"{key} is missing" for key in expected.keys() - stored.keys()],
        [f"{key} is not part of it" for key in stored.keys() - expected.keys()],
        [
            f"{key} is {tuple(stored[key].shape)}, not {tuple(expected[key].shape)}"
            for key in stored.keys() & expected.keys()
            if stored[key].shape != expected[key].shape
        ],
    )


def _absent(model: nn.Module, described: nn.Module) -> Iterator[str]:
    """Modules of `described` that are None in the model, such as the pooler under `add_pooling_layer=False`."""
    modules = dict(model.named_modules())
    for name in sorted(dict(described.named_modules()).keys() - modules.keys()):
        parent, _, last = name.rpartition(".")
        if parent in modules and getattr(modules[parent], last, described) is None:
            yield name


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model.state_dict()` themselves. Raise `ValueError` if some are quantised."""
    weights = model.state_dict(keep_vars=True)
    for one in weights.values():
        if not isinstance(one, Tensor) or type(one).__module__.partition(".")[0] != "torch":
            raise _quantised(model)
    return weights


def _quantised(model: nn.Module) -> ValueError:
    return ValueError(
        f"this {type(model).__name__} is quantised and cannot be saved; save it before quantising it, and quantise "
        "it after every load"
    )


def _distinct_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers. One that several modules share appears once, under its first name."""
    tensors = weights_of(model)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def listed(*groups: list[str]) -> str:
    """The first three entries of sorted groups, and how many others there are."""
    found = [entry for group in groups for entry in sorted(group)]
    return "; ".join(found[:3]) + (f" and {len(found) - 3} others" if len(found) > 3 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
