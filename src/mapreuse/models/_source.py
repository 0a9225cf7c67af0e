"""The source code of a class's forward, as a syntax tree."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap

from torch import nn


class Unsupported(ValueError):
    """The model cannot share attention maps. The message names the class and the reason."""


def forward_of(cls: type[nn.Module]) -> ast.FunctionDef:
    """The definition of a class's forward, without what its decorators add.

    Raises:
        Unsupported: if Python cannot find the source code.
    """
    forward = inspect.unwrap(cls.forward)
    try:
        function = definition_of(forward) if inspect.isfunction(forward) else None
    except OSError:
        raise Unsupported(f"{cls.__name__}: the source code of its forward cannot be read") from None
    if not isinstance(function, ast.FunctionDef):
        raise Unsupported(f"{cls.__name__}: its forward is not a plain method")
    return function


def definition_of(function: object) -> ast.stmt:
    """The statement that defines a function."""
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # type: ignore[arg-type]


def fingerprint_of(cls: type[nn.Module]) -> str:
    """Twelve hexadecimal digits that identify the code of a class's forward, without comments and docstring."""
    function = _without_docstring(forward_of(cls))
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:12]


def body_of(cls: type[nn.Module]) -> str:
    """The statements of a class's forward, without comments and docstring, in a uniform layout."""
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
    """The callables in `tree` that receive the `**kwargs` of `function`: `layer` for `layer(x, **kwargs)`."""
    kwarg = function.args.kwarg
    return [
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and kwarg is not None
        and any(k.arg is None and ast.unparse(k.value) == kwarg.arg for k in node.keywords)
    ]


def count_calls(cls: type[nn.Module], called: str) -> int:
    """How many calls of, say, `self.attention` a class's forward contains; if none, how many its methods contain."""
    methods = [method for name, method in vars(cls).items() if inspect.isfunction(method) and name != "forward"]
    counts = [
        sum(isinstance(node, ast.Call) and ast.unparse(node.func) == called for node in ast.walk(function))
        for function in (forward_of(cls), *map(definition_of, methods))
    ]
    return counts[0] or sum(counts[1:])


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has in `transformers`, also under a plan."""
    cls = type(module)
    return vars(cls).get("_original_class", cls)


def parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The parameters of a class's forward, in order, without `self`."""
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]
