"""What one layer computes and later layers use, on its way between them within one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ParakeetEncoder

ARGUMENT = "published"
"""The keyword argument in which it travels from layer to layer."""


class Published:
    """What the layers of one forward pass hand on; every pass has its own, so threads and models share nothing.

    Args:
        last_readers: for every layer that hands something on, the last layer that reads it. It is forgotten then,
            unless gradients are computed: autograd holds it anyway, and gradient checkpointing runs layers again.
    """

    def __init__(self, last_readers: dict[int, int]) -> None:
        self._last_readers = last_readers
        self._has_gradients = torch.is_grad_enabled()
        self._items: dict[int, Any] = {}

    def put(self, layer: int, item: Any) -> None:
        """Hand on what `layer` computed. Raises `ValueError` where its gradient would be lost."""
        if self._has_gradients and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {layer} is shared, and reentrant gradient checkpointing would cut its gradient; "
                "use use_reentrant=False"
            )
        self._items[layer] = item

    def get(self, source: int, reader: int) -> Any:
        """What layer `source` handed on, to layer `reader`."""
        if self._has_gradients or reader < self._last_readers[source]:
            return self._items[source]
        return self._items.pop(source)


def publish(encoder: ParakeetEncoder, sources: list[int]) -> None:
    """Give every forward pass of `encoder` something to hand on with; `sources[l]` is the layer that `l` reads.

    Raises `ValueError` where LayerDrop may skip a layer that others read.
    """
    if encoder.layerdrop > 0.0:
        raise ValueError(
            f"LayerDrop ({encoder.layerdrop}) may skip a layer whose results others share; create the model with "
            "layerdrop=0.0"
        )
    encoder._last_readers = {source: reader for reader, source in enumerate(sources)}
    encoder.register_forward_pre_hook(_open, with_kwargs=True)


def published(layer: int, travelling: dict[str, Any]) -> Published:
    """What travels in the keyword arguments of an attention module."""
    found = travelling.get(ARGUMENT)
    if not isinstance(found, Published):
        raise ValueError(
            f"layer {layer} shares with other layers and was called outside its encoder; call that whole"
        )
    return found


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    last_readers: Any = module._last_readers
    return args, kwargs | {ARGUMENT: Published(last_readers)}
