"""The definition of shared maps: the original model, with the softmax of reusing layers replaced by their sources'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse import ReusePlan
from mapreuse.models import find_stack


@contextmanager
def softmax_follows(plan: ReusePlan, attentions: Sequence[nn.Module] | None = None) -> Iterator[list[Tensor]]:
    """While open, the n-th softmax of a forward is layer n's, and its reusing heads take their sources' weights.

    Where the layers' attention modules are given, only what runs inside one of them counts (experts have a softmax
    of their own, and so have other stacks). Yields the weights in effect, layer by layer. Fails where a forward ran
    another number of softmaxes.
    """
    original = nn.functional.softmax
    own: list[Tensor] = []
    in_effect: list[Tensor] = []
    inside: list[nn.Module] = []

    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if attentions is not None and not inside:
            return original(*args, **kwargs)
        if args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)  # many families ask for float32, which is a loss here
        weights = original(*args, **kwargs)
        layer = len(own)
        own.append(weights)
        heads = [
            weights[:, head] if source is None else own[source[0]][:, source[1]]
            for head, source in enumerate(plan.heads(layer, weights.shape[1]))
        ]
        in_effect.append(torch.stack(heads, 1))
        return in_effect[-1]

    def leave(*call: Any) -> None:
        inside.pop()

    with ExitStack() as hooks:
        for attention in attentions or ():
            hooks.enter_context(attention.register_forward_pre_hook(lambda module, _: inside.append(module)))
            hooks.enter_context(attention.register_forward_hook(leave, always_call=True))
        nn.functional.softmax = softmax
        try:
            yield in_effect
        finally:
            nn.functional.softmax = original
    assert len(own) == plan.num_layers, f"{len(own)} softmaxes ran, for {plan.num_layers} layers"


def defined_output(eager_model: nn.Module, batch: dict[str, Tensor], plan: ReusePlan) -> Tensor:
    """Last hidden states of an untouched eager model under `plan`."""
    with softmax_follows(plan):
        return eager_model(**batch).last_hidden_state


def valid_rows(model: nn.Module, batch: dict[str, Tensor], output: Any) -> Tensor:
    """Which rows (batch, position) of the last hidden states are not padding."""
    hidden = output.last_hidden_state
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool)
    if "input_values" in batch:
        mask = model._get_feature_vector_attention_mask(hidden.shape[1], mask)
    elif "input_features" in batch:
        mask = output.attention_mask
    return mask.bool()


def disagreement(ours: Tensor, reference: Tensor, rows: Tensor) -> float:
    """max |ours − reference| / max |reference| over these rows."""
    ours, reference = ours[rows], reference[rows]
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def output_of_layer(model: nn.Module, index: int, batch: dict[str, Tensor]) -> Tensor:
    """What a layer puts out in a whole pass, by a hook, of a model of any family."""
    seen: list[Any] = []
    handle = find_stack(model).layers[index].layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad(), handle:
        model(**batch)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]
