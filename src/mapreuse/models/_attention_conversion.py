"""The conversion of one attention module: fewer and reordered projections, and another forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from mapreuse.models._layout import LayerLayout
from mapreuse.models._linear import HeadSubsetLinear, head_rows, selected, take_inputs, take_outputs
from mapreuse.models._optimize import is_optimized, optimize
from mapreuse.models._projections import HeadCounts
from mapreuse.models._reading import AttentionForm
from mapreuse.models._runtime import IMPLEMENTATION
from mapreuse.models._sharing_classes import ReusingAttention, SharingAttention, sharing_class
from mapreuse.models._stack import Layer


@dataclass(frozen=True)
class Conversion:
    """What the conversion of one attention module needs; `plan_conversions` has checked it.

    Attributes:
        layer: the layer and its attention module.
        form: how modules of its class are converted.
        heads: its numbers of heads.
        layout: its part of the plan.
        output: the output projection; its columns follow the order of the heads.
    """

    layer: Layer
    form: AttentionForm
    heads: HeadCounts
    layout: LayerLayout
    output: nn.Module | None


def convert_attention(conversion: Conversion) -> None:
    """Make one attention module follow its layout, in place."""
    attention: Any = conversion.layer.attention
    form, layout, dim = conversion.form, conversion.layout, conversion.heads.head_dim
    own = layout.order[: layout.computing]
    if layout.computing == 0:
        for attribute in (*form.query, *form.key):
            if attribute in attention._modules or attribute in attention._parameters:
                delattr(attention, attribute)
    if form.fused:
        _take_fused(conversion)
    else:
        if own and own != tuple(range(layout.num_heads)):
            _keep_heads(conversion)
        if layout.value_order != tuple(range(len(layout.value_order))):
            take_outputs(attention.get_submodule(form.value), head_rows(layout.value_order, dim))
    if layout.reorders:
        assert conversion.output is not None
        take_inputs(conversion.output, head_rows(layout.order, dim))
    attention._layout, attention._form = layout, form
    if form.head_dim is not None:
        attention.head_dim = dim
    if isinstance(attention, SharingAttention):
        return
    mixin = form.computing if layout.computing else ReusingAttention
    if mixin is not None:
        attention.__class__ = sharing_class(mixin, type(attention))  # type: ignore[arg-type]
        return
    # The original forward calls mapreuse's attention function. The public setter of the implementation would change
    # the configuration of other modules as well.
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = IMPLEMENTATION


def _take_fused(conversion: Conversion) -> None:
    """Reduce a fused projection to the queries and keys of the heads that compute, and all values."""
    layout, dim = conversion.layout, conversion.heads.head_dim
    width = layout.num_heads * dim
    own_rows = head_rows(layout.order[: layout.computing], dim)
    value_rows = [2 * width + row for row in head_rows(layout.value_order, dim)]
    rows = own_rows + [width + row for row in own_rows] + value_rows
    if rows != list(range(3 * width)):
        take_outputs(conversion.layer.attention.get_submodule(conversion.form.value), rows)


def _keep_heads(conversion: Conversion) -> None:
    """Keep the query and key projections of the heads that compute, in their order."""
    attention, form, layout = conversion.layer.attention, conversion.form, conversion.layout
    keeps_forward = form.computing is None
    for attributes, heads in ((form.query, layout.order[: layout.computing]), (form.key, layout.key_heads)):
        rows = head_rows(heads, conversion.heads.head_dim)
        for attribute in attributes:
            module, parameter = attention._modules.get(attribute), attention._parameters.get(attribute)
            if isinstance(module, nn.Linear):
                if keeps_forward and len(rows) < module.out_features:
                    subset = HeadSubsetLinear(module, rows)
                    setattr(attention, attribute, optimize(subset) if is_optimized(module) else subset)
                else:
                    take_outputs(module, rows)
            elif parameter is not None and not keeps_forward:
                setattr(attention, attribute, selected(parameter, 0, heads))
