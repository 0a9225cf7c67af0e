"""What an attention module does in a forward pass: compute maps, publish them, apply those of other layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mapreuse.maps import (
    AttentionMap,
    DenseMap,
    HeadPairs,
    RecomputedMap,
    Scores,
    SharedMaps,
    SharedScores,
    as_index,
    attend,
    attend_step,
    compute,
    compute_keys,
    repeated,
    with_all_heads,
)
from mapreuse.models._layout import LayerLayout
from mapreuse.models._reading import INERT, OTHER_STATES
from mapreuse.models._source import original_class, parameter_names

MAPS_ARGUMENT = "attention_maps"
"""The keyword argument that passes the `SharedMaps` of a forward pass from layer to layer."""

CROSS_MAPS_ARGUMENT = "cross_attention_maps"
"""The same for the maps of cross-attention."""

INJECTED_MAPS = "_injected_maps"
"""The attribute that holds the `SharedMaps` if no keyword argument can; see `MapInjection`."""

LowRank: TypeAlias = tuple[Tensor, Tensor]
"""Low-rank queries (batch, heads, query, rank), and keys (batch, value heads, key, rank)."""

_OBSERVED = "_observed"
"""The attribute of an attention module that holds its inputs and a callback, inside `observing_inputs`."""

IMPLEMENTATION = "mapreuse"
"""The name of `attention_function` in the attention interface of `transformers`."""


def share(
    module: nn.Module,
    maps: SharedMaps | None,
    values: Float[Tensor, "batch value_heads key value_dim"],
    scores: Scores | None,
    *,
    num_queries: int | torch.SymInt,
    dropout_p: float = 0.0,
    low_rank: LowRank | None = None,
) -> tuple[Float[Tensor, "batch query heads value_dim"], Tensor | None]:
    """The context of a layer, from its own scores and the maps of its source layers.

        context[h] = softmax(scores[h]) @ values[h]      if head h computes
        context[h] = M[source layer][source head] @ values[h]     if head h reuses

    In share mode "keys", the softmax of a reusing layer is over the keys that its source published. In share mode
    "corrected", it is over the scores of its source plus products of low rank.

    Args:
        module: the attention module. Its `_layout` assigns a role to each head.
        maps: the maps of this forward pass.
        values: the values of this layer.
        scores: the scores of the heads that compute, or None if no head computes.
        num_queries: number of positions of the input; with a cache, there are more values.
        dropout_p: attention dropout. Each layer draws its own.
        low_rank: the low-rank queries and keys of a reusing layer of share mode "corrected".

    Returns:
        The context, and the map of all heads in their original order if the caller asked for maps, else None.
    """
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    maps = maps or getattr(module, INJECTED_MAPS, None)
    if maps is None:
        raise ValueError(
            f"layer {layout.layer} of a model that shares attention maps was called by itself; call the whole model"
        )
    inputs, found = vars(module).get(_OBSERVED, (None, None))
    if inputs is not None:
        values = inputs[:, None].expand(-1, values.shape[1], -1, -1)
    contexts: list[Tensor] = []
    weights: list[Tensor] = []
    if scores is not None:
        scores = scores.to(values.dtype)  # under autocast, sums and rotations have another type than projections
        if layout.publishes_keys is None and layout.key_source is None:
            context, own = _compute(layout, maps, values, scores, dropout_p)
        else:
            context, own = _compute_with_keys(module, layout, maps, values, scores, dropout_p)
        contexts.append(context)
        if layout.publishes_scores:
            maps.publish(layout.layer, SharedScores.of(scores), "corrected")
        if maps.output_attentions and own is not None:
            weights.append(own.dense())
    for source, pairs in layout.parts:
        source_map = maps.read(source, "map" if low_rank is None else "corrected")
        if source_map is None:
            _check_may_skip(module, layout.layer, source)
            # LayerDrop skipped the source
            contexts.append(values.new_zeros(len(values), len(pairs), num_queries, values.shape[-1]))
        elif low_rank is not None:
            context, own = source_map.attend(*low_rank, values, pairs, dropout_p)
            contexts.append(context)
            if layout.publishes:
                maps.publish(layout.layer, own)
            if maps.output_attentions:
                weights.append(own.dense())
        else:
            contexts.append(source_map.apply(values, _unless_one_to_one(pairs, values, source_map), dropout_p))
            if maps.output_attentions:
                weights.append(source_map.dense()[:, as_index([pair[0] for pair in pairs])])
    for source in layout.releases:
        maps.release(source)
    context = layout.in_order(contexts, 2).contiguous()  # some forwards call `view`
    if found is not None:
        found(context)
    if not (maps.output_attentions and len(weights) == len(contexts)):
        return context, None
    return context, layout.in_order(weights, 1).clone()  # later layers overwrite the memory of dropped maps


def _compute(
    layout: LayerLayout, maps: SharedMaps, values: Tensor, scores: Scores, dropout_p: float
) -> tuple[Tensor, AttentionMap | None]:
    """Context and map of the heads that compute. All of them are published, also if only some are applied."""
    if scores.key_heads is not None:  # a step's map is smaller than its keys, so that no storage needs to be chosen
        context, weights = attend_step(scores, values, layout.own_values, dropout_p=dropout_p)
        if layout.publishes:
            maps.publish(layout.layer, DenseMap(weights))
        return context, DenseMap(weights)
    values = values[:, as_index(layout.own_values)]
    if not layout.publishes:
        return attend(scores, values, keep=False, dropout_p=dropout_p)[0], RecomputedMap(scores)
    storage, buffer = maps.storage(scores, values), maps.buffer(scores)
    context, attention_map = compute(scores, values, storage, dropout_p=dropout_p, buffer=buffer)
    maps.publish(layout.layer, attention_map)
    return context, attention_map


def _compute_with_keys(
    module: nn.Module, layout: LayerLayout, maps: SharedMaps, values: Tensor, scores: Scores, dropout_p: float
) -> tuple[Tensor, AttentionMap | None]:
    """Context of a layer that publishes keys or attends to those of its source, and its map if somebody needs it."""
    if scores.key.shape[1] != values.shape[1]:
        values = values[:, as_index(layout.own_values)]
    shared = None if layout.key_source is None else maps.read(layout.key_source, "keys")
    if layout.publishes_keys is not None:
        context, published = compute_keys(scores, values, layout.publishes_keys, dropout_p)
        maps.publish(layout.layer, published, "keys")
    elif shared is not None:
        context = shared.attend(scores, values, dropout_p)
    else:
        assert layout.key_source is not None
        _check_may_skip(module, layout.layer, layout.key_source)
        context = attend(with_all_heads(scores), repeated(values, scores), keep=False, dropout_p=dropout_p)[0]
    if not (maps.output_attentions or layout.publishes):
        return context, None
    own = RecomputedMap(with_all_heads(scores) if shared is None else shared.limited(scores))
    if layout.publishes:
        maps.publish(layout.layer, own)
    return context, own


def _check_may_skip(module: nn.Module, layer: int, source: int) -> None:
    """Only LayerDrop may skip a source layer, in training."""
    if not module.training:
        raise RuntimeError(f"layer {layer} reuses layer {source}'s map, but layer {source} did not run")


def _unless_one_to_one(pairs: HeadPairs, values: Tensor, source_map: AttentionMap) -> HeadPairs | None:
    heads = source_map.num_heads
    one_to_one = len(pairs) == values.shape[1] == heads and all(pair == (i, i) for i, pair in enumerate(pairs))
    return None if one_to_one else pairs


@contextmanager
def observing_inputs(
    attention: nn.Module, found: Callable[[Float[Tensor, "batch query heads width"]], None]
) -> Iterator[None]:
    """Apply the maps of an attention module to its whole input X, and pass the result to `found`.

        found(A[h] @ X for each head h)

    The rest of the module cannot process this result, so `found` must stop the forward pass by an exception.
    """

    def store_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        setattr(module, _OBSERVED, (inputs_of(module, args, kwargs), found))

    try:
        with attention.register_forward_pre_hook(store_inputs, with_kwargs=True):
            yield
    finally:
        vars(attention).pop(_OBSERVED, None)


def inputs_of(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Float[Tensor, "batch positions width"]:
    """The states that an attention module under a plan makes values from: its input, or those of the encoder."""
    states: str | None = attention._form.states  # type: ignore[union-attr, assignment]
    if states is not None:
        return (dict(zip(parameter_names(original_class(attention)), args, strict=False)) | kwargs)[states]
    return batch_first(attention, args[0] if args else kwargs["hidden_states"])


def published_scores(attention: nn.Module, kwargs: dict[str, Any]) -> SharedScores:
    """The scores that the source of a layer of share mode "corrected" published, from the arguments of its call."""
    maps: SharedMaps = kwargs.get(MAPS_ARGUMENT) or getattr(attention, INJECTED_MAPS)
    layout: LayerLayout = attention._layout  # type: ignore[assignment]
    return maps.read(layout.parts[0][0], "corrected")


def batch_first(attention: nn.Module, states: Tensor) -> Float[Tensor, "batch positions width"]:
    """States of a layer with the batch first. Torch's own attention may have the positions first."""
    return states if getattr(attention, "batch_first", True) else states.transpose(0, 1)


