"""`drop_layers`: a model without some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from mapreuse.models._apply import applied_plans
from mapreuse.models._snapshots import Model, unchanged_on_failure
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Stack, check_model, find_stack

_NUMBERS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
)
"""Entries of configurations that hold the number of layers."""

_INDICES = ("layer_idx", "layer_id", "layer_index")
"""Attributes of modules that hold the index of their layer."""


def drop_layers(model: Model, layers: Iterable[int]) -> Model:
    """Remove layers of a model, in place; returns the model.

        h[l + 1] = h[l] for each removed layer l

    The configuration gets the new number of layers, so `save_pretrained`, `from_pretrained`, `save` and `load` work.
    To keep the original, pass a copy. Drop layers first, then `apply` a plan for the layers that are left. Dropping
    costs quality. `hidden_state_error` in `mapreuse.conversion` measures how much.

    Args:
        model: a model with one stack of layers, as for `apply`, without a plan. In a part of a larger model, the
            configuration of the part changes; that of the larger model does not.
        layers: indices of the layers to remove, from 0.

    Raises:
        ValueError: if an index is not one of a layer, no layer would be left, the model has a plan, or its class
            builds other modules for this number of layers (`Unsupported`). The model is unchanged.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4)
        >>> model = drop_layers(transformers.BertModel(config), [1, 2])
        >>> model.config.num_hidden_layers
        2
    """
    check_model(model)
    if applied_plans(model):
        raise ValueError("the model shares attention maps already; drop layers of the original, then apply a plan")
    stack = find_stack(model)
    number = len(stack.layers)
    dropped = _checked(layers, number)
    kept = [layer for layer in range(number) if layer not in dropped]
    configs = _configs(model, stack, number)
    with unchanged_on_failure(model):
        _remove(stack, kept)
        changed = _rebuildable(model, configs, number, kept)
    for config in configs:
        vars(config).update(vars(changed[id(config)]))
    return model


def _checked(layers: Iterable[int], number: int) -> set[int]:
    found = list(layers)
    for layer in found:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < number:
            raise ValueError(f"layers must be indices from 0 to {number - 1}, such as [1], got {layer!r}")
    if len(set(found)) == number:
        raise ValueError(f"layers names all {number} layers; at least one must be left")
    return set(found)


def _configs(model: nn.Module, stack: Stack, number: int) -> list[PreTrainedConfig]:
    """The configurations that hold the number of layers of the stack, without copies of the same object."""
    inside = set(stack.module.modules())
    around = [module for module in model.modules() if module in inside or stack.module in set(module.modules())]
    found = {id(config): config for module in around for config in _parts(getattr(module, "config", None))}
    return [config for config in found.values() if _number_name(config, number) is not None]


def _parts(config: Any) -> Iterator[PreTrainedConfig]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for part in vars(config).values():
            yield from _parts(part)


def _number_name(config: PreTrainedConfig, number: int) -> str | None:
    return next((name for name in _NUMBERS if getattr(config, name, None) == number), None)


def _rebuildable(
    model: nn.Module, configs: list[PreTrainedConfig], number: int, kept: list[int]
) -> dict[int, PreTrainedConfig]:
    """Changed configurations from which the class builds the model's parameters.

    The encoder and the decoder of a model may have as many layers, in two entries of one configuration.
    """
    names = [name for name in _NUMBERS if any(getattr(config, name, None) == number for config in configs)]
    refusals = []
    for preferred in names or [""]:
        changed = {id(config): _with_layers(config, number, kept, preferred) for config in configs}
        try:
            _check_rebuilt(model, changed)
        except Unsupported as refusal:
            refusals.append(refusal)
        else:
            return changed
    raise refusals[0]


def _with_layers(config: PreTrainedConfig, number: int, kept: list[int], preferred: str) -> PreTrainedConfig:
    """A copy of a configuration for the layers that are kept, with their entries of lists such as `layer_types`."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise Unsupported(f"{type(config).__name__} scales attention by the index of the layer, which would change")
    changed = copy.deepcopy(config)
    name = preferred if getattr(config, preferred, None) == number else _number_name(config, number)
    assert name is not None
    setattr(changed, name, len(kept))
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == number:
            setattr(changed, key, type(value)(value[layer] for layer in kept))
    if "stage_names" in vars(config):  # a backbone names its layers
        stages = ["stem", *(f"stage{layer + 1}" for layer in range(len(kept)))]
        vars(changed).update(stage_names=stages, _out_features=stages[-1:], _out_indices=[len(kept)])
    return changed


def _remove(stack: Stack, kept: list[int]) -> None:
    holder: Any = stack.module
    modules = (getattr(holder, stack.list_name) if stack.list_name else holder)._modules
    names = list(modules)
    layers = [modules[names[layer]] for layer in kept]
    modules.clear()
    for index, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        modules[names[index]] = layer
        for module in layer.modules():
            for name in _INDICES:
                if vars(module).get(name) == old:
                    setattr(module, name, index)
    if vars(holder).get("num_layers") == len(stack.layers):
        holder.num_layers = len(kept)


def _check_rebuilt(model: nn.Module, changed: dict[int, PreTrainedConfig]) -> None:
    """Raise `Unsupported` unless the class builds the same parameters from the changed configuration."""
    if not isinstance(model, PreTrainedModel):
        return
    config = _replaced(model.config, changed)
    with ContextManagers(model.get_init_context(torch.float32, True, True, False)):
        rebuilt = type(model)(config)
    shapes, expected = ({name: one.shape for name, one in each.state_dict().items()} for each in (model, rebuilt))
    if shapes != expected:
        differing = next(name for name in (*shapes, *expected) if shapes.get(name) != expected.get(name))
        raise Unsupported(
            f"{type(model).__name__} with these layers dropped could not be opened again: its class builds another "
            f"{differing}; drop other layers"
        )


def _replaced(config: Any, changed: dict[int, PreTrainedConfig]) -> Any:
    """A copy of a configuration with its changed parts."""
    found = copy.deepcopy(changed.get(id(config), config))
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            setattr(found, name, _replaced(part, changed))
    return found
