"""Reads the forward of an attention class: which projections make queries, keys, values and outputs.

Almost all attention modules of `transformers` follow one pattern: project, call `attention_interface`, project out.
This reads the pattern from the source code and does not rely on attribute names. It supports every class that follows
the pattern and refuses all others with the reason, including classes whose forward has changed.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn

from mapreuse.models._deriving import Derived, Probe, all_attributes, derive, with_methods_inlined
from mapreuse.models._normalising import normalised
from mapreuse.models._source import Unsupported, calls_with_kwargs, definition_of, forward_of, self_attributes

HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Names under which attention modules store the width of a head."""

_CALL = "attention_interface"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")
_TERMS = {"softcap", "s_aux"}
"""Further arguments that make a map: a cap of the scores, and sinks."""
INERT = {
    "is_causal",  # either part of the mask, or a parameter of the attention function
    "sliding_window",  # already part of the mask
    "deterministic",
    "position_ids",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "use_cache",
    "cache_position",
    "output_attention_mask",
    "token_type_ids",
    "num_items_in_batch",  # for the loss
}
"""Keyword arguments that do not change a map."""

CACHES = (
    "cache",  # transformers 5.24 and later
    "past_key_values",
    "past_key_value",
    "layer_past",
)
"""Arguments with the keys and values of earlier calls."""

OTHER_STATES = ("key_value_states", "encoder_hidden_states")
"""Arguments with states of another model. Layers that share maps refuse them."""

ABSENT = (*OTHER_STATES, "is_cross_attention")
"""Names that are None or False in every call of a layer that shares maps."""

_UPDATE = re.compile(r"(\w+), (\w+) = \w+\.update\(\1, \2, self\.(\w+)(?:, kwargs=kwargs)?\)")
_CHOICE_OF_CACHE = re.compile(
    rf"is_updated = .*|(?:{'|'.join(CACHES)}|cur\w+) = (?:{'|'.join(CACHES)})(?:\.self_attention_cache)?"
)
_CHOICE_OF_CROSS_CACHE = re.compile(
    r"is_updated = .*|\w+\.is_updated\[self\.\w+\] = True|\w+ = \w+(?:\.cross_attention_cache)?"
    r"|\w+ = \w+\.layers\[self\.\w+\]\.(?:keys|values)"
)
"""Statements for a cache: the update of the layer's part, the choice of that part, and reading it again."""

_NUM_HEADS = re.compile(r"heads|num_head|\bn_head\b")
"""In names of attributes and variables that hold a number of heads."""


