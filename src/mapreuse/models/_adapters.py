"""The families whose attention differs from the pattern, and how each is served."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mapreuse.models._reading import AttentionForm, Unsupported, forward_uses_interface, read_attention
from mapreuse.models._sharing import SharingAttention


@dataclass(frozen=True)
class Adapter:
    """How the attention modules of one class are converted.

    Attributes:
        form: attribute names of the module, by the part they play.
        computing: mixin with a forward of its own for layers that compute; None where the original forward serves.
        per_head: the projections and parameters of `form.query` and `form.key` that `computing` expects to hold only
            the heads that compute.
        fused: the projection that makes queries, keys and values together, as three blocks in this order; else None.
    """

    form: AttentionForm
    computing: type[SharingAttention] | None = None
    per_head: tuple[str, ...] = ()
    fused: str | None = None


_ADAPTERS: dict[str, tuple[str, Callable[[nn.Module], Adapter]]] = {}


def register_attention(class_name: str, *, fingerprint: str) -> Callable:
    """Register a function that makes the adapter of `transformers`' attention class of this name.

    Args:
        class_name: name of the class.
        fingerprint: `fingerprint_of` its forward; a class whose forward has changed is refused.
    """

    def register(make: Callable[[nn.Module], Adapter]) -> Callable[[nn.Module], Adapter]:
        _ADAPTERS[class_name] = fingerprint, make
        return make

    return register


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of an attention module. Raises `Unsupported`, naming its class and the reason."""
    cls = type(module)
    if cls.__name__ in _ADAPTERS:
        fingerprint, make = _ADAPTERS[cls.__name__]
        found = fingerprint_of(cls)
        if found != fingerprint:
            raise Unsupported(
                f"{cls.__name__}: its forward has changed (fingerprint {found}, expected {fingerprint}); "
                "this version of transformers is not supported"
            )
        return make(module)
    if not forward_uses_interface(cls):
        raise Unsupported(f"{cls.__name__}: its forward does not go through transformers' attention interface")
    return Adapter(read_attention(cls))


def fingerprint_of(cls: type[nn.Module]) -> str:
    """Twelve hexadecimal digits that change when the code of a class's forward changes (comments do not count)."""
    function = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:12]
