"""Checks a plan against a model, and plans the conversion of each layer. Nothing is changed here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.models._adapters import attention_form
from mapreuse.models._attention_conversion import Conversion
from mapreuse.models._layout import lay_out
from mapreuse.models._optimize import is_optimized
from mapreuse.models._projections import HeadCounts, count_heads, is_plain_linear
from mapreuse.models._reading import AttentionForm
from mapreuse.models._snapshots import copy_with_same_weights
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Stack, find_stack
from mapreuse.models._torch_encoder import unpack
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
"""Attributes that determine the mask and the positions of a layer's map."""

_PLAIN_MODULES = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")


def plan_conversions(model: nn.Module, stack: Stack, plan: ReusePlan) -> list[Conversion]:
    """The conversion of each layer of a stack.

    Raises:
        ValueError: if the plan does not fit the model, or the model cannot share maps (`Unsupported`).
    """
    names = [f"layer {index} ({type(layer.attention).__name__})" for index, layer in enumerate(stack.layers)]
    forms = []
    for index, layer in enumerate(stack.layers):
        forms.append(attention_form(layer.attention, cross=layer.cross))
        _check_projections(f"layer {index}", layer.attention, forms[index])
    if plan.num_layers != len(stack.layers):
        raise ValueError(
            f"the plan has {plan.num_layers} layers, but {type(stack.module).__name__} has {len(stack.layers)}; make "
            f"a plan for {len(stack.layers)} layers"
        )
    owners = _owners(model)
    counts, layouts = [], []
    for index, (name, layer, form, source) in enumerate(zip(names, stack.layers, forms, plan.layers, strict=True)):
        config = getattr(layer.attention, "config", None)
        implementation = getattr(config, "_attn_implementation", "sdpa")
        if implementation not in ("sdpa", "eager"):
            raise Unsupported(
                f"{name} runs attention as {implementation!r}; load it with attn_implementation='sdpa' or 'eager'"
            )
        heads = count_heads(name, layer.attention, form)
        if isinstance(source, tuple) and len(source) != heads.num_heads:
            raise ValueError(f"{name} has {heads.num_heads} heads, but the plan assigns {len(source)}")
        counts.append(heads)
        separable = is_separable(layer.attention, form, heads)
        layouts.append(lay_out(plan, index, heads.num_heads, heads.num_value_heads, separable=separable))
    conversions = [Conversion(*one) for one in zip(stack.layers, forms, counts, layouts, strict=True)]
    for conversion, name in zip(conversions, names, strict=True):
        _check_share_mode(conversion, name)
    for index in range(plan.num_layers):
        for source in plan.sources(index):
            if difference := _difference(stack, conversions, index, source):
                raise ValueError(difference)
    _check_untied(owners, conversions)
    return conversions


def _check_share_mode(conversion: Conversion, name: str) -> None:
    layout = conversion.layout
    if conversion.layer.cross and layout.computing and layout.parts:
        raise Unsupported(
            f"layer {layout.layer}: in cross-attention, the heads of a layer must all compute or all reuse; give all "
            "of them a source"
        )
    share = layout.plan.share_of(layout.layer)
    if conversion.layer.cross and share not in (None, "map"):
        raise Unsupported(f'{name}: share mode "{share}" serves self-attention only; use share="map"')
    if layout.rank is not None and not conversion.form.value:
        raise Unsupported(
            f'{name}: share mode "corrected" needs values that are outputs of one projection; use share="map"'
        )


