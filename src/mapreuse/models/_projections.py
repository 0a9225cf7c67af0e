"""The values of a layer, planned or not: the part of a projection that makes them, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mapreuse.models._adapters import adapter_of
from mapreuse.models._checks import heads_of
from mapreuse.models._reading import HEAD_DIM
from mapreuse.models._stack import Layer


@dataclass(frozen=True)
class ValueProjection:
    """The last `num_heads · head_dim` outputs of a projection: the values of a layer.

        values[h] = x W[h]ᵀ + b[h]

    Attributes:
        module: the projection; queries and keys may come before values among its outputs.
        num_heads: heads of the values, fewer than those of the maps where heads share them.
        head_dim: width of one head.
    """

    module: nn.Linear | Conv1D
    num_heads: int
    head_dim: int

    def __call__(
        self, hidden_states: Float[Tensor, "batch positions width"]
    ) -> Float[Tensor, "batch heads positions head_dim"]:
        """Values of the inputs of an attention module."""
        values = functional.linear(hidden_states, self._rows(), self._row_bias())
        return values.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    @property
    def weight(self) -> Float[Tensor, "heads head_dim width"]:
        """W, detached."""
        return self._rows().detach().unflatten(0, (self.num_heads, self.head_dim))

    @property
    def bias(self) -> Float[Tensor, "heads head_dim"] | None:
        """b, detached, or None where there is none."""
        bias = self._row_bias()
        return None if bias is None else bias.detach().unflatten(0, (self.num_heads, self.head_dim))

    @torch.no_grad()
    def assign(self, weight: Float[Tensor, "heads head_dim width"]) -> None:
        """Replaces W in place."""
        self._rows().copy_(weight.flatten(0, 1))

    def _rows(self) -> Float[Tensor, "outputs width"]:
        weight = self.module.weight.mT if isinstance(self.module, Conv1D) else self.module.weight
        return weight[-self.num_heads * self.head_dim :]

    def _row_bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias[-self.num_heads * self.head_dim :]


def value_projection(layer: Layer) -> ValueProjection:
    """The value projection of a layer. Raises `Unsupported` where its attention is not understood."""
    attention = layer.attention
    form = vars(attention).get("_form")
    if form is None:
        adapter = adapter_of(attention)
        heads = heads_of(type(attention).__name__, attention, adapter)
        return ValueProjection(
            attention.get_submodule(adapter.form.value),
            heads.num_value_heads,
            heads.head_dim,
        )
    head_dim = next(getattr(attention, name) for name in HEAD_DIM if isinstance(getattr(attention, name, None), int))
    return ValueProjection(attention.get_submodule(form.value), attention._num_value_heads, head_dim)  # type: ignore[arg-type]
