"""The definition of shared maps: the original model, where reusing layers apply the softmax of their sources."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_attention_with_sinks

from mapreuse import ReusePlan
from mapreuse.maps import AttentionMap, RecomputedMap
from mapreuse.maps.reference import shared_keys
from mapreuse.models import find_stack


def as_it_is(weights: Tensor) -> Tensor:
    return weights


def in_eight_bits(weights: Tensor) -> Tensor:
    """Weights divided by the maximum of their row, rounded to multiples of 1/255, and scaled to a sum of one."""
    rounded = (255 * weights / weights.amax(-1, keepdim=True).clamp(min=1e-30)).round()
    return rounded / rounded.sum(-1, keepdim=True).clamp(min=1)


def in_sixteen_bits(weights: Tensor) -> Tensor:
    """The same in half precision."""
    rounded = (weights / weights.amax(-1, keepdim=True).clamp(min=1e-30)).half().float()
    return rounded / rounded.sum(-1, keepdim=True).clamp(min=1e-30)


@contextmanager
def softmax_follows(
    plan: ReusePlan,
    attentions: Sequence[nn.Module] | None = None,
    stored: Callable[[Tensor], Tensor] = as_it_is,
    allowed: Tensor | None = None,
) -> Iterator[list[Tensor]]:
    """While open, the n-th softmax of a forward is that of layer n, and reusing heads get their sources' weights.

    If the attention modules of the layers are given, only a softmax inside one of them counts (experts and other
    stacks have their own). `stored` makes what reusing heads read of a map. Share mode "keys" needs `allowed`, the
    keys that each query may attend to. Yields the weights in effect, layer by layer. Fails if a forward runs another
    number of softmaxes.
    """
    original = nn.functional.softmax
    own: list[Tensor] = []
    in_effect: list[Tensor] = []
    inside: list[nn.Module] = []

    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if attentions is not None and not inside:
            return original(*args, **kwargs)
        if args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)  # many families request float32, which is less precise
        weights = original(*args, **kwargs)
        is_flat = weights.dim() == 3 and bool(inside)  # heads are in the dimension of the batch
        own.append(weights.unflatten(0, (-1, inside[-1].num_heads)) if is_flat else weights)
        in_effect.append(map_in_effect(plan, own, stored, allowed))
        return in_effect[-1].flatten(0, 1) if is_flat else in_effect[-1]

    def leave(*call: Any) -> None:
        inside.pop()

    with ExitStack() as hooks:
        hooks.enter_context(_sinks_in_softmax(attentions or ()))
        for attention in attentions or ():
            hooks.enter_context(attention.register_forward_pre_hook(lambda module, _: inside.append(module)))
            hooks.enter_context(attention.register_forward_hook(leave, always_call=True))
        nn.functional.softmax = softmax
        try:
            yield in_effect
        finally:
            nn.functional.softmax = original
    assert len(own) == plan.num_layers, f"{len(own)} softmaxes ran, for {plan.num_layers} layers"


@contextmanager
def _sinks_in_softmax(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Granite's eager attention applies sinks as a factor after the softmax: sigmoid(logsumexp(scores) − sink).

    As GPT-OSS computes it, with the sink as one more score, the softmax is the map.
    """
    with_sinks = {type(attention).__module__ for attention in attentions if hasattr(attention, "sinks")}
    modules: list[Any] = [sys.modules[name] for name in sorted(with_sinks) if "granite" in name]
    originals = [module.eager_attention_forward for module in modules]
    try:
        for module in modules:
            module.eager_attention_forward = eager_attention_with_sinks
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.eager_attention_forward = original


def map_in_effect(
    plan: ReusePlan,
    own: Sequence[Tensor],
    stored: Callable[[Tensor], Tensor] = as_it_is,
    allowed: Tensor | None = None,
) -> Tensor:
    """The map that a layer applies under `plan`, from the maps that it and all layers before it compute."""
    layer = len(own) - 1
    if plan.share_of(layer) == "keys":
        settings = {"keys": plan.keys, "window": plan.window, "block": plan.block}
        attended = shared_keys(own[plan.layers[layer]], allowed, **settings)
        weights = own[layer] * attended
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300 if weights.dtype == torch.float64 else 1e-30)
    heads = [
        own[-1][:, head] if source is None else stored(own[source[0]])[:, source[1]]
        for head, source in enumerate(plan.heads(len(own) - 1, own[-1].shape[1]))
    ]
    return torch.stack(heads, 1)


