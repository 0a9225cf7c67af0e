"""Models from directories."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

from mapreuse import models
from mapreuse.console import one_line, refused_in_one_line

_CONFIG = "config.json"

_OPTIONAL_WEIGHTS = re.compile(r"(^|\.)pooler\.|(^|\.)masked_spec_embed$|(^|\.)mask_token$")
"""Weights that hidden states do not depend on; directories often lack them."""


@dataclass(frozen=True)
class OpenedModel:
    """A model and the directory that it came from.

    Attributes:
        model: the model.
        directory: directory of its weights, tokenizer, feature extractor or image processor.
        stack: path of the module that holds the stack of layers to convert; empty if the model has only one stack.
    """

    model: PreTrainedModel
    directory: Path
    stack: str = ""

    @property
    def part(self) -> nn.Module:
        """The module that holds the stack of layers to convert."""
        return self.model.get_submodule(self.stack)

    def with_part(self, part: nn.Module) -> PreTrainedModel:
        """Replace `part` in the model, and return the model."""
        if not self.stack:
            return part
        self.model.set_submodule(self.stack, part)
        self.model.tie_weights()
        return self.model


def open_model(path: str | Path, stack: str = "", *, float32: bool = False) -> OpenedModel:
    """Open a model from a directory that `save_pretrained`, `mapreuse.save` or sentence-transformers wrote.

    The class is the one that the directory names. Weights are read from safetensors only, in their stored type. From
    a sentence-transformers directory, the transformer is opened.

    Args:
        path: the directory.
        stack: path of the module that holds the stack of layers to convert, such as `model.encoder`, if the model
            has several stacks.
        float32: convert the weights to float32.

    Raises:
        ValueError: if the directory does not exist or contains no model; if weights are missing, do not fit, or are
            in half precision; or if there is no such stack of layers. The message is one line.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such directory")
    try:
        directory = models.transformer_directory(path)
        model = _open(directory)
        if float32:
            model.float()
        check_precision(model)
        if stack not in dict(model.named_modules()):
            raise ValueError(f"{type(model).__name__} has no module {stack!r}")
        opened = OpenedModel(model.eval(), directory, stack)
        models.find_stack(opened.part)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return opened


def check_precision(model: nn.Module) -> None:
    """Raise `ValueError` for a model in half precision on a CPU, where products are slow and too coarse."""
    models.check_model(model)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is in {str(parameter.dtype).removeprefix('torch.')} on the CPU; "
                "convert the model in float32: model.float(), or --float32 on the command line"
            )


def _open(directory: Path) -> PreTrainedModel:
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"the directory contains no model: {_CONFIG} is missing")
    config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{_CONFIG} is not a JSON object")
    if config.get("model_type") == "mapreuse":
        return models.load(directory)
    (name, *_) = config.get("architectures") or [""]
    named = getattr(transformers, str(name), None)
    cls: Any = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with refused_in_one_line(""):
        model, found = cls.from_pretrained(directory, **options)
    missing = sorted(name for name in found["missing_keys"] if not _OPTIONAL_WEIGHTS.search(name))
    if missing:
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}")
    return model
