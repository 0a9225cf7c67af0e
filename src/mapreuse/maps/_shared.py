"""The maps of one forward pass, on their way from computing to reusing layers."""

from __future__ import annotations

from torch import Tensor

from mapreuse.maps._map import AttentionMap, DenseMap


class SharedMaps:
    """The attention maps alive during one forward pass of one stack of layers.

    A new one is made for every forward pass and travels as an argument from layer to layer, so nothing is shared
    between threads, models or calls. A map is dropped after its last reader, and its memory is handed to the next
    computing layer.

    Args:
        retain: keep every map until the end of the pass, for gradient checkpointing, which runs layers again.
    """

    def __init__(self, *, retain: bool = False) -> None:
        self._maps: dict[int, AttentionMap] = {}
        self._retain = retain
        self._free: Tensor | None = None

    def publish(self, layer: int, attention_map: AttentionMap) -> None:
        """Hand on the map of a computing layer."""
        self._maps[layer] = attention_map

    def read(self, layer: int) -> AttentionMap | None:
        """The map of `layer`, or None where that layer did not run (LayerDrop)."""
        return self._maps.get(layer)

    def release(self, layer: int) -> None:
        """Forget the map of `layer`: its last reader is done."""
        if self._retain:
            return
        attention_map = self._maps.pop(layer, None)
        if isinstance(attention_map, DenseMap) and not attention_map.weights.requires_grad:
            self._free = attention_map.weights

    def buffer(self, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Memory of a released map, if it has this shape and `like`'s dtype and device."""
        free, self._free = self._free, None
        if free is not None and free.shape == shape and free.dtype == like.dtype and free.device == like.device:
            return free
        return None
