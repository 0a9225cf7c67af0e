"""Does a plan fit a model? Everything that `apply` refuses is refused here, before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models._adapters import Adapter, adapter_of, find_output_projection
from mapreuse.models._conversion import Conversion, Heads
from mapreuse.models._copying import copy_with_same_weights
from mapreuse.models._layout import lay_out
from mapreuse.models._linear import is_plain_linear
from mapreuse.models._packed import unpacked
from mapreuse.models._reading import HEAD_DIM
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Layer, Stack, find_stack
from mapreuse.plan import ReusePlan

_KIND = (
    "is_causal",
    "sliding_window",
    "layer_type",
    "attention_type",
    "is_sliding",
    "use_rope",
    "is_local_attention",
    "window_size",
    "shift_size",
)
"""Attributes that say which mask and which positions a layer's map is computed with."""

_PLAIN_MODULES = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")


def check(model: nn.Module, stack: Stack, plan: ReusePlan) -> list[Conversion]:
    """How each layer is to be converted. Raises `ValueError` where the plan or the model rules it out."""
    adapters = []
    for index, layer in enumerate(stack.layers):
        adapters.append(adapter_of(layer.attention))
        _check_projections(f"layer {index}", layer, adapters[index])
    if plan.num_layers != len(stack.layers):
        raise ValueError(
            f"the plan speaks of {plan.num_layers} layers, but {type(stack.module).__name__} has {len(stack.layers)}"
        )
    shaped = []
    for index, (layer, adapter) in enumerate(zip(stack.layers, adapters, strict=True)):
        name = f"layer {index} ({type(layer.attention).__name__})"
        if adapter.interface:
            _check_implementation(name, layer.attention)
        heads = heads_of(name, layer.attention, adapter)
        _check_heads(name, plan, index, heads)
        output = find_output_projection(layer, adapter.form)
        shaped.append((name, layer, adapter, heads, output, _inseparable(layer.attention, adapter, heads)))
    owners = _owners(model)
    separable = [
        reason is None and output is not None and all(len(owners[id(p)]) == 1 for p in output.parameters())
        for *_, output, reason in shaped
    ]
    conversions = []
    for index, (name, layer, adapter, heads, output, reason) in enumerate(shaped):
        layout = lay_out(plan, index, heads.num_heads, heads.num_value_heads, separable)
        if 0 < layout.computing < layout.num_heads and reason is not None:
            raise Unsupported(f"{name}: {reason}")
        if output is None and layout.reorders:
            raise Unsupported(
                f"{name}: no plain output projection directly after its context, so its heads cannot be reordered"
            )
        conversions.append(Conversion(layer, adapter, heads, layout, output))
    for index, conversion in enumerate(conversions):
        for source in plan.sources(index):
            _check_alike(stack, index, conversion, source, conversions[source])
    _check_untied(owners, conversions)
    return conversions


def _check_projections(name: str, layer: Layer, adapter: Adapter) -> None:
    """Projections must be plain: a wrapper (LoRA) or another storage (quantised) would be cut apart wrongly."""
    form, attention = adapter.form, layer.attention
    for attribute in dict.fromkeys((*form.query, *form.key, form.value, *form.output)):
        parameter, module = attention._parameters.get(attribute), attention._modules.get(attribute)
        needed = attribute == form.value or attribute in form.output
        if module is None:
            if needed:
                raise Unsupported(f"{name}: {type(attention).__name__}.{attribute} is not a module")
            stored = [] if parameter is None else [parameter]
        else:
            cls = type(module)
            plain = is_plain_linear(module) or (attribute != form.value and cls.__module__.startswith(_PLAIN_MODULES))
            if not plain or "forward" in vars(module):
                raise Unsupported(
                    f"{name}: {attribute} is a {cls.__module__}.{cls.__name__}, not a plain projection; merge "
                    "adapters (merge_and_unload), load the model unquantised and on one device before reusing maps"
                )
            if is_plain_linear(module) and module._parameters.get("weight") is None:
                raise Unsupported(f"{name}: the weight of {attribute} is not a parameter, but made from others")
            stored = list(module.parameters())
        for one in stored:
            if type(one) is not nn.Parameter:
                raise Unsupported(
                    f"{name}: {attribute} is stored as {type(one).__name__}; "
                    "load the model unquantised and unsharded before reusing maps"
                )