def refuse_other_states(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` if arguments hold states of another model."""
    for name in OTHER_STATES:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} shares attention maps and cannot take {name}, as it attends only to its "
                "own inputs; call it without this argument"
            )


def refuse_unknown(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for arguments that may change the map."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in INERT)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} was given {', '.join(unknown)}, which may change its attention map; call a "
            "model that shares maps without these arguments"
        )


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch query_heads query dim"],
    key: Float[Tensor, "batch key_heads key dim"],
    value: Float[Tensor, "batch value_heads key value_dim"],
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_maps: SharedMaps | None = None,
    cross_attention_maps: SharedMaps | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query heads value_dim"], Tensor | None]:
    """The attention function that the original forward of a computing module calls."""
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    terms = {"softcap": softcap, "s_aux": s_aux}
    refuse_unknown(module, kwargs | {name: terms[name] for name in terms.keys() - module._form.terms})  # type: ignore
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    query = query[:, as_index(layout.queries)]
    scores = make_scores(module, query, key, attention_mask, scaling, is_causal, position_bias)
    sinks = None if s_aux is None else s_aux[as_index(layout.computing)]
    scores = replace(scores, cap=softcap, sinks=sinks)
    maps = attention_maps if module._form.states is None else cross_attention_maps  # type: ignore[union-attr]
    return share(module, maps, value, scores, num_queries=query.shape[-2], dropout_p=dropout)


AttentionInterface.register(IMPLEMENTATION, attention_function)
# Without a mask function of this name, `transformers` would make no mask, and padding would be attended to.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def make_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
) -> Scores:
    """Scores from the arguments of an attention function of `transformers`.

    The keys are those that the layer projects. Masks have the meaning that they have for `sdpa` and `eager`: boolean
    (True attends) or additive. Without a mask, attention is causal if `is_causal`, or else the module's attribute of
    that name, is True.
    """
    mask, bias = mask_and_bias(module, query, key, attention_mask, position_bias)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    is_step = query.shape[-2] == 1
    # Heads that share keys are multiplied as one, or gathered once.
    as_projected = is_step or layout.publishes_keys is not None or layout.key_source is not None
    return Scores(
        query=query,
        key=key if as_projected else key[:, as_index(layout.keys)],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        bias=bias,
        is_causal=is_causal and attention_mask is None and not is_step,
        key_heads=layout.keys if as_projected else None,
    )


def mask_and_bias(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A boolean mask (True attends) and an additive bias for the heads that compute, from a mask of either kind.

    Raises:
        ValueError: if the mask has another shape, type or device than attention needs.
    """
    layout: LayerLayout = module._layout  # type: ignore[assignment]
    if position_bias is not None:
        position_bias = _of_heads(position_bias, layout.computing)
    if attention_mask is None:
        return None, position_bias
    name, is_bool = type(module).__name__, attention_mask.dtype == torch.bool
    if attention_mask.dim() != 4:
        raise ValueError(
            f"{name}: expected a mask of shape (batch, 1, query, key), got {tuple(attention_mask.shape)}; load the "
            "model with attn_implementation='sdpa' or 'eager'"
        )
    expected = query.shape[0], layout.num_heads, query.shape[-2], key.shape[-2]
    if any(size not in (1, full) for size, full in zip(attention_mask.shape, expected, strict=True)):
        raise ValueError(
            f"{name}: expected a mask of shape {expected}, or 1 in place of a number, got "
            f"{tuple(attention_mask.shape)}"
        )
    if not (is_bool or attention_mask.is_floating_point()) or attention_mask.device != query.device:
        raise ValueError(
            f"{name}: expected a mask of booleans (True attends) or of floats (added to the scores) on "
            f"{query.device}, got {attention_mask.dtype} on {attention_mask.device}; convert it, such as by "
            "mask.bool()"
        )
    attention_mask = _of_heads(attention_mask, layout.computing)
    if is_bool:
        return attention_mask, position_bias
    # The softmax of a row of −∞ is undefined. The lowest finite number gives the same result in all other rows.
    bias = attention_mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    return None, bias if position_bias is None else bias + position_bias


def _of_heads(tensor: Tensor, heads: tuple[int, ...]) -> Tensor:
    """The part of some heads; the whole tensor if it is the same for all heads."""
    return tensor if tensor.dim() < 4 or tensor.shape[1] == 1 else tensor[:, as_index(heads)]
