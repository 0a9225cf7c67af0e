"""The kernels as PyTorch operators, `torch.ops.mapreuse.…`.

Compilers, dispatch modes and profilers see them, autograd differentiates them, and `FlopCounterMode` counts them.
Lengths without padding are computed inside an operator, from its mask, so no recorded pass depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake
from torch.nn import Parameter
from torch.utils.flop_counter import flop_registry, register_flop_formula

from mapreuse.maps import _c_kernel
from mapreuse.maps._blocked import (
    applied_in_blocks,
    blocked,
    blocked_gradients,
    compressing,
    dropout_factors,
    keeping,
)
from mapreuse.maps._scores import RelativePositions, Scores
from mapreuse.maps._softmax import BlockDropout, softmax

SCORES = (
    "Tensor query, Tensor key, Tensor values, float scaling, Tensor? mask, Tensor? bias, bool is_causal, "
    "Tensor? relative_query, Tensor? relative_key"
)
NUM_SCORES = SCORES.count(",") + 1
DIFFERENTIABLE = (0, 1, 2, 5, 7, 8)
"""Positions of the arguments in `SCORES` that have gradients."""

_library = Library("mapreuse", "DEF")
_library.define(
    f"attention({SCORES}, bool keep, float dropout_p, Tensor? seed) -> (Tensor context, Tensor lengths, Tensor map)"
)
_library.define(
    f"attention_backward({SCORES}, Tensor? map, float dropout_p, Tensor? seed, Tensor d_context, Tensor? d_map) "
    "-> Tensor[]"
)
_library.define(
    f"store_attention({SCORES}, float dropout_p, Tensor? seed, Tensor(a!) map, Tensor(b!)? scales) "
    "-> (Tensor context, Tensor lengths)"
)
_library.define(
    "apply_map(Tensor map, Tensor? scales, Tensor values, Tensor lengths, int[] map_heads, int[] value_heads) "
    "-> Tensor context"
)


_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_operators() -> Iterator[None]:
    """Compute attention by PyTorch's own operators inside this context."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def needs_plain_operators(*tensors: Tensor) -> bool:
    """Whether an attention must consist of PyTorch's own operators.

    It must if it is recorded for use without `mapreuse` (`torch.export`, `torch.jit.trace`), transformed
    (`torch.func`, forward-mode gradients), given tensor subclasses, or run inside `plain_operators`. Everything else
    that observes or records a pass sees the operators of this module.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        _plain.get()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(type(tensor) not in (Tensor, Parameter) for tensor in tensors)
    )


def is_plain(scores: Scores, values: Tensor) -> bool:
    """Whether PyTorch's own operators compute this attention."""
    return scores.beyond_kernels or needs_plain_operators(values, *scores.factors)


def attention(
    scores: Scores, values: Tensor, *, keep: bool, dropout_p: float
) -> tuple[Float[Tensor, "batch heads query value_dim"], Tensor | None, Int[Tensor, "batch 2"]]:
    """The context, the map if `keep`, and the valid lengths of each item, with gradients."""
    operator = torch.ops.mapreuse.attention.default
    context, lengths, weights = operator(*arguments_of(scores, values), keep, dropout_p, _seed(dropout_p))
    return context, weights if keep else None, lengths


def store_attention(
    scores: Scores, values: Tensor, weights: Tensor, scales: Tensor | None, *, dropout_p: float
) -> tuple[Float[Tensor, "batch heads query value_dim"], Int[Tensor, "batch 2"]]:
    """The context and the valid lengths; the map is written to `weights` and `scales`. No gradients."""
    operator = torch.ops.mapreuse.store_attention.default
    return operator(*arguments_of(scores, values), dropout_p, _seed(dropout_p), weights, scales)


