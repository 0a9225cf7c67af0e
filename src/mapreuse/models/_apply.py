"""`apply`: make the layers of a model share attention maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.console import check_number
from mapreuse.maps import STORAGES, MapCounts, SharedMaps
from mapreuse.models._attention_conversion import convert_attention
from mapreuse.models._cache import cache_of, check_cache
from mapreuse.models._map_injection import inject_maps
from mapreuse.models._plan_conversions import plan_conversions
from mapreuse.models._runtime import CROSS_MAPS_ARGUMENT, MAPS_ARGUMENT, refuse_other_states
from mapreuse.models._snapshots import Model, copy_with_same_weights, unchanged_on_failure
from mapreuse.models._source import Unsupported, parameter_names
from mapreuse.models._stack import (
    ENCODER_STATES,
    check_model,
    cross_attends_beside,
    find_stack,
    maps_travel_by_keyword,
)
from mapreuse.models._torch_encoder import unpack
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")


@dataclass(frozen=True)
class AppliedPlan:
    """A plan in force, stored on the module that runs the layers.

    Attributes:
        plan: the plan.
        storage: how shared maps are stored.
        memory_budget: maximum size in bytes of the shared maps alive at once, or None.
        counts: numbers of maps in a forward pass.
        parameter_names: the parameters of the module's forward.
        cross_attends: the module may be given encoder states, as only its cross-attention uses them.
        caches: the layers can use a cache.
        removed: names of the module's parameters and buffers that the conversion removed.
        attention: "self" or "cross".
    """

    plan: ReusePlan
    storage: str
    memory_budget: int | None
    counts: MapCounts
    parameter_names: tuple[str, ...]
    cross_attends: bool
    caches: bool
    removed: tuple[str, ...] = ()
    attention: str = "self"


_ATTRIBUTES = {"self": "_map_reuse", "cross": "_cross_map_reuse"}
"""The attributes of a module that hold the plans in force, by attention."""


def apply(
    model: Model,
    plan: ReusePlan,
    *,
    storage: str = "dense",
    memory_budget: int | None = None,
    attention: str = "self",
) -> Model:
    """Make the layers of `model` share attention maps as `plan` says, in place; returns the model.

        context = M[source layer][source head] @ V

    Reusing layers lose their query, key and positional-key projections; layers that reuse in part keep the rows of
    the heads that compute. All other weights stay as they are, heads in their order, so weights of the original still
    load, for example by `load_state_dict(…, strict=False)`. `optimize` makes the rest of the model faster.
    `save_pretrained` saves the plan with the model.

    Args:
        model: a `transformers` model with one stack of layers, or the part of a larger model that holds one
            (`model.encoder`, `model.vision_model`).
        plan: whose map each layer applies.
        storage: how shared maps are stored. "dense" stores their weights (fastest; T×T memory). "dense16" and
            "dense8" compress them to 16 or 8 bits with a scale for each row; with gradients they store plain weights.
            "recompute" stores the queries and keys of the source layer and computes the map again (memory linear in
            T). "auto" chooses, for each forward pass, the fastest one by a short benchmark that fits the memory, and
            logs the reason (logger "mapreuse", level INFO).
        memory_budget: maximum size in bytes of the shared maps alive at once. A forward pass that needs more raises
            an error before its first map; the message names a sufficient budget. None means no limit, or for "auto"
            a quarter of the device's memory.
        attention: "self" for the maps of self-attention, or "cross" for those by which a decoder attends to an
            encoder, in share mode "map" only. A decoder may have a plan for each. In saved models, the second one's
            stack is named `….cross`.

    Raises:
        ValueError: if the plan does not fit the model, or the model cannot share maps (`Unsupported`). The message
            names the class, the layer and the reason. The model is unchanged.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4)
        >>> model = apply(transformers.BertModel(config), ReusePlan.parse("2x2"))
        >>> plan_of(model) == ReusePlan.parse("2x2")
        True
    """
    if not isinstance(plan, ReusePlan):
        raise ValueError(f"plan must be a ReusePlan, such as ReusePlan.parse('4x4'), got {plan!r}")
    if any(applied.attention == attention for applied in applied_plans(model).values()):
        raise ValueError("the model shares attention maps already; apply the plan to the original model instead")
    if storage not in (*STORAGES, "auto"):
        raise ValueError(f"storage must be one of {', '.join(STORAGES)} and auto, got {storage!r}")
    if memory_budget is not None:
        check_number("memory_budget, in bytes,", memory_budget, 1, whole=True)
        if plan.rank is not None:
            raise ValueError(
                'memory_budget counts shared maps, but share mode "corrected" stores scores; leave it out, or use '
                'share="map"'
            )
    before = sum(parameter.numel() for parameter in model.parameters())
    with unchanged_on_failure(model):
        stack, is_cross = find_stack(model, attention), attention == "cross"
        names = stack.module.state_dict().keys()
        stack = unpack(stack)
        conversions = plan_conversions(model, stack, plan)
        by_keyword = maps_travel_by_keyword(stack) and all(one.form.takes_maps for one in conversions)
        applied = AppliedPlan(
            plan,
            storage,
            memory_budget,
            _map_counts(plan, [len(conversion.layout.computing) for conversion in conversions]),
            parameter_names(stack.cls),
            cross_attends_beside(stack),
            all(conversion.form.cache is not None for conversion in conversions),
            attention=attention,
        )
        for conversion in conversions:
            convert_attention(conversion)
        if not by_keyword:
            inject_maps(stack.module)
        removed = sorted(names - stack.module.state_dict().keys())
        setattr(stack.module, _ATTRIBUTES[attention], replace(applied, removed=tuple(removed)))
        stack.module.register_load_state_dict_pre_hook(_drop_placeholders)
        stack.module.register_forward_pre_hook(_open_cross_maps if is_cross else _open_maps, with_kwargs=True)
        stack.module.register_forward_hook(_close_maps, with_kwargs=True)
    after = sum(parameter.numel() for parameter in model.parameters())
    reusing = sum(plan.reuses(layer) for layer in range(plan.num_layers))
    logger.info(
        "%d of %d layers reuse attention maps: %s of %s parameters removed",
        *(reusing, plan.num_layers, f"{before - after:,}", f"{before:,}"),
    )
    return model


def plan_of(model: nn.Module, attention: str = "self") -> ReusePlan | None:
    """The plan in force in `model` for its "self" or "cross" attention, or None.

    Raises:
        ValueError: if several stacks of the model have a plan each.
    """
    applied = {path: one for path, one in applied_plans(model).items() if one.attention == attention}
    if len(applied) > 1:
        paths = ", ".join(map(repr, applied))
        raise ValueError(
            f"{type(model).__name__} holds several plans, at {paths}; call plan_of on the module that holds one"
        )
    return next((one.plan for one in applied.values()), None)


def applied_plans(model: nn.Module) -> dict[str, AppliedPlan]:
    """The plans in force in `model`, by the path of the module that runs the layers, with `cross` at its end."""
    check_model(model)
    found: dict[str, AppliedPlan | None] = {}
    for path, module in model.named_modules():
        found[path] = module.__dict__.get(_ATTRIBUTES["self"])
        found[f"{path}.cross".removeprefix(".")] = module.__dict__.get(_ATTRIBUTES["cross"])
    return {path: applied for path, applied in found.items() if applied is not None}


def with_projections(model: nn.Module, attention: str = "self") -> nn.Module:
    """The model itself, if its projections are modules. Otherwise a copy with the same weights whose projections are.

    They are not modules in a `torch.nn.TransformerEncoder` without a plan.
    """
    stack = find_stack(model, attention)
    if type(stack.module) is not nn.TransformerEncoder or applied_plans(model):
        return model
    return apply(copy_with_same_weights(model), ReusePlan.full(len(stack.layers)))


def _drop_placeholders(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of `load_state_dict`: ignore the empty tensors that saved files contain in place of removed ones."""
    plans = filter(None, (vars(module).get(attribute) for attribute in _ATTRIBUTES.values()))
    for name in (name for applied in plans for name in applied.removed):
        if prefix + name in state_dict and state_dict[prefix + name].numel() == 0:
            del state_dict[prefix + name]


