"""`apply`: one call that makes a model's layers share attention maps."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from mapreuse.maps import SharedMaps
from mapreuse.models._adapters import Adapter, adapter_of
from mapreuse.models._layout import LayerLayout, lay_out
from mapreuse.models._projections import HeadSubsetLinear, head_rows, take_inputs, take_outputs
from mapreuse.models._reading import Unsupported
from mapreuse.models._sharing import ARGUMENT, ReusingAttention, dispatch_here, sharing_class
from mapreuse.models._stack import Layer, Stack, find_stack
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

Model = TypeVar("Model", bound=nn.Module)

STRATEGIES = ("dense", "recompute")
_KIND = ("is_causal", "sliding_window", "layer_type", "attention_type", "is_sliding", "use_rope")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size")


@dataclass(frozen=True)
class Applied:
    """What `apply` leaves on the module that holds the stack."""

    plan: ReusePlan
    strategy: str
    list_name: str


@dataclass(frozen=True)
class _Heads:
    """Geometry of one attention module."""

    num_heads: int
    num_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class _Conversion:
    """All that is needed to convert one attention module, checked."""

    layer: Layer
    adapter: Adapter
    heads: _Heads
    layout: LayerLayout
    output: nn.Module | None


def apply(model: Model, plan: ReusePlan, *, strategy: str = "dense") -> Model:
    """Make the layers of `model` share attention maps as `plan` says, in place; returns the model.

    A reusing layer loses its query, key and positional-key projections. Heads are put in the order in which their
    maps are applied by permuting the rows of the value projection and the columns of the output projection.

    Args:
        model: a `transformers` model with one stack of layers, or the part of a larger model that holds one
            (`model.encoder`, `model.vision_model`). What is outside the stack is left as it is.
        plan: whose map each layer applies.
        strategy: how a shared map is carried: "dense" stores its weights (fastest, T×T memory), "recompute" keeps the
            source layer's queries and keys and applies fused attention (memory grows with T).

    Raises:
        ValueError: naming the class, the layer and the reason, where the plan does not fit the model or the model
            cannot be served. The model is then unchanged.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    in_force = plan_of(model)
    if in_force is not None:
        raise ValueError("the model reuses attention maps already; apply a plan to the original model instead")
    stack = find_stack(model)
    conversions = _check(model, stack, plan, strategy)
    before = sum(parameter.numel() for parameter in model.parameters())
    with _unchanged_on_failure(conversions):
        for conversion in conversions:
            _convert(conversion)
    list_name = next(n for n, m in stack.module.named_children() if isinstance(m, nn.ModuleList) and _holds(m, stack))
    stack.module._map_reuse = Applied(plan, strategy, list_name)  # type: ignore[assignment]
    stack.module.register_forward_pre_hook(_open_maps, with_kwargs=True)
    after = sum(parameter.numel() for parameter in model.parameters())
    reusing = sum(plan.reuses(layer) for layer in range(plan.num_layers))
    logger.info(
        "%d of %d layers reuse attention maps: %s of %s parameters removed",
        *(reusing, plan.num_layers, f"{before - after:,}", f"{before:,}"),
    )
    return model


def plan_of(model: nn.Module) -> ReusePlan | None:
    """The plan in force in `model`, or None."""
    applied = applied_to(model)
    return None if applied is None else applied[1].plan


def applied_to(model: nn.Module) -> tuple[str, Applied] | None:
    """Path of the module whose layers share maps, and what was applied to it; None where nothing was."""
    for path, module in model.named_modules():
        applied = module.__dict__.get("_map_reuse")
        if applied is not None:
            return path, applied
    return None


