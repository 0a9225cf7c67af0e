"""What a layer is given, and puts out, in passes of calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mapreuse.convert._batches import calibration_batches
from mapreuse.models import (
    Layer,
    copy_with_same_weights,
    find_stack,
    not_padding,
    observing_inputs,
    output_projection,
    recorded_states,
    tune,
    with_projections,
)

_HELD_OUT = 4
"""Every fourth batch chooses between the candidates instead of fitting them."""

_FEWEST_POSITIONS = 8
"""Of which fewer choose between candidates by chance."""


class Wanted:
    """What the original makes of calibration batches in each layer, where there is no padding.

    Args:
        original: the model as it was before its conversion.
        batches: calibration batches, at least four; every fourth is held out.
        kept_bytes: how much of it is kept, once found, for refits to come.

    Raises:
        ValueError: where there are too few batches or positions.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Mapping[str, Any]], *, kept_bytes: int = 0) -> None:
        self.batches = calibration_batches(batches, _HELD_OUT, "fit")
        self._model = copy_with_same_weights(with_projections(original)).eval()
        tune(self._model)
        self.valid = [_valid(self._model, batch) for batch in self.batches]
        self._left, self._kept = kept_bytes, dict[tuple[str, int, int], tuple[Tensor, ...]]()
        fitting, judging = (
            sum(int(rows.sum()) for number, rows in enumerate(self.valid) if is_held_out(number) == held_out)
            for held_out in (False, True)
        )
        if min(fitting, judging) < _FEWEST_POSITIONS:
            raise ValueError(
                f"fit needs at least {_FEWEST_POSITIONS} positions that are not padding in every fourth batch "
                f"together, which are held out, and as many in the others: got {judging} and {fitting}; give more or "
                "longer samples"
            )

    def attention(self, index: int, number: int) -> tuple[Tensor, ...]:
        """Of a batch, the output of a layer's attention, and the input of the layer."""

        @torch.no_grad()
        def find() -> tuple[Tensor, ...]:
            layer, rows = find_stack(self._model).layers[index], self.valid[number]
            projection = output_projection(layer)
            context, inputs = until(projection, self._model, layer, self.batches[number])
            return projection(context[rows]), inputs[rows]

        return self._once(("attention", index, number), find)

    def output(self, index: int, number: int) -> Tensor:
        """Of a batch, the output of a layer."""

        def find() -> tuple[Tensor, ...]:
            return (outputs(self._model, index, self.batches[number])[0][self.valid[number]],)

        (output,) = self._once(("output", index, number), find)
        return output

    def _once(self, key: tuple[str, int, int], find: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        found = self._kept.get(key) or find()
        size = sum(tensor.nbytes for tensor in found)
        if key not in self._kept and size <= self._left:
            self._left -= size
            self._kept[key] = found
        return found


def is_held_out(number: int) -> bool:
    """Whether this batch chooses between the candidates."""
    return number % _HELD_OUT == _HELD_OUT - 1


class _Seen(Exception):
    """What was looked for has been made; the rest of the forward pass is not needed."""


@torch.no_grad()
def outputs(
    model: nn.Module, index: int, batch: Mapping[str, Any], changes: Sequence[Callable[[], None]] = (lambda: None,)
) -> list[Float[Tensor, "batch positions width"]]:
    """What a layer puts out after each of these changes of its weights, in a pass that ends with it.

    What comes before the layer is the same for all of them, and runs once; a layer may change its input in place.
    """
    layer = find_stack(model).layers[index]
    attention: Any = layer.attention

    def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handle.remove()
        for change in changes:
            change()
            given, named = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            module(*given, **named)
        raise _Seen

    with recorded_states(model) as (states, _), suppress(_Seen), _maps_kept(attention):
        handle = layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True, prepend=True)
        with handle:
            model(**batch)
    return states[index:]


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


@torch.no_grad()
def _valid(model: nn.Module, batch: Mapping[str, Any]) -> Bool[Tensor, "batch positions"]:
    """Which positions of a batch are not padding."""
    with recorded_states(model) as (states, masks):
        handle = find_stack(model).layers[0].layer.register_forward_hook(_stop)
        with handle, suppress(_Seen):
            model(**batch)
    return not_padding(masks[0], states[0])


def _stop(module: nn.Module, args: tuple, output: Any) -> None:
    raise _Seen


@torch.no_grad()
def until(
    projection: nn.Module, model: nn.Module, layer: Layer, batch: Mapping[str, Any], *, whole_inputs: bool = False
) -> tuple[Float[Tensor, "batch positions inputs"], Float[Tensor, "batch positions width"]]:
    """What reaches an output projection, and the input of its layer; instead of the former, what the layer's maps
    make of the whole input of its attention, if `whole_inputs`."""
    seen: dict[str, Tensor] = {}

    def on_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen["inputs"] = inputs if getattr(layer.attention, "batch_first", True) else inputs.transpose(0, 1)

    def on_context(context: Tensor) -> None:
        seen["context"] = context.flatten(2)
        raise _Seen

    with ExitStack() as hooks:
        hooks.callback(layer.layer.register_forward_pre_hook(on_layer, with_kwargs=True).remove)
        if whole_inputs:
            hooks.enter_context(observing_inputs(layer.attention, on_context))
        else:
            hooks.callback(projection.register_forward_pre_hook(lambda _, args: on_context(args[0])).remove)
        with suppress(_Seen):
            model(**batch)
    return seen["context"], seen["inputs"]