@dataclass(frozen=True)
class AttentionForm:
    """How the attention modules of a class are converted. The first fields are attribute names, by role.

    Attributes:
        query: attributes that make queries but not values: projection, norms, biases.
        key: attributes that make keys, positional keys and score biases, but neither values nor queries.
        value: the module that projects values.
        output: the modules that the context passes through, in order.
        dropout: path of the attribute with the dropout probability of the attention weights, or None.
        bias: the attributes in `key` that contribute to the mask or the score bias, for all heads at once.
        output_dropout: attribute with the dropout probability of the output, or None.
        takes_maps: the forward passes its keyword arguments, including the maps, to the attention function.
        returns_map: the forward returns a pair, the output and the map; otherwise it returns only the output.
        fixed_heads: the forward works with one number of heads, not with queries and keys of some of them.
        fused: `value` makes queries, keys and values, as three blocks in this order.
        computing: mixin for layers that compute maps; None to keep the original forward.
        head_dim: width of a head if the module does not store it.
        cache: the attribute with the index of the layer in a cache; None if modules of the class take no cache.
        states: for cross-attention, the argument with the states that it attends to; None for self-attention.
        derived: the parts of the forward that a reusing layer runs; None if it runs `value` and `output` alone.
        probe: what a run of `derived` on the module shows.
        terms: arguments of the attention function that cap scores or hold sinks.
        normal: the source of the forward with a call of the attention interface, if it has none itself.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: str
    output: tuple[str, ...]
    dropout: str | None
    bias: tuple[str, ...] = ()
    output_dropout: str | None = None
    takes_maps: bool = True
    returns_map: bool = True
    fixed_heads: bool = False
    fused: bool = False
    computing: type[nn.Module] | None = None
    head_dim: int | None = None
    cache: str | None = None
    states: str | None = None
    derived: Derived | None = None
    probe: Probe | None = None
    terms: tuple[str, ...] = ()
    normal: str | None = None


@dataclass(frozen=True)
class _Step:
    """A statement of a forward. It is `certain` unless it depends on a condition that is unknown beforehand."""

    statement: ast.stmt
    certain: bool

    @property
    def first_line(self) -> str:
        return ast.unparse(self.statement).splitlines()[0]


def read_attention(cls: type[nn.Module], *, cross: bool = False) -> AttentionForm:
    """The form of an attention class, in use as self-attention or as cross-attention.

    Raises:
        Unsupported: if its forward does not follow the pattern.
    """
    return _form(cls, cls.forward, cross)  # type: ignore[arg-type]  # classes are hashable


@cache
def _form(cls: type[nn.Module], forward: Callable, cross: bool) -> AttentionForm:
    """The form of a class with this forward. It is read once; every layer of every copy of a model needs it."""
    function = _CrossAttends().visit(forward_of(cls)) if cross else forward_of(cls)
    states = next((one.arg for one in function.args.args if one.arg in OTHER_STATES), None) if cross else None
    if cross and states is None:
        raise Unsupported(f"{cls.__name__}: its forward takes no states to cross-attend to")
    normal = None
    if _CALL not in ast.unparse(function) and not cross:
        body = list(with_methods_inlined(cls, list(_simplified(function.body, cached=None))))
        function = normalised(cls, function, body)
        normal = ast.unparse(function)
    before, call, after = _split_at_call(cls, list(_straight_line(function.body)))
    arguments = _call_arguments(cls, call)
    hidden_states = function.args.args[1].arg
    _check_dimensions(cls, before, hidden_states)
    values = _inlined(cls, _resolve(arguments["value"], before))
    origins = {name: _with_methods(cls, _origins(before, argument)) for name, argument in arguments.items()}
    takes_maps = function.args.kwarg is not None and _CALL in calls_with_kwargs(call, function)
    terms = tuple(sorted(arguments.keys() & _TERMS))
    output: tuple[str, ...] = ()
    output_dropout, derived = None, None
    try:
        output, output_dropout, is_pair = _output(cls, call, after, normal is not None)
        if not is_pair:
            raise Unsupported(f"{cls.__name__}: it returns more or less than its output and weights")
        value = _value_projection(cls, values, states or hidden_states)
        if value in origins["query"] | origins["key"]:
            raise Unsupported(f"{cls.__name__}: {value} projects queries or keys together with values")
    except Unsupported:
        derived = derive(cls, function, list(_simplified(function.body)), call, states)
    if derived is not None:
        unused = tuple(sorted(all_attributes(cls, function.body) - derived.kept))
        dropout = _dropout(arguments.get("dropout"))
        return AttentionForm(
            *(unused, (), "", output, dropout),
            takes_maps=takes_maps,
            cache=_cache_index(cls, function, arguments, None, states),
            states=states,
            derived=derived,
            terms=terms,
            normal=normal,
        )
    kept = self_attributes(values) | set(output)
    query = origins["query"] - kept
    bias = (origins.get("attention_mask", set()) | origins.get("position_bias", set())) - kept - query
    key = origins["key"] - kept - query | bias
    names = (*origins["query"], *origins["key"], *(ast.unparse(step.statement) for step in before))
    return AttentionForm(
        query=tuple(sorted(query)),
        key=tuple(sorted(key)),
        value=value,
        output=output,
        dropout=_dropout(arguments.get("dropout")),
        bias=tuple(sorted(bias)),
        output_dropout=output_dropout,
        fixed_heads=any(map(_NUM_HEADS.search, names)),
        takes_maps=takes_maps,
        cache=_cache_index(cls, function, arguments, value, states),
        states=states,
        terms=terms,
        normal=normal,
    )


class _CrossAttends(ast.NodeTransformer):
    """Replaces conditions by their value in cross-attention."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        match node:
            case ast.Compare(left=ast.Name(id=name), ops=[op], comparators=[ast.Constant(value=None)]) if (
                name in OTHER_STATES
            ):
                return ast.Constant(isinstance(op, ast.IsNot))
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        is_read = isinstance(node.ctx, ast.Load)
        return ast.Constant(True) if node.id == "is_cross_attention" and is_read else node


