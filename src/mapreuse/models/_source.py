"""The source of a class's forward, as a syntax tree."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap

from torch import nn


class Unsupported(ValueError):
    """This model cannot reuse maps; the message names the class and the reason."""


def forward_of(cls: type[nn.Module]) -> ast.FunctionDef:
    """The definition of a class's forward, decorators left aside. Raises `Unsupported` where there is no source."""
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        raise Unsupported(f"{cls.__name__}: the source of its forward cannot be read") from None
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise Unsupported(f"{cls.__name__}: its forward is not a plain method")
    return function


def fingerprint_of(cls: type[nn.Module]) -> str:
    """Twelve hexadecimal digits that change when the code of a class's forward changes (comments do not count)."""
    function = _without_docstring(forward_of(cls))
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:12]


def body_of(cls: type[nn.Module]) -> str:
    """The statements of a class's forward, comments and layout left aside."""
    return "\n".join(map(ast.unparse, _without_docstring(forward_of(cls)).body))


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return function


def self_attributes(tree: ast.AST) -> set[str]:
    """The attributes of `self` that a piece of code mentions."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def calls_with_kwargs(tree: ast.AST, function: ast.FunctionDef) -> list[str]:
    """What is called inside `tree` with the function's own keyword arguments: `layer` in `layer(x, **kwargs)`."""
    kwarg = function.args.kwarg
    return [
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and kwarg is not None
        and any(k.arg is None and ast.unparse(k.value) == kwarg.arg for k in node.keywords)
    ]


def calls_of(cls: type[nn.Module], called: str) -> int:
    """In how many places a class's forward calls `self.attention`, say; where nowhere, how many in its methods."""
    functions = [forward_of(cls)]
    methods = [method for name, method in vars(cls).items() if inspect.isfunction(method) and name != "forward"]
    functions += [ast.parse(textwrap.dedent(inspect.getsource(method))).body[0] for method in methods]  # type: ignore[misc]
    counts = [
        sum(isinstance(node, ast.Call) and ast.unparse(node.func) == called for node in ast.walk(function))
        for function in functions
    ]
    return counts[0] or sum(counts[1:])


def parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The parameters of a class's forward, in order, without `self`."""
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]
