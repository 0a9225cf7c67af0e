"""Derives what a reusing layer runs from the forward of its class: the statements that its output still depends on.

A reusing layer needs no queries, keys and scores. What remains of a forward without them are the values, and what the
forward makes of the context. `Derived` holds both as functions. The rest of the forward is never run.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.console import one_line
from mapreuse.models._source import Unsupported, definition_of, self_attributes


@dataclass(frozen=True)
class Derived:
    """The parts of a forward that a reusing layer runs.

    Attributes:
        cls: the attention class.
        values_code, output_code: the source of `values` and `output`.
        required: arguments that the forward makes itself if they are None, and returns. A reusing layer cannot make
            them and needs them.
        kept: the attributes of the module that both functions use.
        of_values: those that `values` uses.
        projections: those that `values` calls with the hidden states.
        direct: `values` changes nothing about the hidden states before.
        values: `values(module, hidden_states)` makes the values, (batch, value heads, positions, value_dim).
        output: `output(module, context, weights, hidden_states, **arguments)` makes what the forward returns.
    """

    cls: type[nn.Module]
    values_code: str
    output_code: str
    required: tuple[str, ...]
    kept: frozenset[str]
    of_values: frozenset[str]
    projections: frozenset[str]
    direct: bool
    values: Callable[..., Tensor] = field(init=False, compare=False, repr=False)
    output: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, code in (("values", self.values_code), ("output", self.output_code)):
            found: dict[str, Any] = {}
            exec(compile(code, f"<{name} of {self.cls.__name__}>", "exec"), globals_of(self.cls), found)
            object.__setattr__(self, name, found[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, tuple(getattr(self, one.name) for one in fields(self) if one.init)


def globals_of(cls: type[nn.Module]) -> dict[str, Any]:
    """The global names of the module that defines a class's forward."""
    return inspect.unwrap(cls.forward).__globals__


def derive(
    cls: type[nn.Module], function: ast.FunctionDef, body: list[ast.stmt], call: ast.Assign, states: str | None = None
) -> Derived:
    """Derive the parts of a forward.

    Args:
        cls: the attention class.
        function: the definition of its forward.
        body: the statements of the forward that run in a layer that shares maps, with the call among them.
        call: the statement `context, weights = attention_interface(…)`.
        states: for cross-attention, the argument that the values are made from; None for the hidden states.

    Raises:
        Unsupported: if the values or the output depend on queries, keys or scores in a way that cannot be separated.
    """
    body = list(with_methods_inlined(cls, body))
    index = next((i for i, statement in enumerate(body) if statement is call), None)
    if index is None:
        raise Unsupported(f"{cls.__name__}: it calls attention_interface only under a condition")
    assert isinstance(call.value, ast.Call)
    value = call.value.args[3] if len(call.value.args) > 3 else _keyword(call.value, "value")
    target = call.targets[0]
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
        raise Unsupported(f"{cls.__name__}: attention_interface is not unpacked into context and weights")
    context, weights = (ast.unparse(element) for element in target.elts)
    parameters = [one.arg for one in (*function.args.args, *function.args.kwonlyargs)][1:]
    hidden_states = parameters[0]
    of_values = states or hidden_states
    if replaced := {context, weights} & set(parameters):
        raise Unsupported(f"{cls.__name__}: unexpected step: attention replaces its argument {', '.join(replaced)}")

    made = _needed(cls, [*body[:index], ast.Return(value)], set())
    if unknown := _from_outside(cls, made) - {of_values}:
        raise Unsupported(f"{cls.__name__}: its values depend on {', '.join(sorted(unknown))}")
    values = _source("values", [of_values], [], made)

    returned = next((node for node in body[index:] if isinstance(node, ast.Return)), None)
    if returned is None or returned.value is None:
        raise Unsupported(f"{cls.__name__}: it returns nothing after attention")
    passed_on = _elements(returned.value)
    before, required = [], []
    for statement in body[:index]:
        name = _made_if_none(statement, parameters)
        if name is not None and name in passed_on:
            required.append(name)
        else:
            before.append(statement)
    made_after = _needed(cls, [*before, call, *body[index + 1 :]], {context, weights}, call)
    needed = _from_outside(cls, made_after)
    if unknown := needed - {context, weights, *parameters}:
        raise Unsupported(f"{cls.__name__}: its output depends on {', '.join(sorted(unknown))}")
    more = sorted(needed & set(parameters) - {hidden_states})
    output = _source("output", [context, weights, hidden_states], more, made_after)
    aliases, direct = {of_values}, True
    for statement in made:
        changed = {
            one.id for one in ast.walk(statement) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
        }
        if isinstance(statement, ast.Expr):
            changed |= _all_names(statement)
        direct = direct and not changed & aliases
        if isinstance(statement, ast.Assign) and ast.unparse(statement.value) in aliases:
            aliases |= _stored(statement.targets[0])
    calls = {
        node.func.attr
        for statement in made
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "self"
        and len(node.args) == 1
        and ast.unparse(node.args[0]) in aliases
    }
    attributes = frozenset(all_attributes(cls, made))
    kept = attributes.union(all_attributes(cls, made_after))
    return Derived(cls, values, output, tuple(required), kept, attributes, frozenset(calls), direct)


