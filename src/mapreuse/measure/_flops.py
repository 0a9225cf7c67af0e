"""FLOPs by PyTorch's counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def flop_counter(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count the FLOPs of a model's matrix products and convolutions, two for each multiplication with its addition.

    Without gradients, the counter fails on modules whose inputs are parameters, such as weight norms, unless the
    parameters need no gradient. So none of them does meanwhile, except in training.
    """
    frozen = [] if model.training else [weights for weights in model.parameters() if weights.requires_grad]
    for weights in frozen:
        weights.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for weights in frozen:
            weights.requires_grad_(True)
