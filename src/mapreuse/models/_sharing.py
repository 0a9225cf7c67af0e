"""What a converted attention module does at run time: compute, hand on, apply."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mapreuse.maps import AttentionMap, HeadPairs, RecomputedMap, Scores, SharedMaps, as_index, attend, compute
from mapreuse.models._layout import LayerLayout
from mapreuse.models._reading import CACHES, AttentionForm
from mapreuse.models._source import parameter_names

_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)

ARGUMENT = "attention_maps"
"""The keyword argument in which the maps of a forward pass travel from layer to layer."""

BORNE = "_borne_maps"
"""The attribute in which a copy of an attention module, made for one call, holds the maps; see `MapInjection`."""

_OBSERVER = "_observer"
"""The attribute in which an attention module has its `_Observer`, while `observing_inputs`."""

IMPLEMENTATION = "mapreuse"
"""The name under which planned modules find `_attention_function` in `transformers`' attention interface."""

_INERT = {
    ARGUMENT,
    "is_causal",  # where the mask does not hold it, it is a parameter of the attention function
    "sliding_window",  # the mask holds it already
    "deterministic",
    "position_ids",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
    "cache_position",
    "output_attention_mask",
    "token_type_ids",
    "num_items_in_batch",  # of the loss
}


def share(
    module: nn.Module,
    maps: SharedMaps | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    scores: Scores | None,
    *,
    dropout_p: float = 0.0,
) -> tuple[Float[Tensor, "batch query heads value_dim"], Tensor | None]:
    """Context of one planned layer, from its own scores and from the maps of its sources.

    Where the caller of the pass wants to see maps, the whole map in effect comes with it, heads in original order.

    Args:
        module: the attention module; its `_layout` says which heads do what.
        maps: the maps of this forward pass.
        values: this layer's values.
        scores: scores of the heads that compute, or None where none does.
        dropout_p: attention dropout, drawn anew here for every map.
    """
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    maps = maps or vars(module).get(BORNE)
    if maps is None:
        raise ValueError(
            f"layer {layout.layer} of a model that reuses maps was called outside its stack; call the model whole"
        )
    observer: _Observer | None = vars(module).get(_OBSERVER)
    if observer is not None:
        values = observer.instead_of(values)
    contexts: list[Tensor] = []
    weights: list[Tensor] = []
    if scores is not None:
        scores = scores.to(values.dtype)  # under autocast, sums and rotations are of another type than projections
        computed, own = _compute(layout, maps, values, scores, dropout_p)
        contexts += computed
        if maps.output_attentions:
            weights += [attention_map.dense() for attention_map in own]
    for source, pairs in layout.parts:
        source_map = maps.read(source)
        if source_map is None:
            contexts.append(_dropped_context(module, layout, source, values, pairs))
        else:
            contexts.append(source_map.apply(values, _unless_one_to_one(pairs, values, source_map), dropout_p))
            if maps.output_attentions:
                weights.append(source_map.dense()[:, [pair[0] for pair in pairs]])
    for source in layout.releases:
        maps.release(source)
    context = (
        contexts[0] if len(contexts) == 1 else torch.cat([c.transpose(1, 2) for c in contexts], 2).transpose(1, 2)
    )
    in_order = None
    if maps.output_attentions and sum(w.shape[1] for w in weights) == layout.num_heads:
        slots = [layout.order.index(head) for head in range(layout.num_heads)]
        in_order = torch.cat(weights, 1)[:, slots]
    context = context.transpose(1, 2)
    if observer is not None:
        observer.found(context)
    return context, in_order


