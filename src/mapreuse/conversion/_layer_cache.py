"""Inputs and outputs of a model's layers on calibration batches, without running layers twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mapreuse.maps import SharedScores
from mapreuse.models import (
    Layer,
    find_stack,
    inputs_of,
    keeping_maps,
    not_padding,
    observing_inputs,
    output_projection,
    plan_of,
    published_scores,
    recorded_states,
)

_MAX_BYTES = 2**28
"""Maximum size of the outputs in a cache."""


class LayerCache:
    """Inputs and outputs of single layers, batch by batch; the outputs of earlier layers are cached.

    A forward pass for layer l ends at layer l. Earlier layers return their cached output instead of running, or run
    up to their map if a layer that runs applies it. Layers whose output does not fit in the cache run every time.
    Layers before l must keep their weights from one pass to the next. Layers pass on their output and their map only.

    Args:
        model: in evaluation mode.
        batches: calibration batches.
        attention: "self" or "cross", as for `apply`.
        original: a cache of the original model over the same batches. Its entries are used up to the first reusing
            layer. Both models must have the same weights there.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        attention: str = "self",
        original: LayerCache | None = None,
    ) -> None:
        stack = find_stack(model, attention)
        self.layers, self._attention = stack.layers, attention
        self._model, self._batches, self._original = model, batches, original
        found = {kind: plan_of(stack.module, kind) for kind in ("self", "cross")}
        self._plans = [plan for plan in found.values() if plan is not None]
        self._last_maps = find_stack(stack.module, "cross").layers if found["cross"] else self.layers
        reusing = (layer for plan in self._plans for layer in range(plan.num_layers) if plan.reuses(layer))
        self._num_equal = min(reusing, default=len(self.layers))
        self._outputs, self._bytes_left = dict[tuple[int, int], Any](), _MAX_BYTES

    @torch.no_grad()
    def valid(self, number: int) -> Bool[Tensor, "batch positions"]:
        """True for positions of a batch that are not padding."""
        first = self.layers[0].layer
        recorded = recorded_states(self._model, self._attention)
        with recorded as (states, masks), first.register_forward_hook(_stop), suppress(_Done):
            self._model(**self._batches[number])
        return not_padding(masks[0], states[0])

    @torch.no_grad()
    def context(
        self, index: int, number: int, *, of_whole_inputs: bool = False
    ) -> tuple[Float[Tensor, "batch positions inputs"], Float[Tensor, "batch positions width"]]:
        """The input of a layer's output projection, and the input of the layer.

        With `of_whole_inputs`, the former is replaced by A_h X for every head h, with X the input of the attention.
        """
        layer, seen = self.layers[index], dict[str, Tensor]()

        def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            seen["inputs"] = inputs if getattr(layer.attention, "batch_first", True) else inputs.transpose(0, 1)

        def on_context(context: Tensor) -> None:
            seen["context"] = context.flatten(2)
            raise _Done

        with ExitStack() as hooks:
            hooks.enter_context(self._skipping(index, number))
            hooks.callback(layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True).remove)
            if of_whole_inputs:
                hooks.enter_context(observing_inputs(layer.attention, on_context))
            else:
                projection = output_projection(layer)
                hooks.callback(projection.register_forward_pre_hook(lambda _, args: on_context(args[0])).remove)
            with suppress(_Done):
                self._model(**self._batches[number])
        return seen["context"], seen["inputs"]

    @torch.no_grad()
    def source_scores(self, index: int, number: int) -> tuple[Float[Tensor, "batch positions width"], SharedScores]:
        """The input of the attention of a layer of share mode "corrected", and the scores of its source."""
        attention, seen = self.layers[index].attention, list[Any]()

        def on_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.extend((inputs_of(module, args, kwargs), published_scores(module, kwargs)))
            raise _Done

        hook = attention.register_forward_pre_hook(on_attention, with_kwargs=True)
        with self._skipping(index, number), hook, suppress(_Done):
            self._model(**self._batches[number])
        return seen[0], seen[1]

    @torch.no_grad()
    def outputs(
        self, index: int, number: int, changes: Sequence[Callable[[], None]] = (lambda: None,)
    ) -> list[Float[Tensor, "batch positions width"]]:
        """The output of a layer after each of these changes of its weights, from one forward pass."""
        layer = self.layers[index]

        def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            handle.remove()
            for change in changes:
                change()
                # A layer may change its input in place.
                given, named = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
                module(*given, **named)
            raise _Done

        with ExitStack() as hooks:
            hooks.enter_context(self._skipping(index, number))
            states, _ = hooks.enter_context(recorded_states(self._model, self._attention))
            hooks.enter_context(keeping_maps(layer))
            handle = layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True, prepend=True)
            with handle, suppress(_Done):
                self._model(**self._batches[number])
        return states[index:]

    @contextmanager
    def _skipping(self, index: int, number: int) -> Iterator[None]:
        """Earlier layers return their cached output. If a layer has none, it runs, and its output is cached."""
        outputs = [self._cached(before, number) for before in range(index)]
        sources = self._sources_of([*(before for before, output in enumerate(outputs) if output is None), index])
        with ExitStack() as hooks:
            for before, output in enumerate(outputs):
                module = self.layers[before].layer
                if output is None:
                    store = functools.partial(self._store, before, number)
                    # First, because the hooks after it run again on the cached output.
                    hooks.enter_context(module.register_forward_hook(store, prepend=True))
                else:
                    hooks.enter_context(_returning(self._last_maps[before], output, with_map=before in sources))
            yield

    def _sources_of(self, layers: list[int]) -> set[int]:
        """The source layers of these layers, directly or through other layers."""
        found, left = set[int](), layers
        while left:
            layer = left.pop()
            sources = {source for plan in self._plans for source in plan.sources(layer)} - found
            found |= sources
            left += sources
        return found

    def _cached(self, index: int, number: int) -> Any:
        output = self._outputs.get((index, number))
        if output is None and self._original is not None and index < self._num_equal:
            return self._original._cached(index, number)
        return output

    def _store(self, index: int, number: int, module: nn.Module, args: tuple, output: Any) -> None:
        size = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._outputs[index, number] = tree_map_only(Tensor, Tensor.clone, output)


@contextmanager
def in_evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode, and restore the mode of each module at the end."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Done(Exception):
    """Ends a forward pass early."""


def _stop(*_: object) -> None:
    raise _Done


@contextmanager
def _returning(layer: Layer, output: Any, *, with_map: bool) -> Iterator[None]:
    """A layer's forward returns a copy of `output` without running, or after running up to its maps."""
    module = called = layer.layer
    own = vars(module).get("forward")

    def on_call(one: nn.Module, args: tuple) -> None:
        nonlocal called
        called = one  # may be a copy of the module, for layers with injected maps

    @functools.wraps(module.forward)  # transformers reads its signature
    def instead(*args: Any, **kwargs: Any) -> Any:
        if with_map:
            forward = functools.partial(type(called).forward, called) if own is None else own
            with layer.attention.register_forward_hook(_stop), suppress(_Done):
                forward(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.clone, output)

    module.forward = instead
    try:
        with module.register_forward_pre_hook(on_call):
            yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
