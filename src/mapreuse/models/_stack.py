"""Finds the stack of layers that a plan applies to, and the self-attention of each layer."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mapreuse.models._source import (
    Unsupported,
    calls_with_kwargs,
    count_calls,
    definition_of,
    forward_of,
    parameter_names,
    self_attributes,
)

ENCODER_STATES = "encoder_hidden_states"
"""The argument of a decoder that its cross-attention attends to."""


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        layer: the layer module.
        path: path of its self-attention inside the layer.
        attention: its self-attention module.
    """

    layer: nn.Module
    path: str
    attention: nn.Module

    @property
    def parent(self) -> nn.Module:
        """The module that holds the attention module."""
        return self.layer.get_submodule(self.path.rpartition(".")[0])


@dataclass(frozen=True)
class Stack:
    """A module that runs a list of layers one after the other.

    Attributes:
        path: path of that module inside the model ("" for the model itself).
        module: the module.
        list_name: name of its attribute with the layers ("" if it is itself an `nn.Sequential` of layers).
        layers: its layers, in order.
    """

    path: str
    module: nn.Module
    list_name: str
    layers: tuple[Layer, ...]

    @property
    def attention_paths(self) -> list[str]:
        """Paths of the attention modules inside the module that runs the layers."""
        names = self.module.get_submodule(self.list_name)._modules
        parts = ((self.list_name, name, layer.path) for name, layer in zip(names, self.layers, strict=True))
        return [".".join(filter(None, one)) for one in parts]


def find_stack(model: nn.Module) -> Stack:
    """The only stack of attention layers in `model`.

    Raises:
        Unsupported: if there is none, if there are several, or if a layer has more than one self-attention.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if _is_list(module) and all(map(_attentions, _elements(module)))
    ]
    # A list inside a layer of another list is a stack; the outer list holds its stages.
    innermost = [(name, layers) for name, layers in lists if not any(n.startswith(f"{name}.") for n, _ in lists)]
    cls_name = type(model).__name__
    if not innermost:
        raise Unsupported(f"{cls_name} holds no list of layers with attention in every layer")
    if len(innermost) > 1:
        paths = ", ".join(repr(name.rpartition(".")[0] or "the model itself") for name, _ in innermost)
        raise Unsupported(
            f"{cls_name} holds several stacks of layers: {paths}; pass the module that holds one of them "
            "(on the command line: --stack)"
        )
    name, layers = innermost[0]
    if stages := [outer for outer, _ in lists if name.startswith(f"{outer}.")]:
        raise Unsupported(
            f"{cls_name} runs the layers of {name!r} as a stage of {stages[0]!r}, perhaps more than once"
        )
    # A sequence runs its layers itself. The layers of a list are run by the module that holds the list.
    path, _, list_name = (name, "", "") if isinstance(layers, nn.Sequential) else name.rpartition(".")
    found = tuple(_layer(layer, index) for index, layer in enumerate(_elements(layers)))
    return Stack(path, model.get_submodule(path), list_name, found)


def _is_list(module: nn.Module) -> bool:
    """True for a list of layers, and for a sequence of two or more layers of one class."""
    if type(module) is nn.Sequential or (isinstance(module, nn.Sequential) and "_map_reuse" in vars(module)):
        return len(module) > 1 and len({type(layer) for layer in module}) == 1
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _elements(layers: nn.Module) -> list[nn.Module]:
    """The elements of a list. A module that the list holds twice appears twice."""
    return [layer for layer in layers._modules.values() if layer is not None]


def _attentions(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost modules of a layer whose class is named attention, without cross-attention."""
    named = [
        (path, module)
        for path, module in layer.named_modules()
        if "attention" in type(module).__name__.lower() and any(True for _ in module.children())
    ]
    return [
        (path, module)
        for path, module in named
        if not any(other.startswith(f"{path}." if path else "") and other != path for other, _ in named)
        and not _is_cross(path, module)
    ]


def _is_cross(path: str, module: nn.Module) -> bool:
    words = f"{path} {type(module).__name__}".lower()
    return "cross" in words or "encoder_attn" in words or bool(getattr(module, "is_cross_attention", False))


def _layer(layer: nn.Module, index: int) -> Layer:
    found = _attentions(layer)
    if len(found) != 1:
        paths = ", ".join(path for path, _ in found)
        raise Unsupported(
            f"layer {index} ({type(layer).__name__}) holds {len(found)} self-attentions ({paths}), expected one"
        )
    return Layer(layer, *found[0])


def maps_travel_by_keyword(stack: Stack) -> bool:
    """True if every module from the stack down to an attention module passes its keyword arguments on.

    Otherwise `MapInjection` can pass the maps, provided that each module calls the next one in only one place.

    Raises:
        Unsupported: if neither is possible, or if the stack does not run its layers once each, in order.
    """
    by_keyword = type(stack.module) is not nn.Sequential and _loop_passes_keywords(stack)
    for owner, called in _calls_inside(stack):
        function = forward_of(owner)
        if f"self.{called}" in calls_with_kwargs(function, function):
            continue
        calls = count_calls(owner, f"self.{called}")
        if calls != 1:
            raise Unsupported(
                f"{owner.__name__}: its forward does not pass **kwargs to {called}, and calls it in {calls} places, "
                "so no map can travel through it"
            )
        by_keyword = False
    return by_keyword