def _check_implementation(name: str, attention: nn.Module) -> None:
    config: Any = getattr(attention, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        raise Unsupported(
            f"{name} runs attention as {implementation!r}; load it with attn_implementation='sdpa' or 'eager'"
        )


def heads_of(name: str, attention: nn.Module, adapter: Adapter) -> Heads:
    """The geometry of an attention module that is not planned yet. Raises `Unsupported` where it shows none."""
    named = (getattr(attention, name, None) for name in HEAD_DIM)
    head_dim = adapter.head_dim or next((dim for dim in named if isinstance(dim, int)), None)
    if head_dim is None:
        raise Unsupported(f"{name} names no head dimension ({', '.join(HEAD_DIM)})")
    value = _outputs_of(attention.get_submodule(adapter.form.value))
    if adapter.fused is not None:
        return Heads(value // 3 // head_dim, value // 3 // head_dim, head_dim)
    projections = [attention._modules.get(attribute) for attribute in adapter.form.query]
    queries = [_outputs_of(module) for module in projections if isinstance(module, nn.Linear | Conv1D)]
    if not queries:
        raise Unsupported(f"{name}: no query projection was found in {adapter.form.query}")
    num_heads, num_value_heads = queries[0] // head_dim, value // head_dim
    if num_heads * head_dim != queries[0] or num_value_heads * head_dim != value or num_heads % num_value_heads:
        raise Unsupported(f"{name}: {queries[0]} queries and {value} values do not make heads of {head_dim}")
    return Heads(num_heads, num_value_heads, head_dim)


def _outputs_of(projection: nn.Module) -> int:
    return projection.nf if isinstance(projection, Conv1D) else projection.out_features  # type: ignore[return-value]


def _check_heads(name: str, plan: ReusePlan, index: int, heads: Heads) -> None:
    source = plan.layers[index]
    if not isinstance(source, tuple):
        return
    if len(source) != heads.num_heads:
        raise ValueError(f"{name}: the plan speaks of {len(source)} heads, but the layer has {heads.num_heads}")


def _inseparable(attention: nn.Module, adapter: Adapter, heads: Heads) -> str | None:
    """Why some of its heads cannot compute without the others, or in another order; None where they can."""
    if adapter.fused is not None or adapter.computing is not None:
        return None
    form = adapter.form
    for attributes in (form.query, form.key):
        modules = {a: attention.get_submodule(a) for a in attributes if a in attention._modules}
        parameters = {a: attention._parameters[a] for a in attributes if a in attention._parameters}
        linear = [
            attribute
            for attribute, module in modules.items()
            if isinstance(module, nn.Linear) and is_plain_linear(module)
        ]
        if len(linear) != 1:
            return "partial reuse needs one plain projection each of queries and keys"
        for attribute, module in modules.items():
            shapes = {tuple(parameter.shape) for parameter in module.parameters()} or {()}
            separable = shapes == {(heads.head_dim,)} or type(module) in (nn.Identity, nn.Dropout)
            if attribute in form.bias or (attribute not in linear and not separable):
                return f"{attribute} spans all heads, so they cannot compute in part"
        for attribute, parameter in parameters.items():
            if attribute in form.bias or parameter is None or tuple(parameter.shape) != (heads.head_dim,):
                return f"{attribute} spans all heads, so they cannot compute in part"
    return None


def _check_alike(stack: Stack, index: int, conversion: Conversion, source: int, of_source: Conversion) -> None:
    here, there = conversion.layer, of_source.layer
    if type(here.attention) is not type(there.attention) or conversion.heads != of_source.heads:
        raise ValueError(
            f"layer {index} cannot reuse layer {source}'s map: {type(here.attention).__name__} with "
            f"{conversion.heads.num_heads} heads, {type(there.attention).__name__} with {of_source.heads.num_heads}"
        )
    kinds: list[tuple[str, Any, Any]] = [
        (name, getattr(one, name, None), getattr(other, name, None))
        for one, other in ((here.attention, there.attention), (here.layer, there.layer))
        for name in _KIND
    ]
    types = getattr(getattr(stack.module, "config", None), "layer_types", None)
    if types is not None and len(types) == len(stack.layers):
        kinds.append(("layer_types", types[index], types[source]))
    for name, mine, other in kinds:
        if mine != other:
            raise ValueError(
                f"layer {index} ({name}={mine!r}) cannot reuse the map of layer {source} ({name}={other!r}): "
                "their masks or positions differ"
            )


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """By the identity of a parameter, the names it has: several where it is tied."""
    owners: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    return owners


def _check_untied(owners: dict[int, set[str]], conversions: list[Conversion]) -> None:
    for index, conversion in enumerate(conversions):
        changed = [conversion.layer.attention]
        if conversion.layout.reorders and conversion.output is not None:
            changed.append(conversion.output)
        for module in changed:
            for name, parameter in module.named_parameters():
                paths = sorted(owners[id(parameter)])
                if len(paths) > 1:
                    raise Unsupported(
                        f"layer {index}: {name} is tied ({', '.join(paths)}); untie it before reusing maps"
                    )


def possible_sources(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """For every layer of `model`, the earlier layers whose maps it could apply: those of its kind.

    Raises `ValueError`, as `apply` would, where the model cannot be served at all.
    """
    if type(find_stack(model).module) is nn.TransformerEncoder:
        model = copy_with_same_weights(model)  # its attention is unpacked where it stands
    with unpacked(find_stack(model)) as stack:
        conversions = check(model, stack, ReusePlan.full(len(stack.layers)))

    def fits(layer: int, source: int) -> bool:
        try:
            _check_alike(stack, layer, conversions[layer], source, conversions[source])
        except ValueError:
            return False
        return True

    return {layer: tuple(s for s in range(layer) if fits(layer, s)) for layer in range(len(conversions))}
