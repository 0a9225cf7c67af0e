"""`from_pretrained` of `transformers`, for models that share attention maps.

Importing this module registers the model type and the quantisation method "mapreuse" with `transformers`.

A saved directory has the usual files with two differences. `config.json` nests the configuration of the original:

    {"model_type": "mapreuse", "version": 5, "transformers_weights": <a message>, "config": {<the original's>,
     "quantization_config": {"quant_method": "mapreuse", "reuse": [<stacks and plans>], ...}}}

The weights contain an empty tensor for each one that the conversion removed. A process that has not imported mapreuse
therefore cannot fill removed weights with random numbers: Auto classes do not know the model type, model classes
raise an error that quotes the message, and where neither applies, the empty tensors do not have the right shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mapreuse.console import one_line
from mapreuse.models._apply import applied_plans, apply
from mapreuse.models._attention_conversion import COMPUTING_HEADS
from mapreuse.models._old_order import put_in_original_order
from mapreuse.plan import ReusePlan

FORMAT = "mapreuse"
VERSIONS = (1, 2, 3, 4, 5)
"""Versions of the format that can be read. The last one is written.

Up to version 4, heads of plans with head assignments had another order, in version 1 one of its own. Version 2 named
"storage" "strategy". Up to version 3, the description of the model was not part of the original's configuration, and
weights had another name.
"""
CONFIG = "config.json"
MESSAGE = "this model shares attention maps, import mapreuse before opening it"
_REQUIRED = {"class": str, "dtype": str, "reuse": list}
_OPTIONAL = {"absent": list, "attn_implementation": str, "dtypes": dict, "module": str}


@register_quantization_config(FORMAT)
class ReuseConfig(QuantizationConfigMixin):
    """The plans of a saved model and the rest of its description, as `config.json` stores them.

    Args:
        entries: "version"; "class" and "module" of the model; "dtype" of its weights, and "dtypes" of the tensors
            of other types; names of "absent" modules; "attn_implementation"; and "reuse", a list with path, plan,
            storage and memory budget of each stack.
    """

    def __init__(self, **entries: Any) -> None:
        if entries.get("version") not in VERSIONS:
            raise ValueError(
                f"format version {entries.get('version')!r} is not supported; this mapreuse reads versions "
                f"{VERSIONS[0]} to {VERSIONS[-1]}"
            )
        for name, kind in (_REQUIRED | _OPTIONAL).items():
            if name in _REQUIRED and name not in entries:
                raise ValueError(f"{CONFIG}: {name!r} is missing")
            if name in entries and not isinstance(entries[name], kind):
                raise ValueError(f"{CONFIG}: {name!r} must be a {kind.__name__}, got {entries[name]!r}")
        for name in (entries["dtype"], *entries.get("dtypes", {}).values()):
            _dtype(name)
        self.quant_method = FORMAT
        self.__dict__.update(entries)


@register_quantizer(FORMAT)
class ReuseQuantizer(HfQuantizer):
    """Applies the plans of a saved model between its construction and the loading of its weights."""

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the files are looked up and the model is built: remove everything but the original's."""
        del config.quantization_config
        if getattr(config, "transformers_weights", None) == MESSAGE:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        entries = self.quantization_config.__dict__
        apply_saved_plans(model, entries)
        if _is_same_class(model, entries):
            remove_modules(model, entries.get("absent", []))
        usual, others = _dtype(entries["dtype"]), entries.get("dtypes", {})
        if model.config.dtype == usual:  # otherwise the caller of from_pretrained chose another type
            for name, tensor in floating_tensors(model):
                tensor.data = tensor.data.to(_dtype(others[name]) if name in others else usual)
        modules, removed = dict(model.named_modules()), removed_names(model)
        for name in removed:  # transformers shall not initialise what the module no longer has
            while (name := name.rpartition(".")[0]) not in modules:
                pass
            modules[name]._is_hf_initialized = True
        self._placeholders = {f"^{re.escape(name)}$" for name in removed}
        model._keys_to_ignore_on_load_unexpected.update(self._placeholders)
        if entries["version"] == VERSIONS[-1]:
            _check_placeholders(model, removed, checkpoint_files or [])
        if entries["version"] in VERSIONS[:4]:
            model._keys_to_ignore_on_load_missing.add(f"{COMPUTING_HEADS}$")

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.quantization_config.__dict__["version"] in VERSIONS[:4]:
            put_in_original_order(model)
            model._keys_to_ignore_on_load_missing.discard(f"{COMPUTING_HEADS}$")
        model._keys_to_ignore_on_load_unexpected.difference_update(self._placeholders)
        self.remove_quantization_config(model)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class ReuseModelConfig(PreTrainedConfig):
    """The model type "mapreuse", by which `AutoConfig` finds the configuration of the original."""

    model_type = FORMAT

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of the original. It carries the plans as its `quantization_config`."""
        original = original_config(config_dict)
        return CONFIG_MAPPING[original["model_type"]].from_dict(original, **kwargs)


AutoConfig.register(FORMAT, ReuseModelConfig)


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the original in the contents of `config.json`, with the plans as `quantization_config`.

    Raises:
        ValueError: if the contents are not valid.
    """
    original = config.get("config")
    if not isinstance(original, dict):
        raise ValueError(f"{CONFIG}: 'config' must be a dict, got {original!r}")
    if original.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{CONFIG}: transformers {transformers.__version__} has no model type {original.get('model_type')!r}"
        )
    if config.get("version") in VERSIONS[:3]:
        entries = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL, "version") if key in config}
        original = original | {
            "quantization_config": {"quant_method": FORMAT, "reuse": []} | entries,
            "transformers_weights": config.get("weights", "mapreuse.safetensors"),
            "dtype": config.get("dtype"),  # weights may be stored in another type
        }
    found = original.get("quantization_config")
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG}: 'quantization_config' must be a dict, got {found!r}")
    ReuseConfig(**found | {"version": config.get("version")})
    return original