def _loop_passes_keywords(stack: Stack) -> bool:
    cls = type(stack.module)
    function = forward_of(cls)
    loops = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For) and _iterated(node.iter) == f"self.{stack.list_name}"
    ]
    if (
        len(loops) != 1
        or _is_repeated(function, loops[0])
        or _runs_elsewhere(cls, function, loops[0], stack.list_name)
    ):
        raise Unsupported(
            f"{cls.__name__}: its forward does not run its {stack.list_name} one after the other, once each"
        )
    targets = {node.id for node in ast.walk(loops[0].target) if isinstance(node, ast.Name)}
    called = {ast.unparse(node.func) for node in ast.walk(loops[0]) if isinstance(node, ast.Call)}
    if not targets & called:
        raise Unsupported(f"{cls.__name__}: its forward does not call its {stack.list_name} in their loop")
    return bool(targets & set(calls_with_kwargs(loops[0], function)))


def cross_attends_beside(stack: Stack) -> bool:
    """True if the encoder states passed to the stack cannot reach its self-attentions.

    The modules on the way to a self-attention may compare them with None, and may pass them to other modules.
    """
    cls = type(stack.module)
    if ENCODER_STATES not in parameter_names(cls):
        return False
    passed_in_loop = any(
        ENCODER_STATES in ast.unparse(node) for node in forward_of(cls).body if isinstance(node, ast.For)
    )
    layer_classes = {type(layer.layer) for layer in stack.layers}
    if passed_in_loop and not all(ENCODER_STATES in parameter_names(one) for one in layer_classes):
        return False
    return not any(_passes_states_to(owner, f"self.{called}") for owner, called in _calls_inside(stack))


def _passes_states_to(owner: type[nn.Module], attention: str) -> bool:
    """True unless every use of the encoder states in a forward is harmless."""
    function = forward_of(owner)
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if not (isinstance(node, ast.Name) and node.id == ENCODER_STATES):
            continue
        parent = parents[node]
        if isinstance(parent, ast.keyword):
            parent = parents[parent]
        if isinstance(parent, ast.Compare):
            continue
        called = ast.unparse(parent.func) if isinstance(parent, ast.Call) else ""
        if not called.startswith("self.") or called == attention:
            return True
    return False


def _calls_inside(stack: Stack) -> list[tuple[type[nn.Module], str]]:
    """The classes from the layers down to their attention, each with the attribute that it calls."""
    return list(dict.fromkeys(pair for layer in stack.layers for pair in _calls_inside_layer(layer)))


def _calls_inside_layer(layer: Layer) -> Iterator[tuple[type[nn.Module], str]]:
    module, owner, called = layer.layer, type(layer.layer), ""
    for child in filter(None, layer.path.split(".")):
        if isinstance(module, nn.ModuleList):
            called = f"{called}[{child}]"
        else:
            owner, called = type(module), child
        module = module.get_submodule(child)
        if not isinstance(module, nn.ModuleList):
            yield owner, called


def _iterated(expression: ast.expr) -> str:
    """`self.layers` for a loop over it, over its enumeration, or over its first elements."""
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "enumerate" and len(expression.args) == 1:
        return _iterated(expression.args[0])
    part = expression.slice if isinstance(expression, ast.Subscript) else None
    if isinstance(expression, ast.Subscript) and isinstance(part, ast.Slice) and part.lower is part.step is None:
        return _iterated(expression.value)
    return ast.unparse(expression)


def _runs_elsewhere(cls: type[nn.Module], function: ast.FunctionDef, loop: ast.For, list_name: str) -> bool:
    """True if the forward, or a method that it calls, also uses the list of layers outside the loop."""
    if cls is nn.TransformerEncoder:
        return False  # it only inspects its first layer, and its fingerprint is checked
    methods = [vars(cls).get(name) for name in self_attributes(function)]
    within = set(ast.walk(loop.iter))
    for tree in (function, *(definition_of(method) for method in methods if inspect.isfunction(method))):
        counted = {
            id(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "len" and node.args
        }
        for node in ast.walk(tree):
            mentioned = isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{list_name}"
            if mentioned and node not in within and id(node) not in counted:
                return True
    return False


def _is_repeated(function: ast.FunctionDef, loop: ast.For) -> bool:
    return any(
        loop is not outer and loop in ast.walk(outer)
        for outer in ast.walk(function)
        if isinstance(outer, ast.For | ast.While)
    )


def feeds_output(layer: Layer) -> bool:
    """True if the layer passes the context to `output.dense`, next to its attention, as BERT's layers do.

    attention, … = self.self(…)
    … = self.output(attention, …)        and, in `output`:        … = self.dense(attention)
    """
    function = forward_of(type(layer.parent))
    child = layer.path.rpartition(".")[2]
    contexts = {
        name.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == f"self.{child}"
        for name in [node.targets[0].elts[0] if isinstance(node.targets[0], ast.Tuple) else node.targets[0]]
        if isinstance(name, ast.Name)
    }
    into_output = [
        ast.unparse(node.args[0]).removesuffix("[0]") in contexts
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.output" and node.args
    ]
    output = getattr(layer.parent, "output", None)
    if into_output != [True] or not isinstance(output, nn.Module):
        return False
    inside = forward_of(type(output))
    first = next(
        step for step in inside.body if not (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
    )
    return isinstance(first, ast.Assign) and ast.unparse(first.value) == f"self.dense({inside.args.args[1].arg})"
