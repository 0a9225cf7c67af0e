"""The families whose attention differs from the pattern, and how each is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models._linear import is_plain_linear
from mapreuse.models._reading import AttentionForm, read_attention
from mapreuse.models._sharing import ReusingAttention, SharingAttention
from mapreuse.models._source import Unsupported, fingerprint_of
from mapreuse.models._stack import Layer, feeds_output


@dataclass(frozen=True)
class Adapter:
    """How the attention modules of one class are converted.

    Attributes:
        form: attribute names of the module, by the part they play.
        computing: mixin with a forward of its own for layers that compute; None where the original forward serves.
        reusing: mixin for layers that reuse.
        per_head: the projections and parameters of `form.query` and `form.key` that `computing` expects to hold only
            the heads that compute.
        fused: the projection that makes queries, keys and values together, as three blocks in this order; else None.
        interface: the original goes through `transformers`' attention interface.
        head_dim: width of a head, where the module does not name it.
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
    """Register a function that makes the adapter of `transformers`' attention class of this name.

    Args:
        class_name: name of the class.
        *fingerprints: `fingerprint_of` its forward in each supported version of `transformers`. A class with
            another forward is refused.
    """

    def register(make: Callable[[nn.Module], Adapter]) -> Callable[[nn.Module], Adapter]:
        _ADAPTERS[class_name] = fingerprints, make
        return make

    return register


def register_style(make: Callable[[nn.Module], Adapter | None]) -> Callable[[nn.Module], Adapter | None]:
    """Register a function that makes the adapter of every module written in one style, and None for others."""
    _STYLES.append(make)
    return make


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of an attention module. Raises `Unsupported`, naming its class and the reason."""
    cls = type(module)
    if "forward" in vars(module):
        raise Unsupported(
            f"{cls.__name__}: its forward was replaced on the module itself, by a device map or a patch"
        )
    if cls.__name__ not in _ADAPTERS:
        in_style = next(filter(None, (style(module) for style in _STYLES)), None)
        return in_style or Adapter(read_attention(cls))
    fingerprints, make = _ADAPTERS[cls.__name__]
    found = fingerprint_of(cls)
    if found not in fingerprints:
        raise Unsupported(
            f"{cls.__name__}: its forward has changed (fingerprint {found}, expected {' or '.join(fingerprints)}); "
            f"transformers {transformers.__version__} is not supported for this class"
        )
    return make(module)


def output_projection(layer: Layer) -> nn.Linear | Conv1D:
    """The projection that a layer's context passes through, planned or not: in its attention, or beside it (BERT).

    Raises `Unsupported` where there is no plain one directly after the context.
    """
    form = vars(layer.attention).get("_form") or adapter_of(layer.attention).form
    projection = find_output_projection(layer, form)
    if projection is None:
        raise Unsupported(f"{type(layer.attention).__name__}: no plain output projection directly after its context")
    return projection


def find_output_projection(layer: Layer, form: AttentionForm) -> nn.Linear | Conv1D | None:
    """As `output_projection`, or None."""
    for attribute in form.output:
        module = layer.attention.get_submodule(attribute)
        if isinstance(module, nn.Linear | Conv1D):
            return module
        if not isinstance(module, nn.Dropout | nn.Identity):
            return None
    if form.output or not feeds_output(layer):
        return None
    beside = layer.parent.get_submodule("output.dense")
    return beside if is_plain_linear(beside) else None
