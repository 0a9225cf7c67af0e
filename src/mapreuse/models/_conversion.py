"""The conversion of one attention module: fewer and reordered projections, and another forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mapreuse.models._adapters import Adapter
from mapreuse.models._layout import LayerLayout
from mapreuse.models._linear import (
    HeadSubsetLinear,
    OptimizedHeadSubsetLinear,
    OptimizedLinear,
    head_rows,
    take_inputs,
    take_outputs,
)
from mapreuse.models._projections import HeadCounts
from mapreuse.models._sharing_classes import SharingAttention, sharing_class, use_shared_attention
from mapreuse.models._stack import Layer


@dataclass(frozen=True)
class Conversion:
    """What the conversion of one attention module needs; `plan_conversions` has checked it.

    Attributes:
        layer: the layer and its attention module.
        adapter: how modules of its class are converted.
        heads: its numbers of heads.
        layout: its part of the plan.
        output: the output projection; its columns follow the order of the heads.
    """

    layer: Layer
    adapter: Adapter
    heads: HeadCounts
    layout: LayerLayout
    output: nn.Module | None


def convert_attention(conversion: Conversion) -> None:
    """Make one attention module follow its layout, in place."""
    attention, adapter, layout = conversion.layer.attention, conversion.adapter, conversion.layout
    form, dim = adapter.form, conversion.heads.head_dim
    own = layout.order[: layout.computing]
    if layout.computing == 0:
        for attribute in (*form.query, *form.key):
            if attribute in attention._modules or attribute in attention._parameters:
                delattr(attention, attribute)
    if adapter.fused is not None:
        _take_fused(conversion, own)
    else:
        if own and own != tuple(range(layout.num_heads)):
            _keep_heads(conversion, own)
        if layout.value_order != tuple(range(len(layout.value_order))):
            take_outputs(attention.get_submodule(form.value), head_rows(layout.value_order, dim))
    if layout.reorders:
        assert conversion.output is not None
        take_inputs(conversion.output, head_rows(layout.order, dim))
    attention._layout = layout  # type: ignore[assignment]
    attention._form = form  # type: ignore[assignment]
    attention._num_value_heads = conversion.heads.num_value_heads  # type: ignore[assignment]
    if adapter.head_dim is not None:
        attention.head_dim = dim  # type: ignore[assignment]
    mixin = adapter.computing if layout.computing else adapter.reusing
    if isinstance(attention, SharingAttention):
        return
    if mixin is None:
        use_shared_attention(attention)
    else:
        attention.__class__ = sharing_class(mixin, type(attention))  # type: ignore[arg-type]


def _take_fused(conversion: Conversion, own: Sequence[int]) -> None:
    """Of a fused projection, keep the queries and keys of the heads that compute, and all values."""
    layout, dim = conversion.layout, conversion.heads.head_dim
    width = conversion.heads.num_heads * dim
    own_rows = head_rows(own, dim)
    value_rows = [2 * width + row for row in head_rows(layout.value_order, dim)]
    rows = own_rows + [width + row for row in own_rows] + value_rows
    if rows != list(range(3 * width)):
        assert conversion.adapter.fused is not None
        take_outputs(conversion.layer.attention.get_submodule(conversion.adapter.fused), rows)


def _keep_heads(conversion: Conversion, own: Sequence[int]) -> None:
    """Keep the query and key projections of the heads that compute, in their order."""
    attention, adapter, layout = conversion.layer.attention, conversion.adapter, conversion.layout
    dim = conversion.heads.head_dim
    if adapter.computing is not None:
        for attribute in adapter.per_head:
            parameter = attention._parameters.get(attribute)
            if parameter is None:
                take_outputs(attention.get_submodule(attribute), head_rows(own, dim))
            else:
                kept = parameter.detach()[list(own)].clone()
                setattr(attention, attribute, nn.Parameter(kept, parameter.requires_grad))
        return
    for attributes, heads in ((adapter.form.query, own), (adapter.form.key, layout.key_heads)):
        for attribute in attributes:
            module = attention._modules.get(attribute)
            if not isinstance(module, nn.Linear):
                continue
            rows = head_rows(heads, dim)
            if len(rows) == module.out_features:
                take_outputs(module, rows)
            else:
                optimized = isinstance(module, OptimizedLinear)
                subset = OptimizedHeadSubsetLinear if optimized else HeadSubsetLinear
                setattr(attention, attribute, subset(module, rows))
