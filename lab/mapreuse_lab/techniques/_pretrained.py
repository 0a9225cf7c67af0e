"""Techniques on pretrained models: the attention interface of transformers, and the projections of each layer.

A pretrained model keeps its attention modules. A technique replaces the product between the projections

    context = attend(Q, K, V, mask)        with Q, K, V (batch, heads, positions, dim), rotary positions included

through `transformers.AttentionInterface`, or it replaces projections, or both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mapreuse.measure import use_attention
from mapreuse.models import check_model, find_stack

INTERFACE = "mapreuse_lab"
"""The name of the attention function in the attention interface."""

Role = Literal["query", "key", "value", "output"]

_PROJECTIONS: dict[Role, tuple[str, ...]] = {
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
    "output": ("o_proj",),
}
"""Names of projections in attention modules of transformers."""


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys, values and mask of one layer.

    Attributes:
        query, key, values: every head's; heads of keys and values that several queries share are repeated.
        valid: True for positions that are not padding, before any were merged; None if there is no padding.
        causal: no position may attend to later ones.
        scaling: factor of the scores.
        dropout_p: probability of attention dropout.
    """

    query: Float[Tensor, "batch heads positions dim"]
    key: Float[Tensor, "batch heads positions dim"]
    values: Float[Tensor, "batch heads positions dim"]
    valid: Bool[Tensor, "batch originals"] | None
    causal: bool
    scaling: float
    dropout_p: float = 0.0

    def mask(self) -> Bool[Tensor, "batch 1 #queries positions"] | None:
        """True where a query may attend to a key; None if every one may."""
        positions = self.query.shape[2]
        padding = None if self.valid is None else self.valid[:, None, None, :]
        if not self.causal:
            return padding
        earlier = torch.ones(1, 1, positions, positions, dtype=torch.bool, device=self.query.device).tril()
        return earlier if padding is None else earlier & padding