def _cache_index(
    cls: type, function: ast.FunctionDef, arguments: dict[str, ast.expr], value: str | None, states: str | None
) -> str | None:
    """The attribute `i` if all that a cache changes is `keys, values = cache.update(keys, values, self.i)`.

    Otherwise None. `keys` and `values` must be what attention gets, and `values` the outputs of `value`; if that is
    None, they must be unchanged after the update. Cross-attention may also read them again.
    """
    without = {ast.unparse(step.statement) for step in _straight_line(function.body)}
    steps = list(_straight_line(function.body, cached=True))
    updates = []
    for index, step in enumerate(steps):
        text = ast.unparse(step.statement)
        if text in without or (_CHOICE_OF_CROSS_CACHE if states else _CHOICE_OF_CACHE).fullmatch(text):
            continue
        update = _UPDATE.fullmatch(text)
        if update is None or not (step.certain or states):
            return None
        updates.append((index, update))
    if len(updates) != 1:
        return None
    index, update = updates[0]
    if (update[1], update[2]) != (ast.unparse(arguments["key"]), ast.unparse(arguments["value"])):
        return None
    if states is not None:
        return update[3]
    if value is None:
        later = {name for step in steps[index + 1 :] for name in _assignment(step)[0]}
        return None if update[2] in later else update[3]
    projected = _inlined(cls, _resolve(ast.Name(update[2]), steps[:index]))
    try:
        same = _value_projection(cls, projected, function.args.args[1].arg) == value
    except Unsupported:
        return None
    return update[3] if same else None


def _simplified(body: Iterable[ast.stmt], cached: bool | None = False) -> Iterator[ast.stmt]:
    """The statements that run without cross-attention, with or without a cache or both. Other conditions stay."""
    for statement in body:
        if not isinstance(statement, ast.If):
            yield _Substitute({}).visit(statement)
            continue
        holds = _truth(statement.test, cached)
        if holds is None:
            statement.body = list(_simplified(statement.body, cached)) or [ast.Pass()]
            statement.orelse = list(_simplified(statement.orelse, cached))
            yield statement
        else:
            yield from _simplified(statement.body if holds else statement.orelse, cached)


def _straight_line(body: Iterable[ast.stmt], *, certain: bool = True, cached: bool = False) -> Iterator[_Step]:
    """The statements that run without cross-attention, with or without a cache, in order."""
    for statement in body:
        if not isinstance(statement, ast.If):
            yield _Step(statement, certain)
            continue
        holds = _truth(statement.test, cached)
        if holds is not False:
            yield from _straight_line(statement.body, certain=certain and holds is True, cached=cached)
        if holds is not True:
            yield from _straight_line(statement.orelse, certain=certain and holds is False, cached=cached)


def _truth(test: ast.expr, cached: bool | None = False) -> bool | None:
    """The value of a condition if all names in `ABSENT` are None or False; None if that does not determine it.

    Those in `CACHES` are None without a cache, not None with one, and either if `cached` is None.
    """
    match test:
        case ast.Constant(value=bool(value)):
            return value
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name) if name in ABSENT or (
            name in CACHES and cached is False
        ):
            return False
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            holds = _truth(operand, cached)
            return None if holds is None else not holds
        case ast.BoolOp(op=op, values=values):
            decisive = isinstance(op, ast.Or)
            operands = [_truth(value, cached) for value in values]
            if decisive in operands:
                return decisive
            return None if None in operands else not decisive
        case ast.Compare(left=ast.Name(id=name), ops=[op], comparators=[ast.Constant(value=None)]) if (
            name in ABSENT or (name in CACHES and cached is not None)
        ):
            return isinstance(op, ast.Is) != (cached is True and name in CACHES)
    return None


def _split_at_call(cls: type, steps: list[_Step]) -> tuple[list[_Step], ast.Assign, list[_Step]]:
    """The steps before the call of the attention function, the call, and the steps after it."""
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
    call, before = steps[index].statement, steps[:index]
    if not (steps[index].certain and isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)):
        raise Unsupported(f"{cls.__name__}: it does not always call {_CALL}, or not in a statement of its own")
    expected = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Raise | ast.Assert
    if unexpected := [step.first_line for step in before if not isinstance(step.statement, expected)]:
        raise Unsupported(f"{cls.__name__}: unexpected step before attention: {unexpected[0]}")
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
    if unknown := sorted(arguments.keys() - {*_ARGUMENTS, *_TERMS, "position_bias", "scaling", "dropout"} - INERT):
        raise Unsupported(f"{cls.__name__}: its attention takes {', '.join(unknown)}, which may change the map")
    if missing := [name for name in ("query", "key", "value") if name not in arguments]:
        raise Unsupported(f"{cls.__name__}: {_CALL} is called without {', '.join(missing)}")
    return arguments


