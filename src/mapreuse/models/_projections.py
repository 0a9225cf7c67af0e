"""The value and output projections of a layer, head by head, with or without a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mapreuse.maps import as_index
from mapreuse.models._adapters import attention_form
from mapreuse.models._reading import HEAD_DIM, AttentionForm
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Layer, feeds_output


@dataclass(frozen=True)
class HeadCounts:
    """Numbers of heads of an attention module, and their width."""

    num_heads: int
    num_value_heads: int
    head_dim: int


def count_heads(name: str, attention: nn.Module, form: AttentionForm) -> HeadCounts:
    """The head counts of an attention module without a plan, from the shapes of its projections.

    Raises:
        Unsupported: if the shapes do not determine them. The message starts with `name`.
    """
    if form.probe is not None:
        return HeadCounts(form.probe.num_heads, form.probe.num_value_heads, form.probe.head_dim)
    head_dim = _head_dim(name, attention, form)
    value = num_outputs(attention.get_submodule(form.value))
    if form.fused:
        return HeadCounts(value // 3 // head_dim, value // 3 // head_dim, head_dim)
    projections = [attention._modules.get(attribute) for attribute in form.query]
    queries = [num_outputs(module) for module in projections if isinstance(module, nn.Linear | Conv1D)]
    if not queries:
        raise Unsupported(f"{name}: no query projection was found in {form.query}")
    num_heads, remainder = divmod(queries[0], head_dim)
    num_value_heads, value_remainder = divmod(value, head_dim)
    if remainder or value_remainder or num_heads % num_value_heads:
        raise Unsupported(
            f"{name}: queries of width {queries[0]} and values of width {value} do not make heads of {head_dim}"
        )
    return HeadCounts(num_heads, num_value_heads, head_dim)


def head_dim_of(layer: Layer) -> int:
    """The width of a layer's heads, with or without a plan."""
    return _head_dim(type(layer.attention).__name__, layer.attention, form_of(layer))


def _head_dim(name: str, attention: nn.Module, form: AttentionForm) -> int:
    probed = form.probe and form.probe.head_dim
    for dim in (probed, form.head_dim, *(getattr(attention, attribute, None) for attribute in HEAD_DIM)):
        if isinstance(dim, int):
            return dim
    raise Unsupported(f"{name} names no head dimension (expected one of {', '.join(HEAD_DIM)})")


def num_outputs(projection: nn.Module) -> int:
    """The width of the outputs of a projection."""
    return projection.nf if isinstance(projection, Conv1D) else projection.out_features  # type: ignore[return-value]


@dataclass(frozen=True)
class ValueProjection:
    """The values of a layer: outputs of a projection.

        values[h] = x W[h]ᵀ + b[h]

    Attributes:
        module: the projection. It may make queries and keys as well.
        num_heads: heads of the values; fewer than those of the maps under grouped-query attention.
        head_dim: width of a head.
        rows: the outputs that are the values, head by head; None for the last `num_heads · head_dim`.
    """

    module: nn.Linear | Conv1D
    num_heads: int
    head_dim: int
    rows: tuple[int, ...] | None = None

    def __call__(
        self, hidden_states: Float[Tensor, "batch positions width"]
    ) -> Float[Tensor, "batch heads positions head_dim"]:
        """The values for inputs of the attention module."""
        values = functional.linear(hidden_states, self._rows(), self._row_bias())
        return values.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    @property
    def weight(self) -> Float[Tensor, "heads head_dim width"]:
        """W, detached."""
        return self._rows().detach().unflatten(0, (self.num_heads, self.head_dim))

    @property
    def bias(self) -> Float[Tensor, "heads head_dim"] | None:
        """b, detached, or None."""
        bias = self._row_bias()
        return None if bias is None else bias.detach().unflatten(0, (self.num_heads, self.head_dim))

    @torch.no_grad()
    def assign(self, weight: Float[Tensor, "heads head_dim width"]) -> None:
        """Replace W in place."""
        self._whole()[self._index()] = weight.flatten(0, 1)

    def _whole(self) -> Float[Tensor, "outputs width"]:
        return self.module.weight.mT if isinstance(self.module, Conv1D) else self.module.weight

    def _rows(self) -> Float[Tensor, "outputs width"]:
        return self._whole()[self._index()]

    def _row_bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias[self._index()]

    def _index(self) -> slice | list[int]:
        return slice(-self.num_heads * self.head_dim, None) if self.rows is None else as_index(self.rows)


def value_projection(layer: Layer) -> ValueProjection:
    """The value projection of a layer, with or without a plan.

    Raises:
        Unsupported: if the class of its attention cannot share maps.
    """
    attention: Any = layer.attention
    form, name = form_of(layer), type(attention).__name__
    layout = vars(attention).get("_layout")
    if not form.value:
        raise Unsupported(f"{name}: its values are not outputs of one projection; convert it without refitting")
    num_heads = layout.num_value_heads if layout else count_heads(name, attention, form).num_value_heads
    rows = None if form.probe is None or (layout and not layout.computing) else form.probe.rows
    return ValueProjection(attention.get_submodule(form.value), num_heads, _head_dim(name, attention, form), rows)


def output_projection(layer: Layer) -> nn.Linear | Conv1D:
    """The projection that the context of a layer passes through, inside its attention or next to it (BERT).

    Raises:
        Unsupported: if no plain projection follows directly after the context.
    """
    projection = find_output_projection(layer, form_of(layer))
    if projection is None:
        raise Unsupported(f"{type(layer.attention).__name__}: no plain output projection directly after its context")
    return projection


def form_of(layer: Layer) -> AttentionForm:
    """How the attention of a layer is converted, with or without a plan."""
    return vars(layer.attention).get("_form") or attention_form(layer.attention, cross=layer.cross)


def find_output_projection(layer: Layer, form: AttentionForm) -> nn.Linear | Conv1D | None:
    """The output projection of a layer whose attention has this form, or None if there is no such projection."""
    for attribute in form.output:
        module = layer.attention.get_submodule(attribute)
        if isinstance(module, nn.Linear | Conv1D):
            return module
        if not isinstance(module, nn.Dropout | nn.Identity):
            return None
    if form.output or not feeds_output(layer):
        return None
    beside = layer.parent.get_submodule("output.dense")
    return beside if isinstance(beside, nn.Linear | Conv1D) and is_plain_linear(beside) else None


def is_plain_linear(module: nn.Module | None) -> bool:
    """True for `torch.nn.Linear`, and for the modules of GPT-2 and Falcon that do the same; False for subclasses."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"
