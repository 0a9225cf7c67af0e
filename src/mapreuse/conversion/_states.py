"""How far the hidden states of a converted model are from its original's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.models import not_padding, optimized, recorded_states, with_projections


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
        with in_evaluation_mode(model), optimized(model):
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
def in_evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Meanwhile nothing is dropped out; then every module is in the mode that it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