class _Observer:
    def __init__(self, found: Callable[[Tensor], None]) -> None:
        self.found = found
        self._inputs = torch.empty(0)

    def on_call(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        self._inputs = inputs if getattr(attention, "batch_first", True) else inputs.transpose(0, 1)

    def instead_of(self, values: Tensor) -> Tensor:
        return self._inputs[:, None].expand(-1, values.shape[1], -1, -1)


@contextmanager
def observing_inputs(
    attention: nn.Module, found: Callable[[Float[Tensor, "batch query heads width"]], None]
) -> Iterator[None]:
    """Meanwhile a planned attention applies its maps to its whole input, once for every head, as if that were its
    values, and gives what they make of it to `found`, heads in the order of its layout. What comes after the maps
    does not fit that: `found` has to end the pass."""
    observer = _Observer(found)
    handle = attention.register_forward_pre_hook(observer.on_call, with_kwargs=True)
    setattr(attention, _OBSERVER, observer)
    try:
        yield
    finally:
        handle.remove()
        delattr(attention, _OBSERVER)


def _compute(
    layout: LayerLayout, maps: SharedMaps, values: Tensor, scores: Scores, dropout_p: float
) -> tuple[list[Tensor], list[AttentionMap]]:
    """Contexts and maps of the heads that compute: of those that are handed on, and of the others."""
    own_values = values[:, as_index(layout.own_values)]
    contexts: list[Tensor] = []
    own: list[AttentionMap] = []
    published, others = slice(layout.published), slice(layout.published, layout.computing)
    if layout.published:
        some, some_values = (
            (scores, own_values)
            if layout.published == layout.computing
            else (scores.of_heads(published), own_values[:, published])
        )
        storage = maps.storage(some, some_values)
        if storage == "recompute" and some is not scores:
            some = scores.of_heads(list(range(layout.published)))  # a slice would keep those of all heads alive
        context, attention_map = compute(some, some_values, storage, dropout_p=dropout_p, buffer=maps.buffer(some))
        maps.publish(layout.layer, attention_map)
        contexts.append(context)
        own.append(attention_map)
    if layout.published < layout.computing:
        rest = scores.of_heads(others) if layout.published else scores
        contexts.append(attend(rest, own_values[:, others], keep=False, dropout_p=dropout_p)[0])
        own.append(RecomputedMap(rest))
    return contexts, own


def _unless_one_to_one(pairs: HeadPairs, values: Tensor, source_map: AttentionMap) -> HeadPairs | None:
    heads = source_map.num_heads
    one_to_one = len(pairs) == values.shape[1] == heads and all(pair == (i, i) for i, pair in enumerate(pairs))
    return None if one_to_one else pairs


def _dropped_context(module: nn.Module, layout: LayerLayout, source: int, values: Tensor, pairs: HeadPairs) -> Tensor:
    """LayerDrop skipped the source layer in this training step: its readers' heads attend nothing."""
    if not module.training:
        raise RuntimeError(f"layer {layout.layer} reuses layer {source}'s map, but layer {source} did not run")
    batch, _, num_queries, dim = values.shape
    return values.new_zeros(batch, len(pairs), num_queries, dim)


class SharingAttention(nn.Module):
    """Mixed into the class of an attention module: the parts of it that a plan changes.

    The class made by `sharing_class` keeps the name of the original one and derives from it, so that `transformers`
    recognises its modules, and remembers how to rebuild itself for `copy.deepcopy` and `pickle`.
    """

    _parameter_names: tuple[str, ...]
    _layout: LayerLayout
    _num_value_heads: int
    _form: AttentionForm

    if TYPE_CHECKING:  # the attributes of the class it is mixed into

        def __getattr__(self, name: str) -> Any: ...

    def _values(self, hidden_states: Tensor) -> Tensor:
        """(batch, positions, width) to (batch, value heads, positions, value_dim)."""
        values = getattr(self, self._form.value)(hidden_states)
        return values.unflatten(-1, (self._num_value_heads, -1)).transpose(1, 2)

    def _dropout_p(self) -> float:
        if not self.training or self._form.dropout is None:
            return 0.0
        return functools.reduce(getattr, self._form.dropout.split("."), self)  # type: ignore[return-value]

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the original forward gives them. Raises where one is refused."""
        arguments = dict(zip(self._parameter_names[1:], args, strict=False)) | kwargs
        refuse_cache(self, arguments)
        return arguments

    def _share(
        self, values: Tensor, scores: Scores | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = share(
            self,
            arguments.get(ARGUMENT),
            values,
            scores,
            dropout_p=self._dropout_p(),
        )
        context = context.flatten(2)
        for name in self._form.output:
            context = getattr(self, name)(context)
        if self._form.output_dropout is not None:
            context = functional.dropout(context, getattr(self, self._form.output_dropout), self.training)
        return context, weights


class ComputingAttention(SharingAttention):
    """An attention module that computes some heads with a projection of its own, not the original forward."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        arguments = self._arguments(args, kwargs)
        _refuse_unknown(self, {name: arguments[name] for name in arguments.keys() - self._parameter_names})
        scores, values = self._project(hidden_states, **arguments)
        return self._share(values, scores, arguments)

    def _project(self, hidden_states: Tensor, **arguments: Any) -> tuple[Scores, Tensor]:
        """Scores of the heads that compute, and values of all heads."""
        raise NotImplementedError

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, positions, width) to (batch, computing heads, positions, dim)."""
        return projected.unflatten(-1, (self._layout.computing, -1)).transpose(1, 2)


class ReusingAttention(SharingAttention):
    """An attention module that projects values only and applies maps of earlier layers."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        arguments = self._arguments(args, kwargs)
        return self._share(self._values(hidden_states), None, arguments)


