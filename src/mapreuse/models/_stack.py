"""Finds the stack of layers that a plan applies to, and the attention of each layer."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass

from torch import nn

from mapreuse.models._source import (
    Unsupported,
    body_of,
    calls_with_kwargs,
    count_calls,
    definition_of,
    forward_of,
    original_class,
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
        path: path of its attention inside the layer.
        attention: its attention module.
        cross: whether this is its cross-attention.
    """

    layer: nn.Module
    path: str
    attention: nn.Module
    cross: bool = False

    @property
    def parent(self) -> nn.Module:
        """The module that holds the attention module."""
        return self.layer.get_submodule(self.path.rpartition(".")[0])


@dataclass(frozen=True)
class Stack:
    """A module that runs a list of layers one after the other.

    Attributes:
        module: the module.
        list_name: name of its attribute with the layers ("" if it is itself an `nn.Sequential` of layers).
        layers: its layers, in order.
    """

    module: nn.Module
    list_name: str
    layers: tuple[Layer, ...]

    @property
    def cls(self) -> type[nn.Module]:
        """The class of the module, also under a plan."""
        return original_class(self.module)


def check_model(model: object) -> None:
    """Raise `ValueError` unless this is a module; a path, for example, is not."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected a model, a torch.nn.Module, got {type(model).__name__}; open a directory by from_pretrained "
            "of transformers or by mapreuse.load"
        )


def find_stack(model: nn.Module, attention: str = "self") -> Stack:
    """The only stack of attention layers in `model`.

    Args:
        model: the model, or a part of it.
        attention: "self" or "cross"; which attention of each layer is meant.

    Raises:
        Unsupported: if there is none, if there are several, or if a layer has more than one such attention.
    """
    check_model(model)
    if attention not in ("self", "cross"):
        raise ValueError(f"attention must be 'self' or 'cross', got {attention!r}")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if _is_list(module) and all(_attentions(layer, attention) for layer in _elements(module))
    ]
    # A list inside a layer of another list is a stack; the outer list holds its stages.
    innermost = [(name, layers) for name, layers in lists if not any(n.startswith(f"{name}.") for n, _ in lists)]
    cls_name = type(model).__name__
    if not innermost:
        if attention == "cross":
            raise Unsupported(f"{cls_name} holds no list of layers with cross-attention in every layer")
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
    found = []
    for index, layer in enumerate(_elements(layers)):
        attentions = _attentions(layer, attention)
        if len(attentions) != 1:
            raise Unsupported(
                f"layer {index} ({type(layer).__name__}) holds {len(attentions)} {attention}-attentions "
                f"({', '.join(path for path, _ in attentions)}), expected one"
            )
        found.append(Layer(layer, *attentions[0], cross=attention == "cross"))
    return Stack(model.get_submodule(path), list_name, tuple(found))


def _is_list(module: nn.Module) -> bool:
    """True for a list of layers, and for a sequence of two or more layers of one class."""
    if type(module) is nn.Sequential or (isinstance(module, nn.Sequential) and "_map_reuse" in vars(module)):
        return len(module) > 1 and len({type(layer) for layer in module}) == 1
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _elements(layers: nn.Module) -> list[nn.Module]:
    """The elements of a list. A module that the list holds twice appears twice."""
    return [layer for layer in layers._modules.values() if layer is not None]


def _attentions(layer: nn.Module, attention: str = "self") -> list[tuple[str, nn.Module]]:
    """The innermost modules of a layer whose class is named attention: self-attentions, or cross-attentions."""
    named = {
        path: module
        for path, module in layer.named_modules()
        if "attention" in type(module).__name__.lower() and any(True for _ in module.children())
    }
    found = []
    for path, module in named.items():
        holds_another = any(other.startswith(f"{path}." if path else "") and other != path for other in named)
        words = f"{path} {type(module).__name__}".lower()
        is_cross = bool(
            re.search("cross|encoder_attn|encdec|encoder_decoder", words)
            or getattr(module, "is_cross_attention", False)
        )
        if not holds_another and is_cross == (attention == "cross"):
            found.append((path, module))
    return found


def maps_travel_by_keyword(stack: Stack) -> bool:
    """True if every module from the stack down to an attention module passes its keyword arguments on.

    Otherwise `MapInjection` can pass the maps, provided that each module calls the next one in only one place.

    Raises:
        Unsupported: if neither is possible, or if the stack does not run its layers once each, in order.
    """
    by_keyword = stack.cls is not nn.Sequential and _loop_passes_keywords(stack)
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
    cls = stack.cls
    function = forward_of(cls)
    outer = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    loops = [
        node for node in outer if isinstance(node, ast.For) and _iterated(node.iter) == f"self.{stack.list_name}"
    ]
    if (
        len(loops) != 1
        or sum(loops[0] in ast.walk(loop) for loop in outer) > 1
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
    cls = stack.cls
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
    calls = []
    for layer in stack.layers:
        module, owner, called = layer.layer, type(layer.layer), ""
        for child in filter(None, layer.path.split(".")):
            if isinstance(module, nn.ModuleList):
                called = f"{called}[{child}]"
            else:
                owner, called = type(module), child
            module = module.get_submodule(child)
            if not isinstance(module, nn.ModuleList):
                calls.append((owner, called))
    return list(dict.fromkeys(calls))


def _iterated(expression: ast.expr) -> str:
    """`self.layers` for a loop over it, over its enumeration, or over its first elements."""
    match expression:
        case ast.Call(func=ast.Name(id="enumerate"), args=[inner]):
            return _iterated(inner)
        case ast.Subscript(value=inner, slice=ast.Slice(lower=None, step=None)):
            return _iterated(inner)
    return ast.unparse(expression)


def _runs_elsewhere(cls: type[nn.Module], function: ast.FunctionDef, loop: ast.For, list_name: str) -> bool:
    """True if the forward, or a method that it calls, also uses the list of layers outside the loop."""
    if cls is nn.TransformerEncoder:
        return False  # it only inspects its first layer, and its fingerprint is checked
    methods = [vars(cls).get(name) for name in self_attributes(function)]
    for tree in (function, *(definition_of(method) for method in methods if inspect.isfunction(method))):
        allowed = set(ast.walk(loop.iter))
        for node in ast.walk(tree):  # a call comes before its arguments
            match node:
                case ast.Call(func=ast.Name(id="len"), args=[argument]):
                    allowed.add(argument)
                case ast.Attribute(value=ast.Name(id="self"), attr=name) if name == list_name and node not in allowed:
                    return True
    return False


def feeds_output(layer: Layer) -> bool:
    """True if the layer passes the context to `output.dense`, next to its attention, as BERT's layers do.

    attention, … = self.self(…)
    … = self.output(attention, …)        and, in `output`:        … = self.dense(attention)
    """
    function = forward_of(type(layer.parent))
    child = layer.path.rpartition(".")[2]
    contexts, into_output = set(), []
    for node in ast.walk(function):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name) | ast.Tuple(elts=[ast.Name(id=name), *_])], value=ast.Call(func=called)
            ) if ast.unparse(called) == f"self.{child}":
                contexts.add(name)
            case ast.Call(func=called, args=[argument, *_]) if ast.unparse(called) == "self.output":
                into_output.append(ast.unparse(argument).removesuffix("[0]"))
    output = layer.parent._modules.get("output")
    if len(into_output) != 1 or into_output[0] not in contexts or output is None:
        return False
    parameter = parameter_names(type(output))[0]
    return re.match(rf"\w+ = self\.dense\({parameter}\)\n", body_of(type(output))) is not None