def _assignment(step: _Step) -> tuple[set[str], ast.expr | None]:
    """The names that a step assigns, and their value. A method call on a name counts, as it may work in place."""
    match step.statement:
        case ast.Assign(targets=targets, value=value):
            return set().union(*map(_names, targets)), value
        case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value):
            return _names(target), value
        case ast.Expr(value=ast.Call(func=function) as value):
            return _names(function), value
    return set(), None


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)} - {"self"}


def _origins(before: list[_Step], expression: ast.expr) -> set[str]:
    """All attributes of the module that may contribute to an expression, found backwards through the steps."""
    expressions, names = [expression], _names(expression)
    for step in reversed(before):
        targets, value = _assignment(step)
        if value is None or not targets & names:
            continue
        made_from: list[ast.expr] = [value]
        statement = step.statement
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
            if isinstance(value, ast.Call) and "rotary" in ast.unparse(value.func):
                # Rotary embedding rotates queries and keys separately: each output depends on its own argument.
                elements = statement.targets[0].elts
                made_from = [arg for arg, t in zip(value.args, elements, strict=False) if _names(t) & names]
        elif step.certain and isinstance(statement, ast.Assign | ast.AnnAssign):
            names -= targets
        expressions += made_from
        names |= set().union(*map(_names, made_from))
    return set().union(*map(self_attributes, expressions))


def _with_methods(cls: type, names: set[str]) -> set[str]:
    """These attributes, and those that the methods among them mention."""
    methods = [getattr(cls, name, None) for name in names]
    return names.union(*(self_attributes(definition_of(method)) for method in methods if inspect.isfunction(method)))


class _Substitute(ast.NodeTransformer):
    """Replaces names by the expressions that they stand for."""

    def __init__(self, known: dict[str, ast.expr]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.known.get(node.id, node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        holds = _truth(node.test)
        if holds is None:
            return node
        return self.visit(node.body if holds else node.orelse)


def _resolve(expression: ast.expr, before: list[_Step]) -> ast.expr:
    """An expression in terms of the forward's arguments. Uncertain parts become names in angle brackets.

    For example `values.transpose(1, 2)` becomes `self.v_proj(hidden_states).view(*shape, -1, 8).transpose(1, 2)`.
    """
    known: dict[str, ast.expr] = {}
    for step in before:
        statement = step.statement
        names, value = _assignment(step)
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        plain = isinstance(statement, ast.Assign | ast.AnnAssign)
        if step.certain and plain and isinstance(target, ast.Name) and value is not None:
            known[target.id] = _Substitute(known).visit(copy.deepcopy(value))
            continue
        known |= {name: ast.Name(f"<{name}, after {step.first_line}>") for name in names}
    return _Substitute(known).visit(copy.deepcopy(expression))


def _check_dimensions(cls: type, before: list[_Step], hidden_states: str) -> None:
    """Hidden states must have the shape (batch, positions, width), not that of a grid."""
    for step in before:
        targets, value = getattr(step.statement, "targets", []), getattr(step.statement, "value", None)
        if value is None or ast.unparse(value) not in (f"{hidden_states}.shape", f"{hidden_states}.size()"):
            continue
        for target in targets:
            if isinstance(target, ast.Tuple) and len(target.elts) != 3:
                raise Unsupported(
                    f"{cls.__name__}: its hidden states have {len(target.elts)} dimensions, expected 3: "
                    "(batch, positions, width)"
                )


def _inlined(cls: type, expression: ast.expr) -> ast.expr:
    """The body of a method, if the expression calls one that only returns an expression."""
    match expression:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=arguments, keywords=[]):
            method = getattr(cls, name, None)
        case _:
            return expression
    match definition_of(method) if inspect.isfunction(method) else None:
        case ast.FunctionDef(
            args=ast.arguments(args=[_, *parameters]), body=[ast.Return(value=ast.expr() as returned)]
        ):
            if len(parameters) == len(arguments):
                known = {parameter.arg: value for parameter, value in zip(parameters, arguments, strict=True)}
                return _Substitute(known).visit(copy.deepcopy(returned))
    return expression


def _value_projection(cls: type, values: ast.expr, hidden_states: str) -> str:
    """The module `v` of `self.v(hidden_states).view(batch, positions, heads, head_dim).transpose(1, 2)`."""
    calls: list[ast.Call] = []
    expression = values
    while isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        if expression.func.attr != "contiguous":
            calls.append(expression)
        expression = expression.func.value
    match calls:
        case [
            ast.Call(func=ast.Attribute(attr="transpose"), args=[ast.Constant(value=1), ast.Constant(value=2)]),
            ast.Call(func=ast.Attribute(attr="view" | "reshape"), args=shape),
            ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[ast.Name(id=of)], keywords=[]),
        ] if of == hidden_states and _splits_heads(shape):
            return name
    raise Unsupported(
        f"{cls.__name__}: values are computed as {ast.unparse(values)}, not as one projection of {hidden_states}, "
        "reshaped into heads"
    )


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