def refuse_cache(module: nn.Module, arguments: dict[str, Any], allowed: str | None = None) -> None:
    """A model that reuses maps keeps no keys to cache, and a planned attention attends its own layer only."""
    for name in CACHES:
        if name != allowed and arguments.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} reuses attention maps, keeps no cache and attends its own layer only, so "
                f"it cannot take {name}: call it without, and with use_cache=False"
            )


def _refuse_unknown(module: nn.Module, arguments: dict[str, Any]) -> None:
    """What an attention function does not know may change the map."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in _INERT)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} was given {', '.join(unknown)}, which may change its attention map; "
            "a model that reuses maps takes no such argument"
        )


def _attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch key_heads key dim"],
    value: Float[Tensor, "batch value_heads key value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    attention_maps: SharedMaps | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query heads value_dim"], Tensor | None]:
    """The attention function that the original forward of a computing module calls.

    Masks mean what they mean to `transformers`' own `sdpa` and `eager`: boolean (True attends) or additive, and
    without a mask a module is causal if the argument, or else the module, says so.
    """
    _refuse_unknown(module, kwargs)
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    query = query[:, : layout.computing]
    key = key[:, as_index(layout.keys)]
    scores = make_scores(module, query, key, attention_mask, scaling, is_causal, position_bias)
    return share(
        module,
        attention_maps,
        value,
        scores,
        dropout_p=dropout,
    )


def make_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
) -> Scores:
    """Scores from what `transformers` hands to an attention function, understood as its `sdpa` and `eager` do."""
    mask, bias = mask_and_bias(module, attention_mask, position_bias)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    return Scores(
        query=query,
        key=key,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        bias=bias,
        is_causal=is_causal and attention_mask is None and query.shape[-2] > 1,
    )


def mask_and_bias(
    module: nn.Module, attention_mask: Tensor | None, position_bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """A boolean mask (True attends) and an additive bias, from a mask of either kind, for the heads that compute."""
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    own = layout.order[: layout.computing]
    position_bias = _of_heads(position_bias, own)
    if attention_mask is None:
        return None, position_bias
    if attention_mask.dim() != 4:
        raise ValueError(
            f"{type(module).__name__}: expected a mask of shape (batch, 1, query, key), got "
            f"{tuple(attention_mask.shape)}; load the model with attn_implementation='sdpa' or 'eager'"
        )
    attention_mask = _of_heads(attention_mask, own)
    if attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    # A row of −∞ only would have no softmax; the lowest finite number means the same elsewhere.
    bias = attention_mask.clamp(min=torch.finfo(attention_mask.dtype).min)
    return None, bias if position_bias is None else bias + position_bias


def _of_heads(tensor: _OptionalTensor, heads: tuple[int, ...]) -> _OptionalTensor:
    """Of what may differ from head to head, the part of some; as it is where it is the same for all of them."""
    return tensor if tensor is None or tensor.dim() < 4 or tensor.shape[1] == 1 else tensor[:, as_index(heads)]


AttentionInterface.register(IMPLEMENTATION, _attention_function)
# A name that the mask interface does not know gets no mask at all, and padding would be attended.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def dispatch_here(module: nn.Module) -> None:
    """Make one module call `_attention_function`, through a configuration of its own."""
    config: Any = copy.copy(module.config)
    config._attn_implementation_internal = IMPLEMENTATION  # the public setter would reach shared sub-configurations
    module.config = config


@functools.cache
def sharing_class(mixin: type[Any], base: type[Any]) -> type:
    """The class of `base`'s modules under a plan, with `mixin`'s methods before its own."""

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (mixin, base), self.__getstate__()

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce_ex,
        "_parameter_names": parameter_names(base),
    }
    return type(base.__name__, (mixin, base), names)


def _rebuild(mixin: type[Any], base: type[Any]) -> nn.Module:
    cls: Any = sharing_class(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)