def apply_saved_plans(model: PreTrainedModel, entries: dict[str, Any]) -> None:
    """Apply the plans of a saved model to one of the same or of a related class, such as one with another head.

    Raises:
        ValueError: if a plan does not fit.
    """
    modules = dict(model.named_modules())
    for reuse in entries["reuse"]:
        problem = f"its plan does not fit {type(model).__name__}"
        reuse = reuse if isinstance(reuse, dict) else {}
        stack, storage = reuse.get("stack"), reuse.get("storage") or reuse.get("strategy", "")
        path = _path_in(model, stack, entries) if isinstance(stack, str) else stack
        attention = "self"
        if isinstance(path, str) and path not in modules and _is_cross(path):
            path, attention = _module_of(path), "cross"
        if not (isinstance(path, str) and path in modules):
            raise ValueError(f"{problem}: it has no module {path!r}; a {entries['class']} was saved")
        try:
            plan = ReusePlan.from_json(json.dumps(reuse.get("plan")))
            budget = reuse.get("memory_budget")
            apply(modules[path], plan, storage=storage, memory_budget=budget, attention=attention)
        except ValueError as error:
            raise ValueError(f"{problem}: {one_line(error)}") from None
        if entries["version"] == 1 and any(isinstance(source, tuple) for source in plan.layers):
            raise ValueError(
                "format version 1 stored the heads of this plan in another order; convert the original again"
            )


def _path_in(model: PreTrainedModel, path: str, entries: dict[str, Any]) -> str:
    """The path of a module of the saved model in `model`: `encoder` is `bert.encoder` in a model with a head."""
    prefix = model.base_model_prefix
    if _is_same_class(model, entries) or not prefix:
        return path
    inside = path == prefix or path.startswith(f"{prefix}.")
    if hasattr(model, prefix) and not inside:
        return f"{prefix}.{path}".removesuffix(".")
    return path[len(prefix) + 1 :] if inside and not hasattr(model, prefix) else path


def _is_same_class(model: PreTrainedModel, entries: dict[str, Any]) -> bool:
    return type(model).__name__ == entries["class"]


def remove_modules(model: PreTrainedModel, absent: list[Any]) -> None:
    """Replace modules by None."""
    modules = dict(model.named_modules())
    for name in absent:
        parent, _, last = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        if not hasattr(modules.get(parent), last):
            raise ValueError(f"{CONFIG} lists {name!r} as absent, but {type(model).__name__} has no such module")
        setattr(modules[parent], last, None)


def removed_names(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that conversions removed from the model."""
    stacks = applied_plans(model).items()
    paths = ((stack if applied.attention == "self" else _module_of(stack), applied) for stack, applied in stacks)
    return [f"{path}.{name}".removeprefix(".") for path, applied in paths for name in applied.removed]


def _is_cross(stack: str) -> bool:
    return stack == "cross" or stack.endswith(".cross")


def _module_of(stack: str) -> str:
    """The path of the module that runs the layers of `….cross`."""
    return stack.removesuffix("cross").removesuffix(".")


def _check_placeholders(model: PreTrainedModel, removed: list[str], files: list[str]) -> None:
    """Raise `ValueError` if files of weights lack the empty tensors of their plan: another tool wrote them."""
    found: list[str] = []
    for file in files:
        if not file.endswith(".safetensors"):
            return
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            found += [name for name in names if weights.get_slice(name).get_shape() == [0]]
    prefix = f"{model.base_model_prefix}."  # a base model has no prefix, and one with a head has
    if files and (
        lacking := {one.removeprefix(prefix) for one in removed} - {one.removeprefix(prefix) for one in found}
    ):
        raise ValueError(
            f"the weights of this {type(model).__name__} were not saved with its plan: they lack the empty tensor "
            f"{min(lacking)}; save the model again by save_pretrained, as accelerator.save_model keeps no plan"
        )


def floating_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers of floating-point types."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def _dtype(name: object) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{CONFIG}: {name!r} is not a floating-point type")
    return dtype
