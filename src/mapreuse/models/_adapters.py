"""The form of each attention module: from the adapter of its class, or else read from its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import transformers
from torch import nn

from mapreuse.models._deriving import probe
from mapreuse.models._reading import AttentionForm, read_attention
from mapreuse.models._source import Unsupported, fingerprint_of

_ADAPTERS: tuple[list[Callable[[nn.Module], AttentionForm | None]], ...] = [], []
"""The adapters for self-attention, and those for cross-attention."""


def register_attention(class_name: str, *fingerprints: str, cross: bool = False) -> Callable:
    """Register a function that makes the form of modules of one attention class of `transformers`.

    Args:
        class_name: name of the class.
        *fingerprints: `fingerprint_of` its forward in each supported version of `transformers`. A class with another
            forward is refused.
        cross: the form is that of cross-attention.
    """

    def register(adapter: Callable[[nn.Module], AttentionForm]) -> Callable[[nn.Module], AttentionForm]:
        def adapter_of_class(module: nn.Module) -> AttentionForm | None:
            if type(module).__name__ != class_name:
                return None
            check_fingerprint(type(module), fingerprints, f"transformers {transformers.__version__}")
            return adapter(module)

        register_style(adapter_of_class, cross=cross)
        return adapter

    return register


def register_style(adapter: Callable[[nn.Module], AttentionForm | None], *, cross: bool = False) -> None:
    """Register a function that makes the form of modules of a certain style, and returns None for others."""
    _ADAPTERS[cross].append(adapter)


def attention_form(module: nn.Module, *, cross: bool = False) -> AttentionForm:
    """The form of an attention module, in use as self-attention or as cross-attention.

    Raises:
        Unsupported: if its class cannot share maps. The message names the class and the reason.
    """
    cls = type(module)
    if "forward" in vars(module):
        raise Unsupported(
            f"{cls.__name__}: its forward was replaced on the module itself, by a device map or a patch; load the "
            "model on one device and without patches"
        )
    form = next(filter(None, (adapter(module) for adapter in _ADAPTERS[cross])), None)
    form = form or read_attention(cls, cross=cross)
    if form.derived is None:
        return form
    found = probe(module, form.derived)
    return replace(form, value=found.value or "", probe=found)


def check_fingerprint(cls: type[nn.Module], fingerprints: tuple[str, ...], version: str) -> None:
    """Raise `Unsupported` if the forward of a class has none of these fingerprints."""
    found = fingerprint_of(cls)
    if found not in fingerprints:
        raise Unsupported(
            f"{cls.__name__}: its forward has changed (fingerprint {found}, expected {' or '.join(fingerprints)}); "
            f"{version} is not supported for this class"
        )
