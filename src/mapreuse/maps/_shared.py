"""The maps of one forward pass, on their way from computing to reusing layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mapreuse.maps._map import AttentionMap, DenseMap


class SharedMaps:
    """The attention maps alive during one forward pass of one stack of layers.

    A new one is made for every forward pass and travels as an argument from layer to layer, so nothing is shared
    between threads, models or calls. A map is dropped after its last reader, and its memory is handed to the next
    computing layer.

    Args:
        retain: keep every map until the end of the pass. Autograd holds them that long anyway, and gradient
            checkpointing runs layers again.
        differentiable: the pass is one that gradients will flow through, so that no map may be published without.
        output_attentions: the caller wants to see the map in effect in every layer.
    """

    def __init__(
        self, *, retain: bool = False, differentiable: bool = False, output_attentions: bool = False
    ) -> None:
        self.output_attentions = output_attentions
        self._maps: dict[int, AttentionMap] = {}
        self._retain = retain
        self._differentiable = differentiable
        self._free: Tensor | None = None

    def publish(self, layer: int, attention_map: AttentionMap) -> None:
        """Hand on the map of a computing layer. Raises `ValueError` where its gradient would be lost."""
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {layer} computes its map without gradients inside a pass that needs them: reentrant gradient "
                "checkpointing would cut the gradient of shared maps; use use_reentrant=False, as in "
                "activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False})"
            )
        self._maps[layer] = attention_map

    def read(self, layer: int) -> AttentionMap | None:
        """The map of `layer`, or None where that layer did not run (LayerDrop)."""
        return self._maps.get(layer)

    def release(self, layer: int) -> None:
        """Forget the map of `layer`: its last reader is done."""
        if self._retain:
            return
        attention_map = self._maps.pop(layer, None)
        if isinstance(attention_map, DenseMap):
            self._free = attention_map.weights

    def buffer(self, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Memory of a released map, if it has this shape and `like`'s dtype and device."""
        free, self._free = self._free, None
        if free is not None and free.shape == shape and free.dtype == like.dtype and free.device == like.device:
            return free
        return None
