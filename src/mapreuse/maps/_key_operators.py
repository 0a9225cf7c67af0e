"""The kernels of share mode "keys" as PyTorch operators: see `_operators`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import Library, register_autograd, register_fake
from torch.nn.functional import pad

from mapreuse.maps import _c_kernel
from mapreuse.maps._blocked import Block, blocked
from mapreuse.maps._gathered import gathered
from mapreuse.maps._operators import (
    DIFFERENTIABLE,
    NUM_SCORES,
    SCORES,
    arguments_of,
    attention_products,
    register_products,
    scores_of,
)
from mapreuse.maps._places import Places, is_near
from mapreuse.maps._scores import Scores

_PLACES = "Tensor first_key, Tensor first_query, Tensor positions"

_library = Library("mapreuse", "FRAGMENT")
_library.define(
    f"find_keys({SCORES}, {_PLACES}, int keys, int window, int block) -> (Tensor context, Tensor published)"
)
_library.define(f"attend_to_keys({SCORES}, {_PLACES}, Tensor published, int window, int block) -> Tensor context")


def find_keys(
    scores: Scores, values: Tensor, places: Places, keys: int, window: int, block: int
) -> tuple[Float[Tensor, "batch heads query value_dim"], Int[Tensor, "batch blocks keys"]]:
    """The context of a computing layer, and the heaviest keys of each block of queries. No gradients.

    The map is computed in blocks, and its weights are pooled over queries and heads; it is never stored.
    """
    operator = torch.ops.mapreuse.find_keys.default
    return operator(*arguments_of(scores, values), *_tensors(places), keys, window, block)


def attend_to_keys(
    scores: Scores, values: Tensor, published: Tensor, places: Places, window: int, block: int
) -> Float[Tensor, "batch heads query value_dim"]:
    """`gathered` as an operator with gradients."""
    operator = torch.ops.mapreuse.attend_to_keys.default
    return operator(*arguments_of(scores, values), *_tensors(places), published, window, block)


def _tensors(places: Places) -> tuple[Tensor, Tensor, Tensor]:
    return places.first_key, places.first_query, places.positions


def _find_keys(*arguments: Any) -> tuple[Tensor, Tensor]:
    (scores, values), (*tensors, keys, window, block) = scores_of(arguments), arguments[NUM_SCORES:]
    places = Places(*tensors)
    batch, _, num_queries, num_keys = scores.shape
    pooled = values.new_zeros(batch, -(-num_queries // block), num_keys)
    if num_queries == num_keys and _c_kernel.computes(scores, values):
        maxima = _c_kernel.Maxima(pooled, places.first_query, window, block)
        return _c_kernel.compute(scores, values, maxima=maxima), _largest(pooled, places, keys)

    def pooling(part: Block) -> Tensor:
        weights = part.compute_map()
        _pool(weights, part, places, window, block, pooled)
        return weights

    return blocked(scores, values, pooling), _largest(pooled, places, keys)


def _largest(
    pooled: Float[Tensor, "batch blocks keys"], places: Places, keys: int
) -> Int[Tensor, "batch blocks published"]:
    """The keys with the largest weights, without the first key. Numbers beyond the last key fill a short context."""
    pooled.scatter_(-1, places.first_key[:, None, None].expand(-1, pooled.shape[1], 1), 0.0)
    return pad(pooled, (0, max(0, keys - pooled.shape[-1])), value=-1.0).topk(keys).indices


def _pool(
    weights: Float[Tensor, "heads rows keys"], part: Block, places: Places, window: int, block: int, pooled: Tensor
) -> None:
    """Raise the maxima of each block of queries to the weights of a part of the map, without near keys."""
    first_query = int(places.first_query[part.item])
    start, stop = max(part.rows.start, first_query), part.rows.stop
    positions, first_key = places.positions[part.item, part.rows], places.first_key[part.item]
    from_key, to_key = (max(0, int(end)) for end in (positions.min() - window + 1, positions.max() + window))
    near = slice(from_key, min(to_key, part.keys))
    numbers = torch.arange(part.keys, device=weights.device)[near]
    is_far = ~is_near(numbers, positions[:, None], first_key, window)
    number = (start - first_query) // block
    while start < stop:
        end = min(stop, first_query + (number + 1) * block)
        rows = slice(start - part.rows.start, end - part.rows.start)
        maxima = weights[:, rows].amax((0, 1))
        maxima[near] = (weights[:, rows, near] * is_far[rows]).amax((0, 1))
        of_block = pooled[part.item, number, : part.keys]
        torch.maximum(of_block, maxima, out=of_block)
        start, number = end, number + 1


def _attend_to_keys(*arguments: Any) -> Tensor:
    (scores, values), (*tensors, published, window, block) = scores_of(arguments), arguments[NUM_SCORES:]
    return gathered(scores, values, published, Places(*tensors), window, block)


for _name, _implementation in {"find_keys": _find_keys, "attend_to_keys": _attend_to_keys}.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@register_fake("mapreuse::find_keys", lib=_library)
def _(query: Tensor, key: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    keys, _, block = rest[-3:]
    batch, _, num_queries, _ = query.shape
    published = query.new_empty(batch, (num_queries + block - 1) // block, keys, dtype=torch.int64)
    return _context(query, values), published


@register_fake("mapreuse::attend_to_keys", lib=_library)
def _(query: Tensor, key: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return _context(query, values)


def _context(query: Tensor, values: Tensor) -> Tensor:
    batch, heads, num_queries, _ = query.shape
    return values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = [argument is None or isinstance(argument, Tensor) for argument in inputs]
    ctx.others = [argument for argument in inputs if not (argument is None or isinstance(argument, Tensor))]
    ctx.save_for_backward(*(argument for argument in inputs if argument is None or isinstance(argument, Tensor)))


def _backward(ctx: Any, d_context: Tensor) -> tuple[Any, ...]:
    """By the derivatives of `gathered`, which runs once more."""
    tensors, others, create_graph = iter(ctx.saved_tensors), iter(ctx.others), torch.is_grad_enabled()
    inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
    needed = [index for index in DIFFERENTIABLE if ctx.needs_input_grad[index]]
    with torch.enable_grad():
        for index in needed:
            inputs[index] = inputs[index].view_as(inputs[index])
        context = _attend_to_keys(*inputs)
    gradients = torch.autograd.grad(
        context, [inputs[index] for index in needed], d_context, create_graph=create_graph
    )
    found = dict(zip(needed, gradients, strict=True))
    return tuple(found.get(index) for index in range(len(inputs)))


register_autograd("mapreuse::attend_to_keys", _backward, setup_context=_save, lib=_library)


def _attend_products(query: Any, key: Any, values: Any, *others: Any) -> dict[str, int]:
    """Each query is multiplied by the keys that its block gathers, also by those that it does not attend to."""
    *_, published, window, block = others
    batch, heads, rows, dim = query
    after = 0 if others[3] or rows != key[2] else window - 1
    gathered_keys = 1 + published[2] + window - 1 + block + after
    pairs = 2 * batch * heads * published[1] * block * gathered_keys
    return {"scores": pairs * dim, "context": pairs * values[3]}


register_products(torch.ops.mapreuse.find_keys.default, attention_products)
register_products(torch.ops.mapreuse.attend_to_keys.default, _attend_products)
