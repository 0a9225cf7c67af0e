"""How the attention modules of each class are converted. Classes outside the usual pattern register an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import transformers
from torch import nn

from mapreuse.models._reading import AttentionForm, read_attention
from mapreuse.models._sharing_classes import ReusingAttention, SharingAttention
from mapreuse.models._source import Unsupported, fingerprint_of


@dataclass(frozen=True)
class Adapter:
    """How the attention modules of one class are converted.

    Attributes:
        form: attribute names of the module, by role.
        computing: mixin for layers that compute maps; None to keep the original forward.
        reusing: mixin for layers that reuse maps.
        per_head: the projections and parameters in `form.query` and `form.key` of which `computing` needs only the
            heads that compute.
        fused: the projection that makes queries, keys and values as three blocks in this order, or None.
        interface: the original forward uses the attention interface of `transformers`.
        head_dim: width of a head if the module does not store it.
    """

    form: AttentionForm
    computing: type[SharingAttention] | None = None
    reusing: type[SharingAttention] = ReusingAttention
    per_head: tuple[str, ...] = ()
    fused: str | None = None
    interface: bool = True
    head_dim: int | None = None


_STYLES: list[Callable[[nn.Module], Adapter | None]] = []
_ADAPTERS: dict[str, tuple[tuple[str, ...], Callable[[nn.Module], Adapter]]] = {}


def register_attention(class_name: str, *fingerprints: str) -> Callable:
    """Register a function that makes the adapter for modules of one attention class of `transformers`.

    Args:
        class_name: name of the class.
        *fingerprints: `fingerprint_of` its forward in each supported version of `transformers`. A class with another
            forward is refused.
    """

    def register(make: Callable[[nn.Module], Adapter]) -> Callable[[nn.Module], Adapter]:
        _ADAPTERS[class_name] = fingerprints, make
        return make

    return register


def register_style(make: Callable[[nn.Module], Adapter | None]) -> Callable[[nn.Module], Adapter | None]:
    """Register a function that makes the adapter for modules of a certain style, and returns None for others."""
    _STYLES.append(make)
    return make


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of an attention module.

    Raises:
        Unsupported: if its class cannot share maps. The message names the class and the reason.
    """
    cls = type(module)
    if "forward" in vars(module):
        raise Unsupported(
            f"{cls.__name__}: its forward was replaced on the module itself, by a device map or a patch; load the "
            "model on one device and without patches"
        )
    if cls.__name__ not in _ADAPTERS:
        in_style = next(filter(None, (style(module) for style in _STYLES)), None)
        return in_style or Adapter(read_attention(cls))
    fingerprints, make = _ADAPTERS[cls.__name__]
    check_fingerprint(cls, fingerprints, f"transformers {transformers.__version__}")
    return make(module)


def check_fingerprint(cls: type[nn.Module], fingerprints: tuple[str, ...], version: str) -> None:
    """Raise `Unsupported` if the forward of a class has none of these fingerprints."""
    found = fingerprint_of(cls)
    if found not in fingerprints:
        raise Unsupported(
            f"{cls.__name__}: its forward has changed (fingerprint {found}, expected {' or '.join(fingerprints)}); "
            f"{version} is not supported for this class"
        )
