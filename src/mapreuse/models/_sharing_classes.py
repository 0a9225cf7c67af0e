"""The classes of attention modules under a plan, made from the classes that the modules have in `transformers`."""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from mapreuse.maps import Scores
from mapreuse.models._cache import OneLayer, cache_of, update_cache, values_of_encoder
from mapreuse.models._layout import LayerLayout
from mapreuse.models._normalising import Normalised
from mapreuse.models._reading import CACHES, AttentionForm
from mapreuse.models._runtime import (
    CROSS_MAPS_ARGUMENT,
    MAPS_ARGUMENT,
    LowRank,
    refuse_other_states,
    refuse_unknown,
    share,
)
from mapreuse.models._source import parameter_names

_MAPS = {MAPS_ARGUMENT, CROSS_MAPS_ARGUMENT}


class SharingAttention(nn.Module):
    """A mixin for the class of an attention module: what a plan changes.

    `sharing_class` makes the combined class. It has the name of the original class and derives from it, so that
    `transformers` still recognises its modules. `copy.deepcopy` and `pickle` can rebuild it.
    """

    _parameter_names: tuple[str, ...]
    _layout: LayerLayout
    _form: AttentionForm

    if TYPE_CHECKING:  # the attributes of the original class

        def __getattr__(self, name: str) -> Any: ...

    def _values(self, hidden_states: Tensor) -> Tensor:
        """(batch, positions, width) to (batch, value heads, positions, value_dim)."""
        values = getattr(self, self._form.value)(hidden_states)
        return values.unflatten(-1, (self._layout.num_value_heads, -1)).transpose(1, 2)

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by the names that they have in the original forward."""
        arguments = dict(zip(self._parameter_names[1:], args, strict=False)) | kwargs
        if self._form.states is None:
            refuse_other_states(self, arguments)
        return arguments

    def _cached(self, keys: Tensor | None, values: Tensor, arguments: dict[str, Any]) -> tuple[Any, Tensor]:
        """Keys and values of all positions, from those of the new ones and the cache of the call, if it has one."""
        cache = cache_of(arguments)
        return (keys, values) if cache is None else update_cache(self, cache, keys, values)

    def _reused(self, hidden_states: Tensor, arguments: dict[str, Any]) -> tuple[LowRank | None, Tensor]:
        """The low-rank queries and keys of share mode "corrected", or None, and the values, of all positions.

        Cross-attention projects the values of the encoder's states once for all steps with a cache.
        """
        if self._form.states is not None:
            states, cache = arguments[self._form.states], cache_of(arguments)
            return None, self._values(states) if cache is None else values_of_encoder(
                self, cache, self._values, states
            )
        query, key = (None, None) if self._layout.rank is None else self.correction(hidden_states)
        key, values = self._cached(key, self._values(hidden_states), arguments)
        return (None if query is None else (query, key)), values

    def _context(
        self,
        hidden_states: Tensor,
        values: Tensor,
        scores: Scores | None,
        arguments: dict[str, Any],
        low_rank: LowRank | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The context for these inputs, and the map of all heads if the caller asked for it."""
        dropout_p = 0.0
        if self.training and self._form.dropout is not None:
            dropout_p = attrgetter(self._form.dropout)(self)
        maps = arguments.get(MAPS_ARGUMENT if self._form.states is None else CROSS_MAPS_ARGUMENT)
        num_queries = hidden_states.shape[1]
        return share(self, maps, values, scores, num_queries=num_queries, dropout_p=dropout_p, low_rank=low_rank)

    def _share(
        self,
        hidden_states: Tensor,
        values: Tensor,
        scores: Scores | None,
        arguments: dict[str, Any],
        low_rank: LowRank | None = None,
    ) -> Any:
        """The output of the module for these inputs, with the map if the original forward returns one."""
        form = self._form
        context, weights = self._context(hidden_states, values, scores, arguments, low_rank)
        context = context.flatten(2)
        for name in form.output:
            context = getattr(self, name)(context)
        if form.output_dropout is not None:
            context = functional.dropout(context, getattr(self, form.output_dropout), self.training)
        return (context, weights) if form.returns_map else context


class ComputingAttention(SharingAttention):
    """An attention module whose heads compute their maps by `_project`, not by the original forward."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments = self._arguments(args, kwargs)
        refuse_unknown(self, {name: arguments[name] for name in arguments.keys() - self._parameter_names - _MAPS})
        scores, values = self._project(hidden_states, **arguments)
        return self._share(hidden_states, values, scores, arguments)

    def _project(self, hidden_states: Tensor, **arguments: Any) -> tuple[Scores, Tensor]:
        """The scores of the heads that compute, and the values of all heads."""
        raise NotImplementedError

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, positions, width) to (batch, computing heads, positions, dim)."""
        return projected.unflatten(-1, (len(self._layout.computing), -1)).transpose(1, 2)


class ReusingAttention(SharingAttention):
    """An attention module that has no queries and keys of the original, and applies the maps of earlier layers."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments = self._arguments(args, kwargs)
        low_rank, values = self._reused(hidden_states, arguments)
        return self._share(hidden_states, values, None, arguments, low_rank)


class PartlyComputingAttention(SharingAttention):
    """An attention module with the original forward in which some heads compute and others reuse."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(**self._with_one_layer(args, kwargs))

    def _with_one_layer(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, with the layer's part of the cache instead of the cache."""
        arguments = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        for name in CACHES:
            if arguments.get(name) is not None:
                arguments[name] = OneLayer(self, arguments[name])
        return arguments


class NormalisedAttention(PartlyComputingAttention):
    """An attention module that computes maps by its original forward, rewritten to call the attention interface."""

    _normalised: Normalised

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._layout.parts:
            return self._normalised.forward(self, **self._with_one_layer(args, kwargs))
        return self._normalised.forward(self, *args, **kwargs)


class DerivedReusing(ReusingAttention):
    """A reusing attention module that runs the parts of the original forward that need no queries and keys."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        derived, arguments = self._form.derived, self._arguments(args, kwargs)
        assert derived is not None
        for name in derived.required:
            if arguments.get(name) is None:
                raise ValueError(f"{type(self).__name__} reuses a map and cannot make {name}; call the whole model")
        low_rank, values = self._reused(hidden_states, arguments)
        context, weights = self._context(hidden_states, values, None, arguments, low_rank)
        return derived.output(self, context, weights, hidden_states, **arguments)

    def _values(self, hidden_states: Tensor) -> Tensor:
        if self._form.value:
            return super()._values(hidden_states)
        assert self._form.derived is not None
        return self._form.derived.values(self, hidden_states)


@functools.cache
def sharing_class(mixin: type[Any], base: type[Any]) -> type:
    """A class of the name of `base` with the methods of `mixin` before its own."""

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (mixin, base), self.__getstate__()

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce_ex,
        "_parameter_names": parameter_names(base),
        "_original_class": base,
    }
    return type(base.__name__, (mixin, base), names)


def _rebuild(mixin: type[Any], base: type[Any]) -> nn.Module:
    cls: Any = sharing_class(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)
