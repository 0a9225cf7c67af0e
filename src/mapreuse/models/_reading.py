"""Reads the forward of an attention class: which projections make queries, keys, values and output.

`transformers` writes almost every attention module to one pattern: project, call `attention_interface`, project out.
Reading the pattern from the source, rather than trusting attribute names, serves every class that follows it and
refuses, with the reason, every class that does not, one whose forward has changed included.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn

from mapreuse.models._source import Unsupported, calls_with_kwargs, forward_of, self_attributes

HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Names under which attention modules keep the width of one head."""

_CALL = "attention_interface"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
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
CACHES = (
    "cache",  # transformers 5.24 and later
    "past_key_values",
    "past_key_value",
    "layer_past",
    "key_value_states",
    "encoder_hidden_states",
)
"""Arguments that hold keys and values of another call or of another model; a planned layer refuses them."""

ABSENT = (*CACHES, "is_cross_attention")
"""Arguments that no planned layer is called with."""


@dataclass(frozen=True)
class AttentionForm:
    """Attribute names of an attention module, by the part they play.

    Attributes:
        query: attributes that make queries, and not values: the projection, norms, biases.
        key: attributes that make keys, positional keys and biases of the scores, and neither values nor queries.
        value: the module that projects values.
        output: the modules that the context passes through, in order.
        dropout: path of the attribute that holds the dropout probability of the weights, or None.
        bias: those among `key` that enter the mask or the bias of the scores, for all heads at once.
        output_dropout: attribute that holds the probability with which the output is dropped at the end, or None.
        takes_maps: True where the forward hands its keyword arguments to the attention function, maps among them.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: str
    output: tuple[str, ...]
    dropout: str | None
    bias: tuple[str, ...] = ()
    output_dropout: str | None = None
    takes_maps: bool = True


@dataclass(frozen=True)
class _Step:
    """One statement of a forward; `certain` unless it stands under a condition that is not known beforehand."""

    statement: ast.stmt
    certain: bool


def read_attention(cls: type[nn.Module]) -> AttentionForm:
    """The form of an attention class. Raises `Unsupported` where its forward does not follow the pattern."""
    return _form(cls, cls.forward)  # type: ignore[arg-type]  # classes are hashable


@cache
def _form(cls: type[nn.Module], forward: Callable) -> AttentionForm:
    """Read once for a class and the forward it has: every layer of a model, and every copy, asks again."""
    function = forward_of(cls)
    before, call, after = _split_at_call(cls, list(_straight_line(function.body, certain=True)))
    arguments = _call_arguments(cls, call)
    hidden_states = function.args.args[1].arg
    _check_dimensions(cls, before, hidden_states)
    values = _inlined(cls, _resolve(arguments["value"], before))
    value = _value_projection(cls, values, hidden_states)
    output, output_dropout = _output(cls, call, after)
    kept = self_attributes(values) | set(output)
    made_from = {name: _with_methods(cls, _made_from(before, argument)) for name, argument in arguments.items()}
    if value in made_from["query"] | made_from["key"]:
        raise Unsupported(f"{cls.__name__}: {value} projects queries or keys together with values")
    query = made_from["query"] - kept
    bias = (made_from.get("attention_mask", set()) | made_from.get("position_bias", set())) - kept - query
    key = made_from["key"] - kept - query | bias
    return AttentionForm(
        query=tuple(sorted(query)),
        key=tuple(sorted(key)),
        value=value,
        output=output,
        dropout=_dropout(arguments.get("dropout")),
        bias=tuple(sorted(bias)),
        output_dropout=output_dropout,
        takes_maps=function.args.kwarg is not None and _CALL in calls_with_kwargs(call, function),
    )


def _straight_line(body: Iterable[ast.stmt], *, certain: bool) -> Iterator[_Step]:
    """The statements that run without a cache and without cross-attention, in order."""
    for statement in body:
        if not isinstance(statement, ast.If):
            yield _Step(statement, certain)
            continue
        holds = _truth(statement.test)
        if holds is not False:
            yield from _straight_line(statement.body, certain=certain and holds is True)
        if holds is not True:
            yield from _straight_line(statement.orelse, certain=certain and holds is False)


def _truth(test: ast.expr) -> bool | None:
    """The value of a condition where every name in `ABSENT` is None or False; None where that does not decide it."""
    if isinstance(test, ast.Name) and test.id in ABSENT:
        return False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        operand = _truth(test.operand)
        return None if operand is None else not operand
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)
        operands = [_truth(value) for value in test.values]
        if decisive in operands:
            return decisive
        return None if None in operands else not decisive
    if (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id in ABSENT
        and ast.unparse(test.comparators[0]) == "None"
    ):
        return isinstance(test.ops[0], ast.Is)
    return None


def _split_at_call(cls: type, steps: list[_Step]) -> tuple[list[_Step], ast.Assign, list[_Step]]:
    """The steps before the attention, the attention, and the steps after it."""
    calls = [
        index
        for index, step in enumerate(steps)
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == _CALL for node in ast.walk(step.statement))
    ]
    if not calls:
        raise Unsupported(f"{cls.__name__}: its forward does not go through transformers' attention interface")
    if len(calls) > 1:
        raise Unsupported(f"{cls.__name__}: its forward calls {_CALL} {len(calls)} times, expected once")
    index = calls[0]
    call = steps[index].statement
    if not (steps[index].certain and isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)):
        raise Unsupported(f"{cls.__name__}: it does not always call {_CALL}, or not as a step of its own")
    before = steps[:index]
    for step in before:
        if isinstance(step.statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Raise | ast.Assert):
            continue
        line = ast.unparse(step.statement).splitlines()[0]
        raise Unsupported(f"{cls.__name__}: unexpected step before attention: {line}")
    chosen = " ".join(ast.unparse(value) for names, value in map(_assignment, before) if _CALL in names and value)
    if not re.search(rf"{_REGISTRY}(\.get_interface\(|\[)self\.config\._attn_implementation", chosen):
        raise Unsupported(
            f"{cls.__name__}: {_CALL} is not chosen by self.config._attn_implementation from {_REGISTRY}"
        )
    return before, call, steps[index + 1 :]


def _call_arguments(cls: type, call: ast.Assign) -> dict[str, ast.expr]:
    assert isinstance(call.value, ast.Call)
    arguments = dict(zip(_ARGUMENTS, call.value.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in call.value.keywords if keyword.arg is not None}
    unknown = sorted(set(arguments) - _UNDERSTOOD)
    if unknown:
        raise Unsupported(f"{cls.__name__}: its attention takes {', '.join(unknown)}, which may change the map")
    missing = [name for name in ("query", "key", "value") if name not in arguments]
    if missing:
        raise Unsupported(f"{cls.__name__}: {_CALL} is called without {', '.join(missing)}")
    return arguments


def _assignment(step: _Step) -> tuple[set[str], ast.expr | None]:
    """The names that a step gives a value, and that value; a method called on a name may change it in place."""
    statement = step.statement
    if isinstance(statement, ast.Assign):
        return set().union(*map(_names, statement.targets)), statement.value
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        return _names(statement.target), statement.value
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return _names(statement.value.func), statement.value
    return set(), None


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)} - {"self"}


def _made_from(before: list[_Step], wanted: ast.expr) -> set[str]:
    """Every attribute of the module that the wanted expression may be made from, backwards through the steps."""
    expressions, names = [wanted], _names(wanted)
    for step in reversed(before):
        targets, value = _assignment(step)
        if value is None or not targets & names:
            continue
        made_from: list[ast.expr] = [value]
        statement = step.statement
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
            if isinstance(value, ast.Call) and "rotary" in ast.unparse(value.func):
                # Rotary embedding turns queries and keys side by side: each output comes from its own argument.
                elements = statement.targets[0].elts
                made_from = [arg for arg, t in zip(value.args, elements, strict=False) if _names(t) & names]
        elif step.certain and isinstance(statement, ast.Assign | ast.AnnAssign):
            names -= targets
        expressions += made_from
        names |= set().union(*map(_names, made_from))
    return set().union(*map(self_attributes, expressions))


def _with_methods(cls: type, names: set[str]) -> set[str]:
    """These attributes, and those that methods among them mention."""
    found = set(names)
    for name in names:
        method = getattr(cls, name, None)
        if inspect.isfunction(method):
            found |= self_attributes(ast.parse(textwrap.dedent(inspect.getsource(method))))
    return found


class _Substitute(ast.NodeTransformer):
    """Puts what each name stands for in its place."""

    def __init__(self, known: dict[str, ast.expr]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.known.get(node.id, node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        holds = _truth(node.test)
        if holds is None:
            return node
        return self.visit(node.body if holds else node.orelse)


def _resolve(wanted: ast.expr, before: list[_Step]) -> ast.expr:
    """The wanted expression in terms of the forward's arguments; what is uncertain becomes a name in angle brackets.

    For example `values.transpose(1, 2)` becomes `self.v_proj(hidden_states).view(*shape, -1, 8).transpose(1, 2)`.
    """
    known: dict[str, ast.expr] = {}
    for step in before:
        statement = step.statement
        names, value = _assignment(step)
        certain = step.certain and value is not None and isinstance(statement, ast.Assign | ast.AnnAssign)
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if certain and isinstance(target, ast.Name) and value is not None:
            known[target.id] = _Substitute(known).visit(_copied(value))
            continue
        known |= {name: ast.Name(f"<{name}, after {ast.unparse(statement).splitlines()[0]}>") for name in names}
    return _Substitute(known).visit(_copied(wanted))


def _copied(expression: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(expression), mode="eval").body


def _check_dimensions(cls: type, before: list[_Step], hidden_states: str) -> None:
    """Hidden states must be (batch, positions, width), not a grid."""
    for step in before:
        targets, value = getattr(step.statement, "targets", []), getattr(step.statement, "value", None)
        if value is not None and ast.unparse(value) in (f"{hidden_states}.shape", f"{hidden_states}.size()"):
            for target in targets:
                if isinstance(target, ast.Tuple) and len(target.elts) != 3:
                    raise Unsupported(
                        f"{cls.__name__}: its hidden states have {len(target.elts)} dimensions, not "
                        "(batch, positions, width)"
                    )


def _inlined(cls: type, expression: ast.expr) -> ast.expr:
    """A call of a method that only returns an expression, as that expression."""
    if not (isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute)):
        return expression
    method = getattr(cls, expression.func.attr, None)
    if ast.unparse(expression.func.value) != "self" or not inspect.isfunction(method) or expression.keywords:
        return expression
    function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != len(expression.args) + 1:
        return expression
    (statement,) = function.body if len(function.body) == 1 else (None,)
    if not isinstance(statement, ast.Return) or statement.value is None:
        return expression
    names = [argument.arg for argument in function.args.args[1:]]
    return _Substitute(dict(zip(names, expression.args, strict=True))).visit(_copied(statement.value))


def _value_projection(cls: type, values: ast.expr, hidden_states: str) -> str:
    """The module `v` of `self.v(hidden_states).view(batch, positions, heads, head_dim).transpose(1, 2)`."""
    refusal = Unsupported(
        f"{cls.__name__}: values are computed as {ast.unparse(values)}, not as one projection of {hidden_states}, "
        "reshaped into heads"
    )
    expression = values
    steps: list[tuple[str, list[ast.expr]]] = []
    while isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        owner, name = expression.func.value, expression.func.attr
        if isinstance(owner, ast.Name) and owner.id == "self":
            if len(expression.args) != 1 or expression.keywords or ast.unparse(expression.args[0]) != hidden_states:
                raise refusal
            if [step for step, _ in steps if step != "contiguous"] != ["transpose", "view"]:
                raise refusal
            shapes = {step: arguments for step, arguments in steps}
            if [ast.unparse(argument) for argument in shapes["transpose"]] != ["1", "2"]:
                raise refusal
            if not _splits_heads(shapes["view"]):
                raise refusal
            return name
        steps.append((name.replace("reshape", "view"), expression.args))
        expression = owner
    raise refusal


def _splits_heads(shape: list[ast.expr]) -> bool:
    """True for the shape (…, heads, head_dim)."""
    elements = list(shape)
    while len(elements) == 1:
        inner = elements[0].value if isinstance(elements[0], ast.Starred) else elements[0]
        if not isinstance(inner, ast.Tuple):
            return False
        elements = inner.elts
    heads, dim = (ast.unparse(element) for element in elements[-2:])
    return dim.removeprefix("self.") in HEAD_DIM and (heads == "-1" or "heads" in heads)


def _output(cls: type, call: ast.Assign, after: list[_Step]) -> tuple[tuple[str, ...], str | None]:
    """The modules between the context and the return, which must be `(output, weights)`, and a dropout at its end."""
    target = call.targets[0]
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
        raise Unsupported(f"{cls.__name__}: {_CALL} is not unpacked into context and weights")
    context, weights = (ast.unparse(element) for element in target.elts)
    modules: list[str] = []
    dropout: str | None = None
    for step in after:
        statement = step.statement
        text = ast.unparse(statement).splitlines()[0]
        if not step.certain:
            raise Unsupported(f"{cls.__name__}: a step after attention is conditional: {text}")
        name = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(statement, ast.Assign) and isinstance(name, ast.Name) and name.id != weights:
            if name.id != context and _is_shape(statement.value, context):
                continue
            found = None if dropout else _functional_dropout(statement.value, context)
            chain = [] if found else _chain(cls, statement.value, context)
            if dropout and chain:
                raise Unsupported(f"{cls.__name__}: unexpected step after dropout of the output: {text}")
            modules, dropout, context = modules + chain, dropout or found, name.id
        elif isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple):
            elements = statement.value.elts
            if len(elements) != 2 or ast.unparse(elements[1]) not in (weights, "None"):
                raise Unsupported(f"{cls.__name__}: it returns {ast.unparse(statement.value)}")
            chain = _chain(cls, elements[0], context)
            if dropout and chain:
                raise Unsupported(f"{cls.__name__}: unexpected step after dropout of the output: {text}")
            return (*modules, *chain), dropout
        else:
            raise Unsupported(f"{cls.__name__}: unexpected step after attention: {text}")
    raise Unsupported(f"{cls.__name__}: it returns nothing after attention")


def _is_shape(expression: ast.expr, context: str) -> bool:
    """True for an expression that takes nothing from the context but its shape, and calls nothing else."""
    shapes = (f"{context}.size()", f"{context}.shape")
    text = ast.unparse(expression)
    if not any(shape in text for shape in shapes):
        return False
    rest = ast.parse(text.replace(shapes[0], "()").replace(shapes[1], "()"), mode="eval")
    return context not in _names(rest.body) and not any(isinstance(node, ast.Call) for node in ast.walk(rest))


def _functional_dropout(expression: ast.expr, context: str) -> str | None:
    """The attribute `a` in `nn.functional.dropout(context, p=self.a, training=self.training)`."""
    found = re.fullmatch(
        rf"(?:nn\.functional|functional|F)\.dropout\({context}, p=self\.(\w+), training=self\.training\)",
        ast.unparse(expression),
    )
    return found[1] if found else None


def _chain(cls: type, expression: ast.expr, context: str) -> list[str]:
    """`self.b(self.a(context))` as [a, b]; reshaping is skipped."""
    if isinstance(expression, ast.Name) and expression.id == context:
        return []
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute) and not expression.keywords:
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
