"""The conversion of one attention module: fewer projections, and another forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models._correction import Correction
from mapreuse.models._layout import LayerLayout
from mapreuse.models._normalising import Normalised
from mapreuse.models._projections import HeadCounts, num_outputs
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import IMPLEMENTATION, attention_function
from mapreuse.models._sharing_classes import (
    DerivedReusing,
    NormalisedAttention,
    PartlyComputingAttention,
    ReusingAttention,
    SharingAttention,
    sharing_class,
)
from mapreuse.models._stack import Layer

COMPUTING_HEADS = "computing_heads"
"""The buffer of a module that projects the queries of some heads only.

It holds nothing. Its shape is (0, *heads), so that everything that loads weights by name compares the heads.
"""

_Rows = dict[str, tuple[int, int, list[int]]]
"""For each tensor that lost rows: their dimension, their number in the original, and those that are kept."""


@dataclass(frozen=True)
class Conversion:
    """What the conversion of one attention module needs; `plan_conversions` has checked it.

    Attributes:
        layer: the layer and its attention module.
        form: how modules of its class are converted.
        heads: its numbers of heads.
        layout: its part of the plan.
    """

    layer: Layer
    form: AttentionForm
    heads: HeadCounts
    layout: LayerLayout


def convert_attention(conversion: Conversion) -> None:
    """Make one attention module follow its layout, in place."""
    attention: Any = conversion.layer.attention
    form, layout = conversion.form, conversion.layout
    if not layout.computing:
        for attribute in (*form.query, *form.key):
            if attribute in attention._modules or attribute in attention._parameters:
                delattr(attention, attribute)
    if kept := kept_rows(attention, form, layout, conversion.heads.head_dim):
        for name, (dim, _, rows) in kept.items():
            _keep(attention, name, dim, rows)
        if layout.computing:
            device = attention.get_submodule(form.value).weight.device
            empty = torch.empty(0, *layout.computing, dtype=torch.uint8, device=device)
            attention.register_buffer(COMPUTING_HEADS, empty)
        attention.register_load_state_dict_pre_hook(partial(_take_rows, kept=kept))
    if layout.rank is not None:
        projection = attention.get_submodule(form.value)
        width = projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]
        attention.correction = Correction(
            width, layout.num_heads, layout.num_value_heads, layout.rank, seed=layout.layer, like=projection.weight
        )
    attention._layout, attention._form = layout, form
    if form.head_dim is not None:
        attention.head_dim = conversion.heads.head_dim
    if isinstance(attention, SharingAttention):
        return
    reusing = DerivedReusing if form.derived else ReusingAttention
    mixin = form.computing if layout.computing else reusing
    if form.normal is not None and layout.computing:
        mixin = NormalisedAttention
        attention._normalised = Normalised(type(attention), form.normal, attention_function)
    partly = PartlyComputingAttention if layout.parts and mixin is None else None
    if mixin or partly:
        attention.__class__ = sharing_class(mixin or partly, type(attention))  # type: ignore[arg-type]
    if mixin:
        return
    # The original forward calls mapreuse's attention function. The public setter of the implementation would change
    # the configuration of other modules as well.
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = IMPLEMENTATION


def kept_rows(attention: nn.Module, form: AttentionForm, layout: LayerLayout, head_dim: int) -> _Rows:
    """The tensors of an attention module that hold rows of heads that do not compute, and the rows to keep."""
    if form.probe is not None:
        rows = list(form.probe.rows)
        whole = layout.computing or not form.value
        return (
            {} if whole else _rows_of(attention, form.value, num_outputs(attention.get_submodule(form.value)), rows)
        )
    if form.fused:
        width, own = layout.num_heads * head_dim, head_rows(layout.computing, head_dim)
        rows = [*own, *(width + row for row in own), *range(2 * width, 3 * width)]
        return _rows_of(attention, form.value, 3 * width, rows)
    kept: _Rows = {}
    if layout.computing:
        for attributes, heads, num_heads in (
            (form.query, layout.query_heads, layout.num_heads),
            (form.key, layout.key_heads, layout.num_value_heads),
        ):
            for attribute in attributes:
                if isinstance(attention._modules.get(attribute), nn.Linear):
                    rows = head_rows(heads, head_dim)
                    kept |= _rows_of(attention, attribute, num_heads * head_dim, rows)
                elif attention._parameters.get(attribute) is not None and form.computing is not None:
                    kept[attribute] = 0, num_heads, list(heads)
    return {name: one for name, one in kept.items() if len(one[2]) < one[1]}


def head_rows(heads: Sequence[int], head_dim: int) -> list[int]:
    """The rows of a projection that belong to `heads`, in that order."""
    return [head * head_dim + row for head in heads for row in range(head_dim)]


def _rows_of(attention: nn.Module, path: str, size: int, rows: list[int]) -> _Rows:
    """The same rows of the weight and the bias of a projection."""
    projection: Any = attention.get_submodule(path)
    kept: _Rows = {f"{path}.weight": (1 if isinstance(projection, Conv1D) else 0, size, rows)}
    return kept if projection.bias is None else kept | {f"{path}.bias": (0, size, rows)}


def _keep(attention: nn.Module, name: str, dim: int, rows: list[int]) -> None:
    path, _, last = name.rpartition(".")
    owner: Any = attention.get_submodule(path)
    parameter = owner._parameters[last]
    setattr(owner, last, nn.Parameter(_selected(parameter.detach(), dim, rows), parameter.requires_grad))
    if path:
        setattr(owner, "nf" if isinstance(owner, Conv1D) else "out_features", len(rows))


def _selected(tensor: Tensor, dim: int, rows: list[int]) -> Tensor:
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


def _take_rows(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    kept: _Rows,
) -> None:
    """Hook of `load_state_dict`: take the rows of the heads that compute from the weights of an original.

    Weights that have lost rows already must belong to the same heads.
    """
    given = {name: state_dict[prefix + name] for name in kept if prefix + name in state_dict}
    whole = {name: one for name, one in given.items() if one.shape[kept[name][0] :][:1] == (kept[name][1],)}
    for name, tensor in whole.items():
        dim, _, rows = kept[name]
        state_dict[prefix + name] = _selected(tensor, dim, rows)
    own, found = module._buffers.get(COMPUTING_HEADS), state_dict.get(prefix + COMPUTING_HEADS)
    if given and own is not None:
        if len(whole) < len(given) and (found is None or found.shape != own.shape):
            name, heads = prefix + next(iter(given)), f"under this plan heads {_listed(own)} compute"
            if found is None:
                error_msgs.append(
                    f"{name} has rows of some heads, and {heads}, but the buffer {COMPUTING_HEADS} that names its "
                    "heads is not among these weights, as if they were one shard of a checkpoint; open the directory "
                    "by from_pretrained, or join its shards"
                )
            else:
                error_msgs.append(
                    f"{name} holds heads {_listed(found)}, but {heads}; load the weights of the original, or of a "
                    "model with the same plan"
                )
        state_dict[prefix + COMPUTING_HEADS] = own


def _listed(computing_heads: Tensor) -> str:
    return ", ".join(map(str, computing_heads.shape[1:]))