def _output(
    cls: type, call: ast.Assign, after: list[_Step], transposes: bool
) -> tuple[tuple[str, ...], str | None, bool]:
    """The modules between the context and the return, a dropout at their end, and whether it returns two things.

    These are the output and the weights. In a rewritten forward, two transpositions of heads and positions cancel.
    """
    target = call.targets[0]
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
        raise Unsupported(f"{cls.__name__}: {_CALL} is not unpacked into context and weights")
    context, weights = (ast.unparse(element) for element in target.elts)
    modules: list[str] = []
    dropout: str | None = None
    for step in after:
        statement = step.statement
        if not step.certain:
            raise Unsupported(f"{cls.__name__}: a step after attention is conditional: {step.first_line}")
        name = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(statement, ast.Assign) and isinstance(name, ast.Name) and name.id != weights:
            if name.id != context and _is_shape(statement.value, context):
                continue
            found = None if dropout else _functional_dropout(statement.value, context)
            chain = [] if found else _chain(cls, statement.value, context, transposes)
        elif isinstance(statement, ast.Return) and statement.value is not None:
            returned = statement.value.elts if isinstance(statement.value, ast.Tuple) else [statement.value]
            is_pair = len(returned) == 2 and ast.unparse(returned[1]) in (weights, "None")
            found, chain = None, _chain(cls, returned[0], context, transposes)
        else:
            raise Unsupported(f"{cls.__name__}: unexpected step after attention: {step.first_line}")
        if dropout and chain:
            raise Unsupported(f"{cls.__name__}: unexpected step after dropout of the output: {step.first_line}")
        modules, dropout = modules + chain, dropout or found
        if isinstance(name, ast.Name):
            context = name.id
        else:
            return tuple(modules), dropout, is_pair
    raise Unsupported(f"{cls.__name__}: it returns nothing after attention")


def _is_shape(expression: ast.expr, context: str) -> bool:
    """True if the expression uses only the shape of the context and calls nothing else."""
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


def _chain(cls: type, expression: ast.expr, context: str, transposes: bool) -> list[str]:
    """[a, b] for `self.b(self.a(context))`, without reshaping."""
    match expression:
        case ast.Name(id=name) if name == context:
            return []
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[inner], keywords=[]):
            return [*_chain(cls, inner, context, transposes), name]
        case ast.Call(func=ast.Attribute(value=owner, attr="reshape" | "contiguous" | "view"), keywords=[]):
            return _chain(cls, owner, context, transposes)
        case ast.Call(func=ast.Attribute(value=owner, attr="transpose" | "permute"), args=order) if transposes and [
            ast.unparse(one) for one in order
        ] in (["1", "2"], ["0", "2", "1", "3"]):
            return _chain(cls, owner, context, transposes)
    raise Unsupported(f"{cls.__name__}: unexpected step after attention: {ast.unparse(expression)}")


def _dropout(expression: ast.expr | None) -> str | None:
    """`"dropout.p"` for `0.0 if not self.training else self.dropout.p`."""
    if expression is None:
        return None
    paths = [
        ast.unparse(node).removeprefix("self.")
        for node in ast.walk(expression)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.")
    ]
    return max((path for path in paths if path != "training"), key=len, default=None)