def _open_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the stack: every pass carries maps of its own."""
    applied: Applied = module._map_reuse  # type: ignore[assignment]
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a model that reuses attention maps has no cache: call it with use_cache=False")
    if "use_cache" in inspect.signature(module.forward).parameters:
        # A decoder would make a cache of its own accord; the caller's explicit wish for one is refused.
        if kwargs.get("use_cache"):
            raise ValueError(
                "a model that reuses attention maps has no cache: use_cache=True and generate() need one"
            )
        kwargs["use_cache"] = False
    layers = getattr(module, applied.list_name)
    checkpointing = module.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    if checkpointing:
        for layer in layers:
            arguments = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            if getattr(layer, "gradient_checkpointing", False) and arguments.get("use_reentrant", True):
                raise ValueError(
                    "reentrant gradient checkpointing would cut the gradient of shared maps: call "
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
    return args, kwargs | {ARGUMENT: SharedMaps(retain=checkpointing)}


def _holds(layers: nn.ModuleList, stack: Stack) -> bool:
    return len(layers) == len(stack.layers) and layers[0] is stack.layers[0].layer


def _check(model: nn.Module, stack: Stack, plan: ReusePlan, strategy: str) -> list[_Conversion]:
    if plan.num_layers != len(stack.layers):
        raise ValueError(
            f"the plan speaks of {plan.num_layers} layers, but {type(stack.module).__name__} has {len(stack.layers)}"
        )
    _check_implementation(stack)
    _check_untied(model, stack)
    conversions = []
    for index, layer in enumerate(stack.layers):
        name = f"layer {index}"
        adapter = adapter_of(layer.attention)
        _check_projections(name, layer, adapter)
        heads = _heads_of(name, layer.attention, adapter)
        _check_heads(name, plan, index, heads)
        layout = lay_out(plan, index, heads.num_heads, heads.num_value_heads, strategy)
        if 0 < layout.computing < layout.num_heads:
            _check_partial(name, layer.attention, adapter, heads)
        output = _output_projection(layer, adapter)
        if output is None and layout.order != tuple(range(layout.num_heads)):
            raise Unsupported(
                f"{name} ({type(layer.attention).__name__}): its output projection was not found, "
                "so heads cannot be rearranged"
            )
        conversions.append(_Conversion(layer, adapter, heads, layout, output))
    for index, conversion in enumerate(conversions):
        for source in plan.sources(index):
            _check_alike(index, conversion, source, conversions[source])
    return conversions


def _check_implementation(stack: Stack) -> None:
    config = getattr(stack.layers[0].attention, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        raise Unsupported(
            f"{type(stack.module).__name__} runs attention as {implementation!r}; "
            "load it with attn_implementation='sdpa' or 'eager'"
        )


def _check_untied(model: nn.Module, stack: Stack) -> None:
    owners: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    for index, layer in enumerate(stack.layers):
        for name, parameter in layer.attention.named_parameters():
            paths = sorted(owners[id(parameter)])
            if len(paths) > 1:
                raise Unsupported(f"layer {index}: {name} is tied ({', '.join(paths)}); untie it before reusing maps")


def _check_projections(name: str, layer: Layer, adapter: Adapter) -> None:
    form = adapter.form
    for attribute in dict.fromkeys((*form.query, *form.key, form.value, *form.output)):
        module = layer.attention.get_submodule(attribute) if attribute in layer.attention._modules else None
        if module is None or not any(True for _ in module.parameters()):
            continue
        if type(module) in (nn.Linear, Conv1D) or "norm" in type(module).__name__.lower():
            continue
        raise Unsupported(
            f"{name}: {attribute} is a {type(module).__module__}.{type(module).__name__}, not a plain projection; "
            "merge adapters (merge_and_unload) or load the model unquantised before reusing maps"
        )


def _heads_of(name: str, attention: nn.Module, adapter: Adapter) -> _Heads:
    head_dim = next((getattr(attention, a) for a in _HEAD_DIM if isinstance(getattr(attention, a, None), int)), None)
    cls = type(attention).__name__
    if head_dim is None:
        raise Unsupported(f"{name} ({cls}): it names no head dimension ({', '.join(_HEAD_DIM)})")
    value = _outputs_of(attention.get_submodule(adapter.form.value))
    if adapter.fused is not None:
        return _Heads(value // 3 // head_dim, value // 3 // head_dim, head_dim)
    projections = [attention.get_submodule(a) for a in adapter.form.query if a in attention._modules]
    queries = [_outputs_of(p) for p in projections if isinstance(p, nn.Linear | Conv1D)]
    if not queries:
        raise Unsupported(f"{name} ({cls}): no query projection was found in {adapter.form.query}")
    num_heads, num_value_heads = queries[0] // head_dim, value // head_dim
    if num_heads * head_dim != queries[0] or num_value_heads * head_dim != value or num_heads % num_value_heads:
        raise Unsupported(f"{name} ({cls}): {queries[0]} queries and {value} values do not make heads of {head_dim}")
    return _Heads(num_heads, num_value_heads, head_dim)


def _outputs_of(projection: nn.Module) -> int:
    return projection.nf if isinstance(projection, Conv1D) else projection.out_features  # type: ignore[return-value]


def _check_heads(name: str, plan: ReusePlan, index: int, heads: _Heads) -> None:
    source = plan.layers[index]
    if not isinstance(source, tuple):
        return
    if len(source) != heads.num_heads:
        raise ValueError(f"{name}: the plan speaks of {len(source)} heads, but the layer has {heads.num_heads}")
    for head, entry in enumerate(source):
        if entry is not None and entry[1] >= heads.num_heads:
            raise ValueError(f"{name}, head {head} reuses head {entry[1]}, but heads are 0–{heads.num_heads - 1}")


def _check_partial(name: str, attention: nn.Module, adapter: Adapter, heads: _Heads) -> None:
    """Some heads compute: their part of the projections must be separable."""
    if adapter.fused is not None or adapter.computing is not None:
        return
    cls = type(attention).__name__
    for attributes in (adapter.form.query, adapter.form.key):
        modules = {a: attention.get_submodule(a) for a in attributes if a in attention._modules}
        linear = [a for a, module in modules.items() if type(module) is nn.Linear]
        if len(linear) != 1:
            raise Unsupported(f"{name} ({cls}): partial reuse needs one plain projection each of queries and keys")
        for attribute, module in modules.items():
            sizes = {parameter.shape[0] for parameter in module.parameters()}
            if attribute not in linear and sizes and sizes != {heads.head_dim}:
                raise Unsupported(f"{name} ({cls}): {attribute} spans all heads, so they cannot compute in part")


def _output_projection(layer: Layer, adapter: Adapter) -> nn.Module | None:
    """Where the context is projected out: in the attention module, or beside it (BERT's `output.dense`)."""
    for attribute in adapter.form.output:
        module = layer.attention.get_submodule(attribute)
        if isinstance(module, nn.Linear | Conv1D):
            return module
    beside = getattr(getattr(layer.parent, "output", None), "dense", None)
    return beside if type(beside) is nn.Linear and not adapter.form.output else None


def _check_alike(index: int, conversion: _Conversion, source: int, of_source: _Conversion) -> None:
    here, there = conversion.layer.attention, of_source.layer.attention
    if type(here) is not type(there) or conversion.heads != of_source.heads:
        raise ValueError(
            f"layer {index} cannot reuse layer {source}'s map: {type(here).__name__} with {conversion.heads.num_heads} "
            f"heads, {type(there).__name__} with {of_source.heads.num_heads}"
        )
    for attribute in _KIND:
        mine, other = getattr(here, attribute, None), getattr(there, attribute, None)
        if mine != other:
            raise ValueError(
                f"layer {index} ({attribute}={mine!r}) cannot reuse the map of layer {source} "
                f"({attribute}={other!r}): their masks or positions differ"
            )


def _convert(conversion: _Conversion) -> None:
    attention, adapter, layout = conversion.layer.attention, conversion.adapter, conversion.layout
    form, dim = adapter.form, conversion.heads.head_dim
    own = list(layout.order[: layout.computing])
    if adapter.fused is not None:
        width = conversion.heads.num_heads * dim
        own_rows = head_rows(own, dim)
        value_rows = [2 * width + row for row in head_rows(layout.value_order, dim)]
        rows = own_rows + [width + row for row in own_rows] + value_rows
        if rows != list(range(3 * width)):
            take_outputs(attention.get_submodule(adapter.fused), rows)
    else:
        if layout.computing == 0:
            for attribute in (*form.query, *form.key):
                if attribute in attention._modules or attribute in attention._parameters:
                    delattr(attention, attribute)
        elif not layout.computes_all:
            _keep_heads(conversion, own)
        if layout.value_order != tuple(range(len(layout.value_order))):
            take_outputs(attention.get_submodule(form.value), head_rows(layout.value_order, dim))
    if layout.order != tuple(range(layout.num_heads)):
        assert conversion.output is not None
        take_inputs(conversion.output, head_rows(layout.order, dim))
    attention._layout = layout  # type: ignore[assignment]
    attention._form = form  # type: ignore[assignment]
    attention._num_value_heads = conversion.heads.num_value_heads  # type: ignore[assignment]
    mixin = adapter.computing if layout.computing else ReusingAttention
    if mixin is None:
        dispatch_here(attention)
    else:
        attention.__class__ = sharing_class(mixin, type(attention))


def _keep_heads(conversion: _Conversion, own: list[int]) -> None:
    """Keep the query and key projections of the heads that compute."""
    attention, adapter, layout = conversion.layer.attention, conversion.adapter, conversion.layout
    dim = conversion.heads.head_dim
    if adapter.computing is not None:
        for attribute in adapter.per_head:
            if attribute in attention._parameters:
                parameter = attention._parameters[attribute]
                assert parameter is not None
                setattr(
                    attention,
                    attribute,
                    nn.Parameter(parameter.detach()[own].clone(), parameter.requires_grad),
                )
            else:
                take_outputs(attention.get_submodule(attribute), head_rows(own, dim))
        return
    for attributes, heads in ((adapter.form.query, own), (adapter.form.key, list(layout.key_heads))):
        for attribute in attributes:
            module = attention._modules.get(attribute)
            if type(module) is nn.Linear:
                setattr(attention, attribute, HeadSubsetLinear(module, head_rows(heads, dim)))


@contextmanager
def _unchanged_on_failure(conversions: list[_Conversion]) -> Iterator[None]:
    """Put every module back as it was if converting one of them fails."""
    modules = [m for c in conversions for m in (*c.layer.attention.modules(), c.output) if m is not None]
    saved = [
        (module, module.__class__, dict(module.__dict__), dict(module._parameters), dict(module._modules))
        for module in modules
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, parameters, children in saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module.__dict__["_parameters"] = parameters
            module.__dict__["_modules"] = children
        raise
