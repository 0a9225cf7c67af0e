"""Reads the forward of an attention class: which projections make queries, keys, values and output.

`transformers` writes almost every attention module to one pattern: project, call `attention_interface`, project out.
Reading the pattern from the source, rather than trusting attribute names, serves every class that follows it and
refuses, with the reason, every class that does not, one whose forward has changed included.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass

from torch import nn

_CALL = "attention_interface"
_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")
_UNDERSTOOD = {
    *_ARGUMENTS,
    "scaling",
    "dropout",
    "is_causal",
    "position_bias",
    "sliding_window",
    "output_attentions",
    "deterministic",
    "position_ids",
}
_ABSENT = ("past_key_values", "is_cross_attention")
"""Names whose branches are read as not taken: caches and cross-attention are refused at run time."""


class Unsupported(ValueError):
    """This attention cannot reuse maps; the message names the class and the reason."""


@dataclass(frozen=True)
class AttentionForm:
    """Attribute names of an attention module, by the part they play.

    Attributes:
        query: attributes that make queries, and not values: the projection, norms, biases.
        key: attributes that make keys, and neither values nor queries.
        value: the module that projects values.
        output: the modules that the context passes through, in order.
        dropout: path of the attribute that holds the dropout probability of the weights, or None.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: str
    output: tuple[str, ...]
    dropout: str | None


def read_attention(cls: type[nn.Module]) -> AttentionForm:
    """The form of an attention class. Raises `Unsupported` where its forward does not follow the pattern."""
    statements, hidden_states = _forward(cls)
    call, after = _split_at_call(cls, statements)
    before = statements[: statements.index(call)]
    arguments = _call_arguments(cls, call)
    slices = {name: _slice(before, arguments[name]) for name in ("query", "key", "value")}
    used = {name: _attributes(expressions) for name, expressions in slices.items()}
    value_modules = [name for name in _called(slices["value"]) if name in used["value"]]
    if len(value_modules) != 1:
        raise Unsupported(f"{cls.__name__}: values pass through {value_modules}, expected one projection")
    value = value_modules[0]
    if value in used["query"] | used["key"]:
        raise Unsupported(f"{cls.__name__}: {value} projects queries or keys together with values")
    _check_value(cls, slices["value"], value, hidden_states)
    output = _output(cls, call, after)
    kept = used["value"] | set(output)
    query = tuple(sorted(used["query"] - kept))
    key = tuple(sorted(used["key"] - kept - set(query)))
    return AttentionForm(query, key, value, output, _dropout(arguments.get("dropout")))


def forward_uses_interface(cls: type[nn.Module]) -> bool:
    """True for a module class whose own forward dispatches through `transformers`' attention interface."""
    try:
        return f"{_CALL}(" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def _forward(cls: type[nn.Module]) -> tuple[list[ast.stmt], str]:
    function = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body[0]
    assert isinstance(function, ast.FunctionDef)
    if function.args.kwarg is None:
        raise Unsupported(f"{cls.__name__}: its forward takes no **kwargs, so no map can be handed to it")
    return _straight_line(function.body), function.args.args[1].arg