def _check_projections(name: str, attention: nn.Module, form: AttentionForm) -> None:
    """Projections must be plain. Wrapped ones (LoRA) and other formats (quantised) cannot be split by heads."""
    for attribute in filter(None, dict.fromkeys((*form.query, *form.key, form.value, *form.output))):
        module = attention._modules.get(attribute)
        if module is None and attribute in (form.value, *form.output):
            raise Unsupported(f"{name}: {type(attention).__name__}.{attribute} is not a module")
        if isinstance(module, nn.Linear | Conv1D) and module._parameters.get("weight") is None:
            raise Unsupported(
                f"{name}: the weight of {attribute} is computed from other parameters; make it permanent first, by "
                "remove_parametrizations of torch.nn.utils.parametrize or prune.remove"
            )
        if module is not None:
            cls = type(module)
            plain = is_plain_linear(module) or (attribute != form.value and cls.__module__.startswith(_PLAIN_MODULES))
            if not plain or ("forward" in vars(module) and not is_optimized(module)):
                raise Unsupported(
                    f"{name}: {attribute} is a {cls.__module__}.{cls.__name__}, not a plain projection; merge "
                    "adapters (merge_and_unload), and load the model unquantised and on one device"
                )
        stored = (attention._parameters.get(attribute),) if module is None else module.parameters()
        for one in stored:
            if one is not None and type(one) is not nn.Parameter:
                raise Unsupported(
                    f"{name}: {attribute} is stored as {type(one).__name__}, expected a plain Parameter; load the "
                    "model unquantised and unsharded"
                )


def is_separable(attention: nn.Module, form: AttentionForm, heads: HeadCounts) -> bool:
    """Whether some heads can be projected without the others."""
    if form.fixed_heads or form.probe is not None:
        return False
    if form.fused or form.computing is not None:
        return True
    for attributes in (form.query, form.key):
        modules = {a: attention.get_submodule(a) for a in attributes if a in attention._modules}
        linear = [a for a, module in modules.items() if isinstance(module, nn.Linear) and is_plain_linear(module)]
        if len(linear) != 1:
            return False
        stored: dict[str, list[Tensor | None]] = {a: [*module.parameters()] for a, module in modules.items()}
        stored |= {a: [attention._parameters[a]] for a in attributes if a in attention._parameters}
        for attribute, parameters in stored.items():
            same_for_heads = {None if p is None else tuple(p.shape) for p in parameters} == {(heads.head_dim,)}
            parts = same_for_heads or type(modules.get(attribute)) in (nn.Identity, nn.Dropout)
            if attribute in form.bias or (attribute not in linear and not parts):
                return False
    return True


def _difference(stack: Stack, conversions: list[Conversion], index: int, source: int) -> str | None:
    """Why a layer cannot reuse the map of another layer; None if it can."""
    own, other = conversions[index], conversions[source]
    here, there = own.layer, other.layer
    if type(here.attention) is not type(there.attention) or own.heads != other.heads:
        return (
            f"layer {index} cannot reuse the map of layer {source}: {type(here.attention).__name__} with "
            f"{own.heads.num_heads} heads, {type(there.attention).__name__} with {other.heads.num_heads}"
        )
    kinds: list[tuple[str, Any, Any]] = [
        (name, getattr(one, name, None), getattr(two, name, None))
        for one, two in ((here.attention, there.attention), (here.layer, there.layer))
        for name in _KIND
    ]
    types = getattr(getattr(stack.module, "config", None), "layer_types", None)
    if types is not None and len(types) == len(stack.layers):
        kinds.append(("layer_types", types[index], types[source]))
    for name, of_layer, of_source in kinds:
        if of_layer != of_source:
            return (
                f"layer {index} ({name}={of_layer!r}) cannot reuse the map of layer {source} ({name}={of_source!r}): "
                "their masks or positions differ; choose a source with the same value"
            )
    return None


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """The names of each parameter, by its identity. A tied parameter has several."""
    owners: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    return owners


def _check_untied(owners: dict[int, set[str]], conversions: list[Conversion]) -> None:
    for index, conversion in enumerate(conversions):
        for name, parameter in conversion.layer.attention.named_parameters():
            paths = sorted(owners[id(parameter)])
            if len(paths) > 1:
                raise Unsupported(f"layer {index}: {name} is tied ({', '.join(paths)}); untie it before sharing maps")


def possible_sources(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """For each layer of `model`, the earlier layers whose maps it can apply: those with the same mask and positions.

    Raises:
        ValueError: if the model cannot share maps at all, as `apply` would.
    """
    model = copy_with_same_weights(model)  # `unpack` changes it
    stack = unpack(find_stack(model))
    conversions = plan_conversions(model, stack, ReusePlan.full(len(stack.layers)))
    return {
        layer: tuple(source for source in range(layer) if _difference(stack, conversions, layer, source) is None)
        for layer in range(len(conversions))
    }