def defined_output(eager_model: nn.Module, batch: dict[str, Tensor], plan: ReusePlan) -> Tensor:
    """Last hidden states of an untouched eager model under `plan`."""
    with softmax_follows(plan, [layer.attention for layer in find_stack(eager_model).layers]):
        return eager_model(**batch).last_hidden_state


def defined_packed_output(
    model: nn.Module, plan: ReusePlan, *args: Any, stored: Callable[[Tensor], Tensor] = as_it_is, **kwargs: Any
) -> Tensor:
    """Output of an untouched model of torch's or timm's attention, without dropout, under `plan`.

    Attention is written out here. Nothing of its own forward is used, nor the fast path of torch's encoder.
    """
    own: list[Tensor] = []

    def context_of(attention: Any, packed: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
        own.append(scores.softmax(-1))
        return (map_in_effect(plan, own, stored) @ value).transpose(1, 2).flatten(2)

    def torch_attention(attention: Any, x: Tensor, *_: Any, attn_mask=None, key_padding_mask=None, **settings: Any):
        if not attention.batch_first:
            x = x.transpose(0, 1)
        mask = torch.zeros(()) if attn_mask is None else attn_mask
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, attention.num_heads))
        if key_padding_mask is not None:
            mask = mask + key_padding_mask[:, None, None]
        if hasattr(attention, "in_proj"):
            packed = attention.in_proj(x)
        else:
            packed = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        output = attention.out_proj(context_of(attention, packed, mask))
        return output if attention.batch_first else output.transpose(0, 1), None

    def timm_attention(attention: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        context = context_of(attention, attention.qkv(x), attn_mask)
        return attention.proj(attention.norm(context) if hasattr(attention, "norm") else context)

    attentions = [layer.attention for layer in find_stack(model).layers]
    training = model.training
    try:
        for attention in attentions:
            written_out = torch_attention if isinstance(attention, nn.MultiheadAttention) else timm_attention
            vars(attention)["forward"] = functools.partial(written_out, attention)
        output = model.train()(*args, **kwargs)  # torch's encoder takes its fast path in evaluation only
    finally:
        model.train(training)
        for attention in attentions:
            del vars(attention)["forward"]
    assert len(own) == plan.num_layers
    return output


def unpack_projections(model: nn.Module) -> None:
    """Make plain linear layers of the projections of torch's attention, so that tools treat them as all others."""
    for attention in (one for one in model.modules() if isinstance(one, nn.MultiheadAttention)):
        for name, weight, bias in (
            ("in_proj", attention.in_proj_weight, attention.in_proj_bias),
            ("out_proj", attention.out_proj.weight, attention.out_proj.bias),
        ):
            linear = nn.Linear(*weight.shape[::-1])
            linear.weight, linear.bias = weight, bias
            setattr(attention, name, linear)
        attention.in_proj_weight = attention.in_proj_bias = None


def valid_rows(model: nn.Module, batch: dict[str, Tensor], output: Any) -> Tensor:
    """True for each row (batch, position) of the last hidden states that is not padding."""
    hidden = output.last_hidden_state
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool)
    if "input_values" in batch:
        mask = model._get_feature_vector_attention_mask(hidden.shape[1], mask)
    elif "input_features" in batch:
        mask = output.attention_mask
    return mask.bool()


def disagreement(output: Tensor, reference: Tensor, rows: Tensor) -> float:
    """max |output − reference| / max |reference| over these rows."""
    output, reference = output[rows], reference[rows]
    return ((output - reference).abs().max() / reference.abs().max()).item()


def size_of(attention_map: AttentionMap) -> int:
    """Size in bytes of the tensors that a map keeps alive."""
    if isinstance(attention_map, RecomputedMap):
        return sum(tensor.nbytes for tensor in attention_map.scores.factors)
    return sum(tensor.nbytes for tensor in (attention_map.weights, attention_map.scales) if tensor is not None)


def output_of_layer(model: nn.Module, index: int, batch: dict[str, Tensor]) -> Tensor:
    """The output of one layer in a forward pass of the whole model."""
    seen: list[Any] = []
    handle = find_stack(model).layers[index].layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad(), handle:
        model(**batch)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]
