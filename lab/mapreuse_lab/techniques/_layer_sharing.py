"""Layers that share tensors: a source layer computes them once for the layers of its group.

They travel from layer to layer in the library's `SharedMaps`, as attention maps do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.maps import SharedMaps
from mapreuse.models import MAPS_ARGUMENT
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._compressed_attention import RelativeAttention
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._technique import Technique


class LayerSharingAttention(RelativeAttention):
    """Attention of a layer that shares tensors with other layers, by a plan.

    Attributes:
        source: the layer that computes this layer's shared tensors; the layer itself if it computes its own.
    """

    def __init__(self, original: ParakeetEncoderAttention, technique: Technique, layer: int, plan: ReusePlan) -> None:
        super().__init__(original, technique, layer)
        self.source = layer_sources(plan)[layer]
        readers = plan.readers(self.source)
        self.is_shared = bool(readers)
        self.is_last_reader = readers[-1:] == (layer,)

    def shared(self, compute: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """The result of `compute()` in the source layer, and the same object in the layers that read it.

        Raises `ValueError` if the layer is called without its encoder.
        """
        if not self.is_shared:
            return compute()
        maps: SharedMaps | None = kwargs.get(MAPS_ARGUMENT)
        if maps is None:
            raise ValueError(
                f"layer {self.layer} shares with other layers and was called outside its encoder; call that whole"
            )
        if self.source == self.layer:
            computed = compute()
            maps.publish(self.layer, computed)
            return computed
        found = maps.read(self.source)
        if self.is_last_reader:
            maps.release(self.source)
        return found


def open_shared_maps(encoder: ParakeetEncoder) -> None:
    """Give every forward pass of `encoder` a `SharedMaps` of its own.

    Raises `ValueError` if LayerDrop may skip a layer that others read.
    """
    if encoder.layerdrop > 0.0:
        raise ValueError(
            f"LayerDrop ({encoder.layerdrop}) may skip a layer whose results others share; create the model with "
            "layerdrop=0.0"
        )
    encoder.register_forward_pre_hook(_open, with_kwargs=True)
    encoder.register_forward_hook(_close, with_kwargs=True)


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    has_gradients = torch.is_grad_enabled()
    return args, kwargs | {MAPS_ARGUMENT: SharedMaps(retain=has_gradients, differentiable=has_gradients)}


def _close(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    kwargs[MAPS_ARGUMENT].close(output)
