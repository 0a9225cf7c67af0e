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

from mapreuse.models import find_stack, with_projections


def hidden_state_error(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[nn.Module], float]:
    """A function that tells how far a converted model's last hidden states are from the original's.

        error = 1 − mean over positions of cos(h, h₀)

    with h and h₀ the two models' states after the last layer; from 0 (the same) to 2. Padding is left out.

    Raises `ValueError`, now or when it is called, where states are not finite.
    """
    batches = list(batches)

    @torch.no_grad()
    def last_states(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found = []
        model = with_projections(model)
        was_training = model.training
        model.eval()
        for batch in batches:
            with recorded_states(model) as (states, masks):
                model(**batch)
            rows = not_padding(masks[0], states[-1])
            if not bool(torch.isfinite(states[-1][rows]).all()):
                raise ValueError(
                    f"{type(model).__name__}: its last hidden states are not finite; check its weights and the "
                    "calibration batches"
                )
            found.append((states[-1], rows))
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
    """Hidden states after every layer of a pass, and the attention mask that the first was given.

    Of a `torch.nn.TransformerEncoder`, the mask is the one of its keys, as it reaches the layers: of numbers.
    """
    states: list[Tensor] = []
    masks: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        masks.append(given.get("attention_mask", given.get("src_key_padding_mask")))

    stack = find_stack(model)
    batch_first = getattr(stack.layers[0].attention, "batch_first", True)  # of torch's own attention

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        states.append(found if batch_first else found.transpose(0, 1))

    layers = [layer.layer for layer in stack.layers]
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