def with_methods_inlined(cls: type, body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The body with `a, b = self.method(c)` replaced by the statements of methods that return a tuple at their end.

    What `a` depends on can then be distinguished from what `b` depends on.
    """
    for number, statement in enumerate(body):
        match statement:
            case ast.Assign(
                targets=[ast.Tuple(elts=targets)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=given, keywords=[]),
            ):
                method = inspect.getattr_static(cls, name, None)
                definition = definition_of(method) if inspect.isfunction(method) else None
            case _:
                definition = None
        match definition:
            case ast.FunctionDef(
                args=ast.arguments(args=[_, *parameters]),
                body=[*inner, ast.Return(value=ast.Tuple(elts=returned))],
            ) if len(parameters) == len(given) and len(returned) == len(targets):
                returns = (isinstance(node, ast.Return) for one in inner for node in ast.walk(one))
                if any(returns):
                    yield statement
                    continue
                own = {one.arg for one in parameters} | {
                    node.id
                    for one in inner
                    for node in ast.walk(one)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                }
                rename = _Rename({one: f"{name}_{number}_{one}" for one in own})
                for parameter, value in zip(parameters, given, strict=True):
                    yield ast.Assign([ast.Name(rename.names[parameter.arg], ast.Store())], value)
                yield from map(rename.visit, inner)
                for target, value in zip(targets, returned, strict=True):
                    yield ast.Assign([target], rename.visit(value))
            case _:
                yield statement


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _keyword(call: ast.Call, name: str) -> ast.expr:
    return next(keyword.value for keyword in call.keywords if keyword.arg == name)


def _elements(expression: ast.expr) -> list[str]:
    return [ast.unparse(one) for one in (expression.elts if isinstance(expression, ast.Tuple) else [expression])]


def _made_if_none(statement: ast.stmt, parameters: list[str]) -> str | None:
    """The parameter p of `if p is None: …`."""
    match statement:
        case ast.If(
            test=ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(value=None)]),
            orelse=[],
        ) if name in parameters:
            return name
    return None


def _needed(cls: type, body: list[ast.stmt], made: set[str], call: ast.stmt | None = None) -> list[ast.stmt]:
    """The statements that what the body returns depends on. `call` makes the names in `made` and is left out."""
    live: set[str] = set()
    return _slice(cls, body, live, made, call)


def _slice(cls: type, body: list[ast.stmt], live: set[str], made: set[str], call: ast.stmt | None) -> list[ast.stmt]:
    """Go backwards through a body. `live` holds the names that are needed after it, then those needed before it."""
    kept: list[ast.stmt] = []
    for statement in reversed(body):
        if statement is call:
            live -= made
        elif isinstance(statement, ast.Return):
            live.clear()
            live |= _loaded(statement)
            kept = [statement]
        elif isinstance(statement, ast.If):
            one, other = set(live), set(live)
            inside = _slice(cls, statement.body, one, made, call)
            otherwise = _slice(cls, statement.orelse, other, made, call)
            if inside or otherwise:
                live.clear()
                live |= one | other | _loaded(statement.test)
                kept.append(ast.If(statement.test, inside or [ast.Pass()], otherwise))
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if statement.value is None or not set().union(*map(_all_names, targets)) & live:
                continue
            if not isinstance(statement, ast.AugAssign):
                live -= set().union(*map(_stored, targets))
            live |= _loaded(statement.value) | set().union(*map(_owners, targets))
            if isinstance(statement, ast.AugAssign):
                live |= _all_names(statement.target)
            kept.append(statement)
        elif isinstance(statement, ast.Expr):
            function = statement.value.func if isinstance(statement.value, ast.Call) else None
            in_place = isinstance(function, ast.Attribute) and function.attr.endswith("_")
            if in_place and _all_names(function.value) & live:  # type: ignore[union-attr]
                live |= _loaded(statement)
                kept.append(statement)
        elif not isinstance(statement, ast.Raise | ast.Assert | ast.Pass):
            stored = {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            if stored & live:  # a loop, say, is kept as a whole
                of_loops = {
                    name for node in ast.walk(statement) if isinstance(node, ast.For) for name in _stored(node.target)
                }
                live |= _loaded(statement) - of_loops
                kept.append(statement)
    return kept[::-1]


def _all_names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} - {"self"}


def _loaded(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)} - {
        "self"
    }


def _stored(target: ast.expr) -> set[str]:
    """The names that an assignment to this target replaces, not those that it changes in place."""
    if isinstance(target, ast.Tuple | ast.List):
        return set().union(*map(_stored, target.elts))
    return {target.id} if isinstance(target, ast.Name) else set()


def _owners(target: ast.expr) -> set[str]:
    """The names that an assignment to this target changes in place, or uses as an index."""
    if isinstance(target, ast.Tuple | ast.List):
        return set().union(*map(_owners, target.elts))
    return set() if isinstance(target, ast.Name) else _all_names(target)


def _from_outside(cls: type, body: list[ast.stmt]) -> set[str]:
    """The names that a sliced body takes from outside, without global and built-in ones."""
    live: set[str] = set()
    _slice(cls, body, live, set(), None)
    nodes = [node for statement in body for node in ast.walk(statement)]
    inner = set().union(*(_all_names(node.target) for node in nodes if isinstance(node, ast.comprehension)))
    return live - inner - vars(builtins).keys() - globals_of(cls).keys()


def _source(name: str, first: list[str], more: list[str], body: list[ast.stmt]) -> str:
    """The source of a function with these parameters, the second ones by keyword only, which ignores all others."""
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg("self"), *map(ast.arg, first)],
        kwonlyargs=list(map(ast.arg, more)),
        kw_defaults=[ast.Constant(None)] * len(more),
        kwarg=ast.arg("unused"),
        defaults=[],
    )
    return ast.unparse(ast.fix_missing_locations(ast.FunctionDef(name, arguments, body, decorator_list=[])))


def all_attributes(cls: type, body: Iterable[ast.AST]) -> set[str]:
    """The attributes of the module that statements use, also through methods of the class."""
    found: set[str] = set()
    trees = list(body)
    while trees:
        new = self_attributes(trees.pop()) - found
        found |= new
        for name in new:
            method = inspect.getattr_static(cls, name, None)
            if inspect.isfunction(method):
                trees.append(definition_of(method))
    return found


@dataclass(frozen=True)
class Probe:
    """What a run of `Derived.values` on one position shows.

    Attributes:
        num_heads: number of heads of the map.
        num_value_heads: number of heads of the values.
        head_dim: width of a head of the values.
        value: the projection that makes the values, or None if they are more than outputs of one projection.
        rows: the outputs of that projection that are the values, head by head.
    """

    num_heads: int
    num_value_heads: int
    head_dim: int
    value: str | None = None
    rows: tuple[int, ...] = ()


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "encoder_attention_heads")
"""Names under which attention modules or configurations store the number of heads."""


@torch.no_grad()
def probe(module: nn.Module, derived: Derived) -> Probe:
    """Find the heads of the values of a module, and the rows of a projection that make them.

    A projection that alone makes the values gives the numbers of its outputs instead of them. If the values are such
    numbers, each once, they are those outputs.

    Raises:
        Unsupported: if the module does not store its number of heads, or the values are not (…, heads, …, head_dim).
    """
    name = type(module).__name__
    projections = {one: module._modules[one] for one in sorted(derived.projections & module._modules.keys())}
    linear = {one: found for one, found in projections.items() if isinstance(found, nn.Linear | Conv1D)}
    if not linear:
        raise Unsupported(f"{name}: no projection of its hidden states makes values")
    first = next(iter(linear.values()))
    width = first.weight.shape[0 if isinstance(first, Conv1D) else 1]
    states = torch.zeros(1, 1, width, dtype=first.weight.dtype, device=first.weight.device)
    alone = next(iter(linear)) if derived.direct and len(derived.of_values & module._modules.keys()) == 1 else None
    try:
        with linear[alone].register_forward_hook(_numbered) if alone else nullcontext():
            values = derived.values(module, states)
    except Exception as error:  # of a step that one position, or numbers of outputs, do not fit
        raise Unsupported(f"{name}: its values cannot be made from one position: {one_line(error)}") from error
    found = (getattr(owner, one, None) for owner in (module, getattr(module, "config", None)) for one in _HEADS)
    num_heads = next((one for one in found if isinstance(one, int)), None)
    if num_heads is None or values.dim() != 4 or values.shape[2] != 1 or num_heads % values.shape[1]:
        raise Unsupported(f"{name}: its values of shape {tuple(values.shape)} are not split into heads")
    heads = num_heads, values.shape[1], values.shape[3]
    if alone is None:
        return Probe(*heads)
    rows = values.flatten().tolist()
    if len(set(rows)) < len(rows) or not set(rows) <= set(range(linear[alone].weight.shape.numel() // width)):
        return Probe(*heads)
    return Probe(*heads, alone, tuple(map(int, rows)))


def _numbered(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return torch.arange(output.shape[-1], dtype=torch.float64, device="cpu").expand(output.shape)  # also on "meta"