class AttentionLayer:
    """One layer of a pretrained stack: its attention module and the projections around it.

    Attributes:
        layer: the layer module.
        block: the module that holds the attention module: in BERT, attention with residual and norm; else the layer.
        attention: the module that calls the attention interface.
        index: index of the layer.
        num_heads, num_key_heads: heads of the queries, and of the keys and values.
        head_dim: dimension of a head.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, parent: nn.Module, index: int) -> None:
        self.layer, self.attention, self.block, self.index = layer, attention, parent, index
        self._holders: dict[Role, tuple[nn.Module, str]] = {}
        for role, names in _PROJECTIONS.items():
            found = [name for name in names if isinstance(attention._modules.get(name), nn.Linear)]
            if found:
                self._holders[role] = attention, found[0]
        output = parent._modules.get("output")
        if (
            "output" not in self._holders
            and output is not None
            and isinstance(output._modules.get("dense"), nn.Linear)
        ):
            self._holders["output"] = output, "dense"
        if missing := set(_PROJECTIONS) - set(self._holders):
            raise ValueError(
                f"{type(attention).__name__} has no projection {sorted(missing)[0]}; techniques convert models whose "
                "attention has q_proj, k_proj, v_proj and o_proj, or the names of BERT"
            )
        module: Any = attention
        self.head_dim = int(getattr(module, "head_dim", 0) or module.attention_head_size)
        self.num_heads = self.projection("query").out_features // self.head_dim
        self.num_key_heads = self.projection("key").out_features // self.head_dim

    def projection(self, role: Role) -> Any:
        """The projection of queries, keys, values or outputs."""
        holder, name = self._holders[role]
        return getattr(holder, name)

    def replace(self, role: Role, module: nn.Module) -> None:
        """Put `module` in the place of a projection."""
        holder, name = self._holders[role]
        setattr(holder, name, module)

    def remove(self, *roles: Role) -> None:
        """Put zeros in the place of projections; they cost nothing."""
        for role in roles:
            self.replace(role, NoProjection(self.projection(role).out_features))

    def use(self, core: nn.Module) -> None:
        """Compute the context by `core(inputs)`, with `AttentionInputs`, instead of full attention."""
        self.attention.add_module("compressed", core)


class PretrainedStack:
    """The layers of a pretrained encoder or decoder.

    Args:
        model: a module with one stack of layers.

    Attributes:
        module: the model.
        layers: its layers.
        causal: positions attend to earlier ones alone.

    Raises:
        ValueError: if the attention has no projections that techniques know.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.module = model
        found = find_stack(model).layers
        self.layers = [AttentionLayer(one.layer, one.attention, one.parent, i) for i, one in enumerate(found)]
        self.causal = any(bool(getattr(one.attention, "is_causal", False)) for one in self.layers)

    @property
    def num_heads(self) -> int:
        """Heads of the queries of a layer."""
        return self.layers[0].num_heads

    def use_interface(self) -> None:
        """Select the attention function of the lab, in place."""
        use_attention(self.module, INTERFACE)

    @torch.no_grad()
    def means(self, batches: list[dict[str, Tensor]], measure: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """The mean over batches of a measure of the recorded tensors, layer by layer; see `recorded`."""
        sums = [torch.stack([measure(one) for one in self.recorded(batch)]) for batch in batches]
        return torch.stack(sums).mean(0)

    def recorded(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Rows that pass through each layer on a batch, without padding, (rows, width).

        "input" and "states": of the layer; "attention": outputs of its output projection; "context": inputs of it;
        "query", "key", "value": outputs of these projections; "hidden": inputs of them.
        """
        found: list[dict[str, Tensor]] = [{} for _ in self.layers]
        rows = batch.get("attention_mask")
        with torch.no_grad(), _recording(self.layers, found):
            self.module(**batch)

        def without_padding(tensor: Tensor) -> Tensor:
            valid = rows is not None and rows.shape == tensor.shape[:2]
            return tensor[rows.bool()] if rows is not None and valid else tensor.flatten(0, 1)

        return [{name: without_padding(tensor) for name, tensor in one.items()} for one in found]


@contextmanager
def _recording(layers: list[AttentionLayer], found: list[dict[str, Tensor]]) -> Iterator[None]:
    handles = []
    for one, into in zip(layers, found, strict=True):

        def of_layer(module: Any, args: Any, kwargs: Any, output: Any, into: dict[str, Tensor] = into) -> None:
            into["input"] = args[0] if args else kwargs["hidden_states"]
            into["states"] = output[0] if isinstance(output, tuple) else output

        handles.append(one.layer.register_forward_hook(of_layer, with_kwargs=True))
        for role in _PROJECTIONS:

            def of_projection(
                module: Any, args: Any, output: Tensor, into: dict[str, Tensor] = into, role: Role = role
            ) -> None:
                names = ("context", "attention") if role == "output" else ("hidden", role)
                into |= dict(zip(names, (args[0], output), strict=True))

            handles.append(one.projection(role).register_forward_hook(of_projection))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class NoProjection(nn.Module):
    """Zeros instead of a projection: an expanded view, without memory or products."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(()).expand(*hidden_states.shape[:-1], self.out_features)


class Core(nn.Module):
    """Computes a layer's context by `technique.attend`.

    Args:
        technique: the technique.
        layer: the layer.
    """

    technique: Any

    def __init__(self, technique: Any, layer: AttentionLayer) -> None:
        super().__init__()
        self.technique = technique

    def forward(self, inputs: AttentionInputs) -> Float[Tensor, "batch heads positions dim"]:
        return self.technique.attend(inputs)


class LayerStore:
    """What layers of one forward pass share. It is emptied when the pass of `module` ends."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[int, Any] = {}
        module.register_forward_hook(self._empty)

    def _empty(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tensors.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStore:
        made = copy.copy(self)
        memo[id(self)] = made
        made.tensors = {}
        return made


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: (batch, positions, heads, dim). Other modules use its own `sdpa`."""
    core = module._modules.get("compressed")
    if core is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError("techniques have no cache of keys and values; call the model with use_cache=False")
    padding = int(getattr(module, "head_dim_padding", 0))  # Moonshine appends zeros, which not all techniques ignore
    if padding:
        query, key, value = (part[..., :-padding] for part in (query, key, value))
    if query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    # Rows of a mask differ by causality alone, and the last position may attend to all before it.
    valid = None if attention_mask is None else attention_mask[:, 0, -1]
    causal = bool(getattr(module, "is_causal", False))
    context = core(AttentionInputs(query, key, value, valid, causal, scaling, dropout))
    return functional.pad(context, (0, padding)).transpose(1, 2), None


AttentionInterface.register(INTERFACE, _attention)
AttentionMaskInterface.register(INTERFACE, sdpa_mask)
