"""Recovery that is the same for every technique: a short distillation of the layers from the original model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from mapreuse.conversion import LoopConfig, TrainingLoop

_HELD_OUT, _MAX_HELD_OUT = 8, 16
"""Every eighth batch is held out, at most this number."""


def recover(
    model: nn.Module,
    original: nn.Module,
    layers: Sequence[tuple[nn.Module, nn.Module]],
    batches: Sequence[Mapping[str, Any]],
    steps: int,
) -> dict[str, float]:
    """Train the layers of a changed model, in place, to match the original's hidden states and outputs.

        meanₗ ‖hₗ − hₗ°‖² / ‖hₗ°‖²  +  KL(p° ‖ p)

    with hₗ the hidden states after layer l, padding left out, as long as no tokens were merged, p the output
    distributions of a model with logits, and ° for the original. It is the loss of `mapreuse.distill`, which needs a
    model under a plan. Each step is one batch; the weights with the smallest held-out loss are kept.

    Args:
        model: the changed model.
        original: the original, which is not changed.
        layers: the changed model's layers, each with its layer in the original.
        batches: calibration data; every eighth batch is held out.
        steps: number of steps.

    Returns:
        The held-out loss before and after, and the seconds of training.
    """
    held_out = list(batches)[_HELD_OUT - 1 :: _HELD_OUT][:_MAX_HELD_OUT]
    training = [batch for i, batch in enumerate(batches) if i % _HELD_OUT != _HELD_OUT - 1]
    learning = {parameter for layer, _ in layers for parameter in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learning)

    def loss(batch: Mapping[str, Any], step: int = 0) -> Tensor:
        with _states([one for _, one in layers]) as targets, torch.no_grad():
            target = original(**batch)
        with _states([one for one, _ in layers]) as states:
            output = model(**batch)
        mask = batch.get("attention_mask")
        rows = mask.bool() if mask is not None and mask.shape == targets[0].shape[:2] else slice(None)
        # A layer that merges tokens has states of fewer of them, which have no counterparts.
        both = [(one, other) for one, other in zip(states, targets, strict=True) if one.shape == other.shape]
        pairs = [(one[rows], other[rows]) for one, other in both]
        total = torch.stack([(one - other).square().sum() / other.square().sum() for one, other in pairs]).mean()
        if getattr(output, "logits", None) is not None:
            found, expected = (one.logits[rows].flatten(0, -2).log_softmax(-1) for one in (output, target))
            total = total + kl_div(found, expected, reduction="batchmean", log_target=True)
        return total

    def evaluate() -> dict[str, float]:
        return {"loss on held-out batches": sum(loss(batch).item() for batch in held_out) / len(held_out)}

    config = LoopConfig(steps=steps, evaluate_every=max(1, steps // 4))
    loop = TrainingLoop(
        model,
        config,
        batches=lambda epoch, progress: training,
        loss=loss,
        evaluate=evaluate,
        evaluate_first=True,
        name="recovery",
    )
    state = loop.run()
    errors = [entry["loss on held-out batches"] for entry in state.history]
    return {"before": errors[0], "after": min(errors), "seconds": state.elapsed}


@contextmanager
def _states(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the outputs of layers."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(after))
        yield found