def _straight_line(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run without a cache and without cross-attention."""
    statements: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If):
            test = ast.unparse(statement.test)
            branch = statement.orelse if any(name in test for name in _ABSENT) else None
            if branch is None:
                statements += _straight_line(statement.body) + _straight_line(statement.orelse)
            else:
                statements += _straight_line(branch)
        else:
            statements.append(statement)
    return statements


def _split_at_call(cls: type, statements: list[ast.stmt]) -> tuple[ast.Assign, list[ast.stmt]]:
    calls = [
        (index, statement)
        for index, statement in enumerate(statements)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Call)
        and ast.unparse(statement.value.func) == _CALL
    ]
    if len(calls) != 1:
        raise Unsupported(f"{cls.__name__}: its forward calls {_CALL} {len(calls)} times, expected once")
    index, call = calls[0]
    return call, statements[index + 1 :]


def _call_arguments(cls: type, call: ast.Assign) -> dict[str, ast.expr]:
    assert isinstance(call.value, ast.Call)
    arguments = dict(zip(_ARGUMENTS, call.value.args, strict=False))
    passes_kwargs = False
    for keyword in call.value.keywords:
        if keyword.arg is None:
            passes_kwargs = True
        else:
            arguments[keyword.arg] = keyword.value
    unknown = sorted(set(arguments) - _UNDERSTOOD)
    if unknown:
        raise Unsupported(f"{cls.__name__}: its attention takes {', '.join(unknown)}, which change the map")
    if not passes_kwargs:
        raise Unsupported(f"{cls.__name__}: its forward does not pass **kwargs on to {_CALL}")
    return arguments


def _slice(before: list[ast.stmt], wanted: ast.expr) -> list[ast.expr]:
    """Every expression that the wanted one is made from, backwards through the assignments."""
    expressions, names = [wanted], _names(wanted)
    for statement in reversed(before):
        if not isinstance(statement, ast.Assign):
            continue
        targets = {node.id for t in statement.targets for node in ast.walk(t) if isinstance(node, ast.Name)}
        if not targets & names:
            continue
        target, value = statement.targets[0], statement.value
        made_from: list[ast.expr] = [value]
        if isinstance(target, ast.Tuple):
            if isinstance(value, ast.Call) and "rotary" in ast.unparse(value.func):
                # Rotary embedding turns queries and keys side by side: each output comes from its own argument.
                made_from = [arg for arg, t in zip(value.args, target.elts, strict=False) if _names(t) & names]
        else:
            names -= targets
        expressions += made_from
        names |= set().union(*map(_names, made_from))
    return expressions[::-1]


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def _attributes(expressions: list[ast.expr]) -> set[str]:
    return {
        node.attr
        for expression in expressions
        for node in ast.walk(expression)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def _called(expressions: list[ast.expr]) -> list[str]:
    return [
        node.func.attr
        for expression in expressions
        for node in ast.walk(expression)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    ]


def _check_value(cls: type, expressions: list[ast.expr], value: str, hidden_states: str) -> None:
    """Values must be the projected hidden states, reshaped into heads and nothing else."""
    shaping = {"view", "reshape", "transpose", "contiguous", "size", "tuple", value}
    for expression in expressions:
        for node in ast.walk(expression):
            if isinstance(node, ast.BinOp) and "shape" not in ast.unparse(expression):
                raise Unsupported(f"{cls.__name__}: values are computed as {ast.unparse(expression)}")
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
                if name not in shaping:
                    raise Unsupported(f"{cls.__name__}: values pass through {name}")
    if not any(hidden_states in _names(expression) for expression in expressions):
        raise Unsupported(f"{cls.__name__}: values are not made from {hidden_states}")


def _output(cls: type, call: ast.Assign, after: list[ast.stmt]) -> tuple[str, ...]:
    """The modules between the context and the return, which must be `(output, weights)`."""
    target = call.targets[0]
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
        raise Unsupported(f"{cls.__name__}: {_CALL} is not unpacked into context and weights")
    context, weights = (ast.unparse(element) for element in target.elts)
    modules: list[str] = []
    for statement in after:
        text = ast.unparse(statement)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == context:
            modules += _chain(cls, statement.value, context)
        elif isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple):
            elements = statement.value.elts
            if len(elements) != 2 or ast.unparse(elements[1]) not in (weights, "None"):
                raise Unsupported(f"{cls.__name__}: it returns {ast.unparse(statement.value)}")
            modules += _chain(cls, elements[0], context)
        else:
            raise Unsupported(f"{cls.__name__}: unexpected step after attention: {text}")
    return tuple(modules)


def _chain(cls: type, expression: ast.expr, context: str) -> list[str]:
    """`self.b(self.a(context))` as [a, b]; reshaping is skipped."""
    if isinstance(expression, ast.Name) and expression.id == context:
        return []
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        owner, name = expression.func.value, expression.func.attr
        if isinstance(owner, ast.Name) and owner.id == "self" and len(expression.args) == 1:
            return [*_chain(cls, expression.args[0], context), name]
        if name in ("reshape", "contiguous", "view"):
            return _chain(cls, owner, context)
    raise Unsupported(f"{cls.__name__}: unexpected step after attention: {ast.unparse(expression)}")


def _dropout(expression: ast.expr | None) -> str | None:
    """`0.0 if not self.training else self.dropout.p` as "dropout.p"."""
    if expression is None:
        return None
    paths = [
        ast.unparse(node).removeprefix("self.")
        for node in ast.walk(expression)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.")
    ]
    return max((path for path in paths if path != "training"), key=len, default=None)