def _map_counts(plan: ReusePlan, computing: Sequence[int]) -> MapCounts:
    readers = {layer: plan.readers(layer) for layer in range(plan.num_layers)}
    spans = {layer: of for layer, of in readers.items() if of and plan.share_of(of[0]) == "map"}
    heads = {layer: computing[layer] for layer in spans}
    alive = [
        sum(heads[source] for source, readers in spans.items() if source <= layer <= readers[-1])
        for layer in range(plan.num_layers)
    ]
    return MapCounts(len(spans), sum(map(len, spans.values())), sum(heads.values()), max(alive))


def _open_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the stack: make the `SharedMaps` of this pass."""
    applied: AppliedPlan = module._map_reuse  # type: ignore[assignment]
    given = dict(zip(applied.parameter_names, args, strict=False)) | kwargs
    name, cache = type(module).__name__, cache_of(given)
    refuse_other_states(
        module, {key: given[key] for key in given if not (applied.cross_attends and key == ENCODER_STATES)}
    )
    _check_cache_use(name, applied, given)
    if cache is not None:
        check_cache(name, applied.plan, cache)
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise Unsupported(
            f"{type(module).__name__} makes masks for {implementation!r}; call set_attn_implementation('sdpa')"
        )
    mask = given.get("attention_mask")
    if implementation == "eager" and isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
        raise ValueError(
            f"{type(module).__name__}: eager attention would add a mask of booleans as 0 and 1; give a mask of "
            "floats, or call set_attn_implementation('sdpa')"
        )
    kwargs = _without_default_cache(applied, given, kwargs)
    return args, kwargs | {MAPS_ARGUMENT: _new_maps(applied, config, given)}


def _open_cross_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same for the maps of cross-attention."""
    applied: AppliedPlan = vars(module)[_ATTRIBUTES["cross"]]
    given = dict(zip(applied.parameter_names, args, strict=False)) | kwargs
    name, cache = type(module).__name__, cache_of(given)
    _check_cache_use(name, applied, given)
    if cache is not None:
        check_cache(name, applied.plan, cache, cross=True)
    kwargs = _without_default_cache(applied, given, kwargs)
    return args, kwargs | {CROSS_MAPS_ARGUMENT: _new_maps(applied, getattr(module, "config", None), given)}