def apply_map(
    weights: Tensor,
    scales: Tensor | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    lengths: Int[Tensor, "batch 2"],
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch heads query value_dim"]:
    """The context of a reusing layer: see `AttentionMap.apply`."""
    map_heads, value_heads = [pair[0] for pair in heads], [pair[1] for pair in heads]
    return torch.ops.mapreuse.apply_map.default(weights, scales, values, lengths, map_heads, value_heads)


def products_of(operator: Any, arguments: Sequence[Any]) -> dict[str, int] | None:
    """FLOPs of each matrix product of an operator of this module, from its arguments; None for other operators.

        scores = 2·B·H·Tq·Tk·d,    positional_scores = 2·B·H·Tq·Tk·d,    context = 2·B·H·Tq·Tk·d_v

    As in PyTorch's formulas, padding and masked keys count. Distances that no pair of positions has do not count.
    """
    formula = _PRODUCTS.get(operator)
    return None if formula is None else formula(*(_shape(argument) for argument in arguments))


def attention_products(query: Any, key: Any, values: Any, *others: Any) -> dict[str, int]:
    batch, heads, rows, dim = query
    pairs = 2 * batch * heads * rows * key[2]
    positions = {} if others[NUM_SCORES - 5] is None else {"positional_scores": pairs * dim}
    return {"scores": pairs * dim, **positions, "context": pairs * values[3]}


def _backward_products(*arguments: Any) -> dict[str, int]:
    """Two products for each one of the forward pass; without the map, its scores once more."""
    forward = attention_products(*arguments)
    again = arguments[NUM_SCORES] is None
    return {name: flops * (2 + (again and name != "context")) for name, flops in forward.items()}


def _apply_products(weights: Any, scales: Any, values: Any, lengths: Any, heads: Any, *rest: Any) -> dict[str, int]:
    return {"context": 2 * weights[0] * len(heads) * weights[2] * weights[3] * values[3]}


_PRODUCTS: dict[Any, Callable[..., dict[str, int]]] = {
    torch.ops.mapreuse.attention.default: attention_products,
    torch.ops.mapreuse.attention_backward.default: _backward_products,
    torch.ops.mapreuse.store_attention.default: attention_products,
    torch.ops.mapreuse.apply_map.default: _apply_products,
}


def _shape(argument: Any) -> Any:
    return argument.shape if isinstance(argument, Tensor) else argument


def register_products(overload: Any, products: Callable[..., dict[str, int]]) -> None:
    """Register the FLOPs of an operator, by product, from the shapes of its arguments."""

    def formula(*arguments: Any, out_val: Any = None, **_: Any) -> int:
        return sum(products(*map(_shape, arguments)).values())

    _PRODUCTS[overload] = products
    register_flop_formula(overload.overloadpacket, get_raw=True)(formula)


def _register_flops() -> None:
    for overload, products in list(_PRODUCTS.items()):
        register_products(overload, products)
    for suffix in ("", "_backward"):
        # `FlopCounterMode` counts fused attention on GPUs, but not on CPUs.
        name = "_scaled_dot_product_flash_attention"
        on_gpu, on_cpu = (getattr(torch.ops.aten, f"{name}{device}{suffix}") for device in ("", "_for_cpu"))
        flop_registry.setdefault(on_cpu, flop_registry[on_gpu])


_register_flops()


def arguments_of(scores: Scores, values: Tensor) -> tuple[Any, ...]:
    """Scores and values as the arguments in `SCORES`."""
    relative = scores.relative
    positions = (None, None) if relative is None else (relative.query, relative.key)
    return scores.query, scores.key, values, scores.scaling, scores.mask, scores.bias, scores.is_causal, *positions


def scores_of(arguments: Sequence[Any]) -> tuple[Scores, Tensor]:
    """Scores and values of the arguments in `SCORES`."""
    query, key, values, scaling, mask, bias, is_causal, relative_query, relative_key = arguments[:NUM_SCORES]
    relative = None if relative_query is None else RelativePositions(relative_query, relative_key)
    return Scores(query, key, scaling, mask=mask, bias=bias, is_causal=is_causal, relative=relative), values


def _seed(dropout_p: float) -> Tensor | None:
    return torch.randint(2**62, (), device="cpu") if dropout_p > 0.0 else None


def _dropout(dropout_p: float, seed: Tensor | None) -> BlockDropout | None:
    return None if seed is None else BlockDropout(dropout_p, int(seed))


def _lengths(scores: Scores) -> Int[Tensor, "batch 2"]:
    return torch.tensor(scores.valid_lengths, dtype=torch.int64, device="cpu").view(-1, 2)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (scores, values), (keep, dropout_p, seed) = scores_of(arguments), arguments[NUM_SCORES:]
    weights = values.new_empty(scores.shape if keep else 0)
    if not keep and dropout_p == 0.0 and _c_kernel.computes(scores, values):
        return _c_kernel.compute(scores, values), _lengths(scores), weights
    if keep:
        context = _store(scores, values, _dropout(dropout_p, seed), weights, None)
    else:
        context = blocked(scores, values, lambda block: block.compute_map(), _dropout(dropout_p, seed))
    return context, _lengths(scores), weights


def _store_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    (scores, values), (dropout_p, seed, weights, scales) = scores_of(arguments), arguments[NUM_SCORES:]
    return _store(scores, values, _dropout(dropout_p, seed), weights, scales), _lengths(scores)


def _store(
    scores: Scores, values: Tensor, dropout: BlockDropout | None, weights: Tensor, scales: Tensor | None
) -> Tensor:
    _c_kernel.use_large_pages(weights)
    if dropout is None and _c_kernel.computes(scores, values):
        return _c_kernel.compute(scores, values, weights, scales)
    map_of = keeping(scores, weights) if scales is None else compressing(scores, weights, scales)
    return blocked(scores, values, map_of, dropout)


def _attention_backward(*arguments: Any) -> list[Tensor]:
    scores, values = scores_of(arguments)
    weights, dropout_p, seed, d_context, d_map = arguments[NUM_SCORES:]
    with torch.autocast(values.device.type, enabled=False):
        return blocked_gradients(scores, values, weights, _dropout(dropout_p, seed), d_context, d_map)


def _apply_map(
    weights: Tensor,
    scales: Tensor | None,
    values: Tensor,
    lengths: Tensor,
    map_heads: Sequence[int],
    value_heads: Sequence[int],
) -> Tensor:
    heads = tuple(zip(map_heads, value_heads, strict=True))
    apply = _c_kernel.apply if _c_kernel.applies(weights, values) else applied_in_blocks
    return apply(weights, scales, values, heads, [(rows, keys) for rows, keys in lengths.tolist()])


for _name, _implementation in {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "store_attention": _store_attention,
    "apply_map": _apply_map,
}.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@register_fake("mapreuse::attention", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, values = arguments[:3]
    keep = arguments[NUM_SCORES]
    return *_fake_outputs(query, values), values.new_empty((*query.shape[:3], key.shape[2]) if keep else 0)


@register_fake("mapreuse::attention_backward", lib=_library)
def _(*arguments: Any) -> list[Tensor]:
    inputs = (arguments[index] for index in DIFFERENTIABLE)
    return [arguments[0].new_empty(0 if one is None else one.shape) for one in inputs]


@register_fake("mapreuse::store_attention", lib=_library)
def _(query: Tensor, key: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(query, values)


@register_fake("mapreuse::apply_map", lib=_library)
def _(weights: Tensor, scales: Tensor | None, values: Tensor, lengths: Tensor, heads: list[int], _: Any) -> Tensor:
    return values.new_empty(len(weights), weights.shape[2], len(heads), values.shape[-1]).transpose(1, 2)


def _fake_outputs(query: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Context and lengths."""
    batch, heads, num_queries, _ = query.shape
    context = values.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    return context, torch.empty(batch, 2, dtype=torch.int64, device="cpu")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    arguments, (keep, ctx.dropout_p, seed) = inputs[:NUM_SCORES], inputs[NUM_SCORES:]
    ctx.options = arguments[3], arguments[6]
    tensors = [arguments[index] for index in (*DIFFERENTIABLE, 4)]
    ctx.save_for_backward(*tensors, seed, output[2] if keep else None)
    ctx.mark_non_differentiable(*output[1 : 2 if keep else 3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_context: Tensor | None, _: Any, d_map: Tensor | None) -> tuple[Any, ...]:
    *tensors, mask, seed, weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients will be differentiated themselves
        gradients = _differentiable_gradients(ctx, tensors, mask, seed, d_context, d_map)
    else:
        arguments = _with_options(ctx, tensors, mask)
        operator = torch.ops.mapreuse.attention_backward.default
        gradients = operator(*arguments, weights, ctx.dropout_p, seed, d_context, d_map)
    found = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return tuple(
        found.get(index) if ctx.needs_input_grad[index] else None for index in range(len(ctx.needs_input_grad))
    )


def _with_options(ctx: Any, tensors: Sequence[Tensor | None], mask: Tensor | None) -> tuple[Any, ...]:
    query, key, values, bias, *positions = tensors
    scaling, is_causal = ctx.options
    return query, key, values, scaling, mask, bias, is_causal, *positions


def _differentiable_gradients(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
    seed: Tensor | None,
    d_context: Tensor | None,
    d_map: Tensor | None,
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operators, which have derivatives of any order."""
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    scores, values = scores_of(_with_options(ctx, inputs, mask))
    weights = dropped = softmax(scores)
    if (dropout := _dropout(ctx.dropout_p, seed)) is not None:
        dropped = weights * dropout_factors(scores, values, dropout)
    outputs = [(out, grad) for out, grad in ((dropped @ values, d_context), (weights, d_map)) if grad is not None]
    differentiated = [one for one in inputs if one is not None and one.requires_grad]
    products, grads = zip(*outputs, strict=True)
    gradients = iter(torch.autograd.grad(products, differentiated, grads, create_graph=True, allow_unused=True))
    return [next(gradients) if one is not None and one.requires_grad else None for one in inputs]


register_autograd("mapreuse::attention", _backward, setup_context=_save_for_backward, lib=_library)


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, scales, values, _, ctx.map_heads, ctx.value_heads = inputs
    ctx.save_for_backward(weights, scales, values)


def _map_backward(ctx: Any, d_context: Tensor) -> tuple[Tensor | None, ...]:
    """dM[m_h] += dC[h] values[v_h]ᵀ for weights that are not compressed, dV[v_h] += M[m_h]ᵀ dC[h]."""
    weights, scales, values = ctx.saved_tensors
    dense = weights if scales is None else weights.to(scales.dtype) * scales
    rows = dense[:, ctx.map_heads].to(values.dtype)
    value_heads = torch.tensor(ctx.value_heads, device=values.device)
    d_values = torch.zeros_like(values).index_add(1, value_heads, rows.mT @ d_context)
    d_weights = None
    if scales is None:
        map_heads = torch.tensor(ctx.map_heads, device=values.device)
        d_weights = torch.zeros_like(weights).index_add(1, map_heads, d_context @ values[:, ctx.value_heads].mT)
    return d_weights, None, d_values, None, None, None


register_autograd("mapreuse::apply_map", _map_backward, setup_context=_save_map, lib=_library)
