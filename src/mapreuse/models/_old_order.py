"""Weights of format versions 1 to 4, which stored the heads in the order of their computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models._apply import applied_plans
from mapreuse.models._plan_conversions import is_separable
from mapreuse.models._projections import HeadCounts, find_output_projection, value_projection
from mapreuse.models._stack import Layer, find_stack
from mapreuse.plan import ReusePlan


def put_in_original_order(model: nn.Module) -> None:
    """Give the weights of a model with plans, loaded from one of these versions, the original order of heads.

    First came the heads that compute, those whose maps later layers apply before the others; then the heads that
    reuse, by source layer and source head. The columns of the output projection had the same order.

    Raises:
        ValueError: if weights are not in memory.
    """
    for path, applied in applied_plans(model).items():
        stack = find_stack(model.get_submodule(path))
        if any(parameter.is_meta for parameter in stack.module.parameters()):
            raise ValueError("weights of this format version cannot be offloaded; open it without, and save it again")
        for layer in stack.layers:
            _put_in_order(layer, applied.plan)


def _put_in_order(layer: Layer, plan: ReusePlan) -> None:
    attention: Any = layer.attention
    form, layout, dim = attention._form, attention._layout, value_projection(layer).head_dim
    heads, group = range(layout.num_heads), layout.num_heads // layout.num_value_heads
    output = find_output_projection(layer, form)
    counts = HeadCounts(layout.num_heads, layout.num_value_heads, dim)
    separable = output is not None and is_separable(attention, replace(form, fixed_heads=False), counts)
    own = layout.computing
    if len(own) < layout.num_heads or separable:
        readers = [plan.heads(reader, layout.num_heads) for reader in plan.readers(layout.layer)]
        own = sorted(own, key=lambda head: (all((layout.layer, head) not in reader for reader in readers), head))
    sources = plan.heads(layout.layer, layout.num_heads)
    order = [*own, *sorted((head for head in heads if sources[head]), key=lambda head: (sources[head], head))]
    values = order if group == 1 else [*range(layout.num_value_heads)]

    def reorder(module: Any, attribute: str, *blocks: Sequence[int], of_inputs: bool = False) -> None:
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            across = attribute == "weight" and isinstance(module, Conv1D)
            parameter.data = _sorted_heads(parameter.data, int(across != of_inputs), dim, blocks)

    def reorder_outputs(module: Any, *blocks: Sequence[int]) -> None:
        for attribute in ("weight", "bias"):
            reorder(module, attribute, *blocks)

    if form.fused:
        reorder_outputs(attention.get_submodule(form.value), own, own, values)
    else:
        reorder_outputs(attention.get_submodule(form.value), values)
        for attributes, projected in ((form.query, own), (form.key, list(dict.fromkeys(h // group for h in own)))):
            for attribute in attributes:
                if isinstance(attention._modules.get(attribute), nn.Linear):
                    reorder_outputs(attention.get_submodule(attribute), projected)
                elif form.computing is not None:
                    reorder(attention, attribute, projected)
    if output is not None:
        reorder(output, "weight", order, of_inputs=True)


def _sorted_heads(tensor: Tensor, axis: int, head_dim: int, blocks: Sequence[Sequence[int]]) -> Tensor:
    """Sort the heads of each block of rows (or columns); each block lists its heads as they are stored."""
    # Some parameters have one row for each head.
    width = head_dim if tensor.shape[axis] == head_dim * sum(map(len, blocks)) else 1
    rows, start = list[int](), 0
    for heads in blocks:
        for place in sorted(range(len(heads)), key=heads.__getitem__):
            rows += range(start + place * width, start + (place + 1) * width)
        start += len(heads) * width
    return tensor.index_select(axis, torch.tensor(rows, device=tensor.device))
