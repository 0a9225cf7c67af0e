"""Rewrites a forward that computes its softmax itself into one that calls the attention interface.

    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_dim)
    if mask is not None:
        scores = scores + mask
    weights = self.dropout(nn.functional.softmax(scores, dim=-1))
    context = torch.matmul(weights, value)

becomes

    context, weights = attention_interface(self, query, key, value, attention_mask=bias, scaling=scaling, dropout=…)

with the factors of the scores in `scaling`, and their addends in `bias`. It can then be read like all others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mapreuse.models._deriving import globals_of
from mapreuse.models._source import Unsupported

CALL = "attention_interface"
_SOFTMAX = re.compile(
    r"(nn\.functional|functional|F|torch)\.softmax\(.*, (dim=)?-1(, dtype=.*)?\)|nn\.Softmax\(dim=-1\)\(.*\)",
    re.DOTALL,
)
_MATMUL = ("torch.matmul", "matmul", "torch.bmm")
_CAST = re.compile(r".*\.(to|type|type_as|float|view|reshape)", re.DOTALL)
_MINIMUM = re.compile(r".*(finfo|-inf|mask_value).*", re.DOTALL)
_CHOICE = f"{CALL} = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation)"


@dataclass(frozen=True)
class Normalised:
    """A rewritten forward, compiled with `attention_function` as the attention interface."""

    cls: type[nn.Module]
    code: str
    attention_function: Callable[..., Any] = field(repr=False)
    forward: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[str, Any] = {}
        names = {**globals_of(self.cls), CALL: self.attention_function}
        code = "\n".join(line for line in self.code.splitlines() if line.strip() != _CHOICE)
        exec(compile(code, f"<forward of {self.cls.__name__}>", "exec"), names, found)
        object.__setattr__(self, "forward", found["forward"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Normalised, (self.cls, self.code, self.attention_function)


def normalised(cls: type[nn.Module], function: ast.FunctionDef, body: list[ast.stmt]) -> ast.FunctionDef:
    """The definition of a forward with its softmax replaced by a call of the attention interface.

    Args:
        cls: the attention class.
        function: the definition of its forward.
        body: the statements of the forward that run in a layer that shares maps.

    Raises:
        Unsupported: if it computes its softmax in another way.
    """
    kwarg = None if function.args.kwarg is None else function.args.kwarg.arg
    rewriter = _Rewriter(cls, function.args.args[1].arg, kwarg)
    statements = list(rewriter.statements(body))
    if rewriter.context is None:
        raise rewriter.refusal()
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(one.arg) for one in function.args.args],
        kwonlyargs=[ast.arg(one.arg) for one in function.args.kwonlyargs],
        kw_defaults=function.args.kw_defaults,
        kwarg=None if function.args.kwarg is None else ast.arg(function.args.kwarg.arg),
        defaults=function.args.defaults,
    )
    return ast.fix_missing_locations(ast.FunctionDef("forward", arguments, statements, decorator_list=[]))


class _Rewriter:
    """Goes through the statements in order. `scores` and `weights` are the names that hold them so far.

    Products by `bmm` have heads in the dimension of the batch. They are moved to a dimension of their own. An addend
    with five dimensions is for scores that are split into (images, windows, heads, query, key).
    """

    def __init__(self, cls: type[nn.Module], hidden_states: str, kwarg: str | None) -> None:
        self.cls, self.kwarg = cls, kwarg
        self.with_heads = f".unflatten(0, ({hidden_states}.shape[0], -1))"
        self.of_windows = f".expand({hidden_states}.shape[0] // _addend.shape[1], -1, -1, -1, -1).flatten(0, 1)"
        self.is_flat = False
        self.aliases: list[str] = []
        self.scores: str | None = None
        self.weights: str | None = None
        self.context: str | None = None
        self.dropout = "0.0"
        self.factors = "_query", "_key"

    def refusal(self) -> Unsupported:
        return Unsupported(f"{self.cls.__name__}: its forward does not go through transformers' attention interface")

    def statements(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if self.scores and self.context is None:
                text = re.sub(rf"\b{self.scores}\.(dtype|device)\b", rf"{self.factors[0]}.\1", ast.unparse(statement))
                (statement,) = _parsed(text)
            if self.context is not None or not self._concerns(statement):
                yield statement
            elif isinstance(statement, ast.If) and all(isinstance(one, ast.Raise) for one in statement.body):
                continue
            elif isinstance(statement, ast.If) and self.scores is not None and self.weights is None:
                if statement.orelse:
                    raise self.refusal()
                yield ast.If(statement.test, list(self.statements(statement.body)), [])
            elif self.weights is None:
                yield from self._on_scores(statement)
            else:
                yield from self._on_weights(statement)

    def _concerns(self, statement: ast.stmt) -> bool:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if self.scores is None:
            return any(map(_product, ast.walk(statement))) and not isinstance(statement, ast.If)
        return bool(names & {self.scores, self.weights})

    def _on_scores(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                pass
            case ast.AugAssign(target=ast.Name(id=target), op=op, value=operand):
                value = ast.BinOp(ast.Name(target), op, operand)
            case _:
                raise self.refusal()
        while isinstance(value, ast.Call) and _CAST.fullmatch(_function(value)):
            value = value.func.value  # type: ignore[attr-defined]
        is_softmax = isinstance(value, ast.Call) and _SOFTMAX.fullmatch(ast.unparse(value)) and value.args
        yield from self._terms(value.args[0] if is_softmax else value)  # type: ignore[attr-defined]
        if is_softmax:
            self.weights = target
        else:
            self.scores = target

    def _terms(self, value: ast.expr) -> Iterator[ast.stmt]:
        """Statements that add the factors and addends of an expression to `scaling` and `bias`."""
        if self.scores is None and (product := _product(value)) is not None:
            self.scores = ""
            yield from self._start(value, product)
            return
        match value:
            case ast.Name(id=name) if name == self.scores:
                return
            case ast.Call(func=ast.Attribute(value=inner, attr="masked_fill"), args=[mask, minimum]) if (
                _MINIMUM.fullmatch(ast.unparse(minimum))
            ):
                yield from self._terms(inner)
                yield from self._masked(ast.unparse(mask))
                return
            case ast.Call(args=[mask, inner, minimum], keywords=[]) if _function(
                value
            ) == "torch.where" and _MINIMUM.fullmatch(ast.unparse(minimum)):
                yield from self._terms(inner)
                yield from self._masked(f"~({ast.unparse(mask)})")
                return
            case ast.Call(func=ast.Attribute(value=inner)) if _CAST.fullmatch(_function(value)):
                yield from self._terms(inner)
                return
            case ast.BinOp(left=inner, op=ast.Div() | ast.Mult() | ast.Add() as op, right=operand):
                pass
            case _:
                raise self.refusal()
        if self._is_operand(inner):
            if isinstance(op, ast.Div):
                raise self.refusal()
            inner, operand = operand, inner
        if not self._is_operand(operand):
            raise self.refusal()
        yield from self._terms(inner)
        text = ast.unparse(operand)
        yield from (
            self._added(text)
            if isinstance(op, ast.Add)
            else self._scaled(f"{'/' if isinstance(op, ast.Div) else '*'} ({text})")
        )

    def _start(self, value: ast.expr, product: tuple[str, str, str]) -> Iterator[ast.stmt]:
        query, key, scale = product
        self.is_flat = "bmm" in ast.unparse(value)
        if not self.is_flat and query.isidentifier() and key.isidentifier():
            self.factors = query, key
        else:
            heads = self.with_heads if self.is_flat else ""
            yield from _parsed(f"_query, _key = ({query}){heads}, ({key}){heads}")
        yield from _parsed("_scaling, _bias = 1.0, None")
        if isinstance(value, ast.Call) and _function(value).endswith(".baddbmm"):
            found = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
            yield from self._scaled(f"* ({found.get('alpha', '1.0')})")
            yield from self._added(f"{_function(value).removesuffix('.baddbmm')} * ({found.get('beta', '1.0')})")
        elif scale:
            yield from self._scaled(scale)

    def _scaled(self, by: str) -> Iterator[ast.stmt]:
        yield from _parsed(f"_scaling = _scaling {by}")
        yield from _parsed(f"_bias = None if _bias is None else _bias {by}")

    def _masked(self, mask: str) -> Iterator[ast.stmt]:
        yield from _parsed(f"_mask = {mask}")
        minimum = f"torch.finfo({self.factors[0]}.dtype).min"
        yield from self._added(
            f"torch.zeros(_mask.shape, dtype={self.factors[0]}.dtype, device=_mask.device)"
            f".masked_fill(_mask, {minimum})"
        )

    def _added(self, addend: str) -> Iterator[ast.stmt]:
        yield from _parsed(f"_addend = {addend}")
        if self.is_flat:
            yield from _parsed(f"_addend = _addend{self.with_heads} if _addend.dim() == 3 else _addend")
        yield from _parsed(f"_addend = _addend{self.of_windows} if _addend.dim() == 5 else _addend")
        yield from _parsed("_addend = _addend[(None,) * (4 - _addend.dim())]")
        yield from _parsed("_bias = _addend if _bias is None else _bias + _addend")

    def _is_operand(self, value: ast.expr) -> bool:
        names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
        return self.scores not in names and not any(map(_product, ast.walk(value)))

    def _on_weights(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                pass
            case _:
                raise self.refusal()
        text = ast.unparse(value)
        if found := re.fullmatch(rf"self\.(\w*drop\w*)\({self.weights}\)", text):
            self.dropout = f"self.{found[1]}.p"
            self._rename_weights(target)
            return
        if found := re.fullmatch(
            rf"(?:nn\.functional|functional|F)\.dropout\({self.weights}, p=(self\.\w+), training=self\.training\)",
            text,
        ):
            self.dropout = found[1]
            self._rename_weights(target)
            return
        if re.fullmatch(rf"{self.weights}\.(to|type|type_as|view|reshape)\(.*\)", text, re.DOTALL):
            self._rename_weights(target)
            return
        inside = [node for node in ast.walk(value) if self._is_context(node)]
        if len(inside) != 1:
            raise self.refusal()
        values = _operands(inside[0])[1]  # type: ignore[index]
        back = ".transpose(1, 2)"
        if self.is_flat:
            values, back = f"({values}){self.with_heads}", f"{back}.flatten(0, 1)"
        kwargs = "" if self.kwarg is None else f", **{self.kwarg}"
        if self.kwarg is not None:
            yield from _parsed(f"{self.kwarg}.pop('is_causal', None)")  # the original ignores it
        yield from _parsed(_CHOICE)
        yield from _parsed(
            f"_context, {self.weights} = {CALL}(self, {', '.join(self.factors)}, {values}, attention_mask=_bias, "
            f"scaling=_scaling, dropout={self.dropout} if self.training else 0.0, is_causal=False{kwargs})"
        )
        self.context = "_context"
        for alias in dict.fromkeys(name for name in self.aliases if name != self.weights):
            yield from _parsed(f"{alias} = {self.weights}")
        yield from _parsed(f"{target} = {ast.unparse(_Replace(inside[0], f'_context{back}').visit(value))}")

    def _rename_weights(self, name: str) -> None:
        assert self.weights is not None
        self.aliases.append(self.weights)
        self.weights = name

    def _is_context(self, node: ast.AST) -> bool:
        operands = _operands(node)
        return (
            operands is not None
            and re.fullmatch(rf"{self.weights}(\.(view|reshape)\(.*\))?", operands[0], re.DOTALL) is not None
        )


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: str) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.parse(self.new, mode="eval").body if node is self.old else self.generic_visit(node)


def _parsed(text: str) -> list[ast.stmt]:
    return ast.parse(text).body


def _function(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _operands(node: ast.AST) -> tuple[str, str] | None:
    """The factors of a matrix product."""
    match node:
        case ast.BinOp(left=left, op=ast.MatMult(), right=right):
            return ast.unparse(left), ast.unparse(right)
        case ast.Call(args=[left, right], keywords=[]) if _function(node) in _MATMUL:
            return ast.unparse(left), ast.unparse(right)
    return None


def _product(node: ast.AST) -> tuple[str, str, str] | None:
    """Queries, keys, and a factor such as "/ (x)", if this is the product of queries and transposed keys."""
    match node:
        case ast.Call(func=ast.Attribute(attr="baddbmm"), keywords=keywords):
            found = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
            if {"batch1", "batch2"} <= found.keys():
                return found["batch1"], f"{found['batch2']}.mT", ""
    operands = _operands(node)
    if operands is None:
        return None
    match = re.fullmatch(
        r"(.+)\.(?:transpose\((?:-1, -2|-2, -1|2, 3|3, 2|1, 2|2, 1)\)|mT)(?: / (.+))?", operands[1], re.DOTALL
    )
    return match and (operands[0], match[1], f"/ ({match[2]})" if match[2] else "")
