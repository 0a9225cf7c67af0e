"""Passes of a model over calibration batches, each as far as one of its layers, that skip what is known already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mapreuse.models import Layer, find_stack, not_padding, observing_inputs, output_projection, recorded_states
from mapreuse.plan import ReusePlan

_KEPT_BYTES = 2**28
"""Of what layers put out."""


class Passes:
    """What reaches a layer of a model, and what it puts out, batch by batch.

    What layers put out is kept, and where a pass meets them again they put out the same without running; those whose
    maps are applied by layers that do run do so as far as their maps. So the layers before the one that a pass is for
    must be as they were in earlier passes; it may change, and so may those after it. A layer hands on nothing but its
    output and its map. Where there is more than is kept, the rest runs every time.

    Args:
        model: in evaluation mode.
        batches: calibration batches.
        plan: the plan in force, if there is one.
        original: passes, over the same batches, of the original, whose weights this model has up to the first layer
            that reuses: what layers before that one put out there counts here too.
        kept_bytes: how much of what layers put out is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        plan: ReusePlan | None = None,
        original: Passes | None = None,
        *,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self.layers = find_stack(model).layers
        self._model, self._batches, self._plan, self._original = model, batches, plan, original
        self._alike = 0 if plan is None else next(filter(plan.reuses, range(plan.num_layers)), plan.num_layers)
        self._kept, self._left = dict[tuple[int, int], Any](), kept_bytes

    @torch.no_grad()
    def valid(self, number: int) -> Bool[Tensor, "batch positions"]:
        """Which positions of a batch are not padding."""
        first = self.layers[0].layer
        with recorded_states(self._model) as (states, masks), first.register_forward_hook(_stop), suppress(_Seen):
            self._model(**self._batches[number])
        return not_padding(masks[0], states[0])

    @torch.no_grad()
    def context(
        self, index: int, number: int, *, of_whole_inputs: bool = False
    ) -> tuple[Float[Tensor, "batch positions inputs"], Float[Tensor, "batch positions width"]]:
        """What reaches a layer's output projection, and the input of the layer; instead of the former, what the
        layer's maps make of the whole input of its attention, if `of_whole_inputs`."""
        layer, seen = self.layers[index], dict[str, Tensor]()

        def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            seen["inputs"] = inputs if getattr(layer.attention, "batch_first", True) else inputs.transpose(0, 1)

        def on_context(context: Tensor) -> None:
            seen["context"] = context.flatten(2)
            raise _Seen

        with ExitStack() as hooks:
            hooks.enter_context(self._skipping(index, number))
            hooks.callback(layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True).remove)
            if of_whole_inputs:
                hooks.enter_context(observing_inputs(layer.attention, on_context))
            else:
                projection = output_projection(layer)
                hooks.callback(projection.register_forward_pre_hook(lambda _, args: on_context(args[0])).remove)
            with suppress(_Seen):
                self._model(**self._batches[number])
        return seen["context"], seen["inputs"]

    @torch.no_grad()
    def outputs(
        self, index: int, number: int, changes: Sequence[Callable[[], None]] = (lambda: None,)
    ) -> list[Float[Tensor, "batch positions width"]]:
        """What a layer puts out after each of these changes of its weights, in one pass that ends with it; a layer
        may change its input in place."""
        layer = self.layers[index]

        def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            handle.remove()
            for change in changes:
                change()
                given, named = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
                module(*given, **named)
            raise _Seen

        with ExitStack() as meanwhile:
            meanwhile.enter_context(self._skipping(index, number))
            states, _ = meanwhile.enter_context(recorded_states(self._model))
            meanwhile.enter_context(_maps_kept(layer.attention))
            handle = layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True, prepend=True)
            with handle, suppress(_Seen):
                self._model(**self._batches[number])
        return states[index:]

    @contextmanager
    def _skipping(self, index: int, number: int) -> Iterator[None]:
        """Meanwhile layers before this one put out what is known of them, or what they put out is kept."""
        outputs = [self._known(before, number) for before in range(index)]
        applied = self._applied_by([*(before for before, known in enumerate(outputs) if known is None), index])
        with ExitStack() as meanwhile:
            for before, known in enumerate(outputs):
                module = self.layers[before].layer
                if known is None:
                    keep = functools.partial(self._keep, before, number)  # before other hooks, which will run again
                    meanwhile.enter_context(module.register_forward_hook(keep, prepend=True))
                else:
                    meanwhile.enter_context(_putting_out(self.layers[before], known, with_map=before in applied))
            yield

    def _applied_by(self, layers: list[int]) -> set[int]:
        """Layers whose maps these apply, and those whose maps they apply in turn."""
        found, left = set[int](), layers
        while self._plan is not None and left:
            sources = set(self._plan.sources(left.pop())) - found
            found |= sources
            left += sources
        return found

    def _known(self, index: int, number: int) -> Any:
        """What a layer put out, or None."""
        known = self._kept.get((index, number))
        if known is None and self._original is not None and index < self._alike:
            return self._original._known(index, number)
        return known

    def _keep(self, index: int, number: int, module: nn.Module, args: tuple, output: Any) -> None:
        size = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if size <= self._left:
            self._left -= size
            self._kept[index, number] = tree_map_only(Tensor, Tensor.clone, output)


class _Seen(Exception):
    """What was looked for has been made; the rest of the forward pass is not needed."""


def _stop(*_: object) -> None:
    raise _Seen


@contextmanager
def _putting_out(layer: Layer, output: Any, *, with_map: bool) -> Iterator[None]:
    """Meanwhile this is what the layer's forward gives, without running, or once it has handed on its map; what comes
    after may change it in place."""
    module = called = layer.layer
    own = vars(module).get("forward")

    def on_call(one: nn.Module, args: tuple) -> None:
        nonlocal called
        called = one  # a copy of the module, where that bears the maps

    @functools.wraps(module.forward)  # its signature is read from it
    def instead(*args: Any, **kwargs: Any) -> Any:
        if with_map:
            forward = functools.partial(type(called).forward, called) if own is None else own
            with layer.attention.register_forward_hook(_stop), suppress(_Seen):
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


@contextmanager
def _maps_kept(attention: Any) -> Iterator[None]:
    """Meanwhile a planned attention lets go of no map, so that it can apply the same again."""
    layout = vars(attention).get("_layout")
    if layout is not None:
        attention._layout = replace(layout, releases=())
    try:
        yield
    finally:
        if layout is not None:
            attention._layout = layout
