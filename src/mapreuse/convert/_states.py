"""Hidden states of a pass, layer by layer, and how far those of a converted model are from its original's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.models import find_stack


def hidden_state_error(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[nn.Module], float]:
    """A function that tells how far a converted model's last hidden states are from the original's.

        error = 1 − mean over positions of cos(h, h₀)

    with h and h₀ the two models' states after the last layer; from 0 (the same) to 2. Padding is left out.
    """
    batches = list(batches)

    @torch.no_grad()
    def last_states(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found = []
        was_training = model.training
        model.eval()
        for batch in batches:
            with recorded_states(model) as (states, masks):
                model(**batch)
            found.append((states[-1], not_padding(masks[0], states[-1])))
        model.train(was_training)
        return found

    wanted = last_states(original)

    def error(model: nn.Module) -> float:
        pairs = zip(last_states(model), wanted, strict=True)
        cosines = torch.cat(
            [functional.cosine_similarity(ours[rows], theirs[rows], dim=-1) for (ours, _), (theirs, rows) in pairs]
        )
        return max(0.0, 1 - float(cosines.double().mean()))  # rounding may make the same states more than alike

    return error


@contextmanager
def recorded_states(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """Hidden states after every layer of a pass, and the attention mask that the first was given."""
    states: list[Tensor] = []
    masks: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        masks.append(given.get("attention_mask", given.get("kwargs", {}).get("attention_mask")))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = [layer.layer for layer in find_stack(model).layers]
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield states, masks
    finally:
        for handle in handles:
            handle.remove()


def not_padding(
    mask: Tensor | None, states: Float[Tensor, "batch positions width"]
) -> Bool[Tensor, "batch positions"]:
    """Positions that may attend themselves; all of them where there is no mask."""
    batch, positions, _ = states.shape
    if mask is None:
        return torch.ones(batch, positions, dtype=torch.bool, device=states.device)
    if mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1) if mask.shape[-2] > 1 else mask[:, 0, 0]
    allowed = mask if mask.dtype == torch.bool else (mask > -1 if mask.is_floating_point() else mask > 0)
    return allowed.expand(batch, positions)