def _check_cache_use(name: str, applied: AppliedPlan, given: dict[str, Any]) -> None:
    makes_one = given.get("use_cache") and "use_cache" in applied.parameter_names
    if (makes_one or cache_of(given) is not None) and not applied.caches:
        raise ValueError(
            f"{name} shares attention maps and cannot use a cache: mapreuse does not know how its attention updates "
            "one; call it with use_cache=False and without a cache"
        )


def _without_default_cache(applied: AppliedPlan, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call. The configuration's default would make a cache in every call."""
    if "use_cache" in applied.parameter_names and given.get("use_cache") is None:
        return kwargs | {"use_cache": cache_of(given) is not None}
    return kwargs


def _new_maps(applied: AppliedPlan, config: Any, given: dict[str, Any]) -> SharedMaps:
    return SharedMaps(
        storage=applied.storage,
        counts=applied.counts,
        budget=applied.memory_budget,
        retain=torch.is_grad_enabled(),
        differentiable=torch.is_grad_enabled(),
        output_attentions=bool(given.get("output_attentions", getattr(config, "output_attentions", False))),
    )


def _close_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the stack: the maps live as long as the output of the pass."""
    if not torch.compiler.is_compiling():
        for maps in (kwargs.get(MAPS_ARGUMENT), kwargs.get(CROSS_MAPS_ARGUMENT)):
            if maps is not None:
                maps.close(output)
