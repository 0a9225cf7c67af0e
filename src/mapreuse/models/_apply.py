"""`apply`: one call that makes a model's layers share attention maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from mapreuse.maps import STORAGES, MapCounts, SharedMaps
from mapreuse.models._checks import check
from mapreuse.models._conversion import convert, unchanged_on_failure
from mapreuse.models._copying import copy_with_same_weights
from mapreuse.models._map_injection import inject_maps
from mapreuse.models._packed import unpacked
from mapreuse.models._sharing import ARGUMENT, refuse_cache
from mapreuse.models._source import Unsupported, parameter_names
from mapreuse.models._stack import ENCODER_STATES, cross_attends_beside, find_stack, maps_travel_by_keyword
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Applied:
    """What `apply` leaves on the module that holds the stack."""

    plan: ReusePlan
    storage: str
    memory_budget: int | None
    demand: MapCounts
    parameter_names: tuple[str, ...]
    cross_attends: bool


def apply(model: Model, plan: ReusePlan, *, storage: str = "dense", memory_budget: int | None = None) -> Model:
    """Make the layers of `model` share attention maps as `plan` says, in place; returns the model.

    A reusing layer loses its query, key and positional-key projections. Heads are put in the order in which their
    maps are handed on and applied, by permuting the rows of their projections and the columns of the output's.
    `mapreuse.save` saves the model; its `save_pretrained` refuses to.

    Args:
        model: a `transformers` model with one stack of layers, or the part of a larger model that holds one
            (`model.encoder`, `model.vision_model`). What is outside the stack is left as it is.
        plan: whose map each layer applies.
        storage: how a shared map is carried: "dense" stores its weights (fastest, T×T memory); "dense16" and
            "dense8" compress them to 16 or 8 bits, with a scale for every row (inference; a compressed map has no
            gradient, so training stores weights as they are); "recompute" keeps the source layer's queries and keys
            and computes the map anew (memory grows with T). "auto" takes, for every pass, the fastest by
            measurement on its device of those that fit the memory, and logs why (logger "mapreuse", level INFO).
        memory_budget: bytes that the shared maps alive at once may take. A pass whose maps would take more is
            refused before its first map, with the budget that would do. None for no limit; under "auto", for a
            quarter of the device's memory.

    Raises:
        ValueError: naming the class, the layer and the reason, where the plan does not fit the model or the model
            cannot be served. The model is then unchanged.
    """
    if not isinstance(plan, ReusePlan):
        raise ValueError(f"apply takes a ReusePlan, such as ReusePlan.parse('4x4'), got {plan!r}")
    if applied_to(model):
        raise ValueError("the model reuses attention maps already; apply a plan to the original model instead")
    if storage not in (*STORAGES, "auto"):
        raise ValueError(f"storage must be one of {', '.join(STORAGES)} and auto, got {storage!r}")
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
        raise ValueError(f"memory_budget must be a positive whole number of bytes, got {memory_budget!r}")
    before = sum(parameter.numel() for parameter in model.parameters())
    with unpacked(find_stack(model)) as stack:
        conversions = check(model, stack, plan)
        names, crossing = parameter_names(type(stack.module)), cross_attends_beside(stack)
        by_keyword = maps_travel_by_keyword(stack) and all(c.adapter.form.takes_maps for c in conversions)
        demand = _demand(plan, [conversion.layout.published for conversion in conversions])
        applied = Applied(plan, storage, memory_budget, demand, names, crossing)
        with unchanged_on_failure(model):
            for conversion in conversions:
                convert(conversion)
            refuse_save_pretrained(model)
            stack.module._map_reuse = applied  # type: ignore[assignment]
            if not by_keyword:
                inject_maps(stack.module, stack.attention_paths)
            stack.module.register_forward_pre_hook(_open_maps, with_kwargs=True)
            stack.module.register_forward_hook(_close_maps, with_kwargs=True)
    after = sum(parameter.numel() for parameter in model.parameters())
    reusing = sum(plan.reuses(layer) for layer in range(plan.num_layers))
    logger.info(
        "%d of %d layers reuse attention maps: %s of %s parameters removed",
        *(reusing, plan.num_layers, f"{before - after:,}", f"{before:,}"),
    )
    return model


def refuse_save_pretrained(model: nn.Module) -> None:
    """Have every `transformers` model in this one refuse `save_pretrained`: what it wrote would open without a word,
    the projections that were removed filled with random numbers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = _no_save_pretrained


def _no_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError("a model that reuses attention maps is saved by mapreuse.save(model, directory)")


def plan_of(model: nn.Module) -> ReusePlan | None:
    """The plan in force in `model`, or None. Raises `ValueError` where several of its stacks have one each."""
    applied = applied_to(model)
    if len(applied) > 1:
        paths = ", ".join(map(repr, applied))
        raise ValueError(f"{type(model).__name__} holds several plans, at {paths}; ask the module that holds one")
    return next((one.plan for one in applied.values()), None)


def applied_to(model: nn.Module) -> dict[str, Applied]:
    """What was applied to the stacks in `model`, by the path of the module that holds the stack."""
    found = {path: module.__dict__.get("_map_reuse") for path, module in model.named_modules()}
    return {path: applied for path, applied in found.items() if applied is not None}


def with_projections(model: nn.Module) -> nn.Module:
    """The model; where its projections are no modules of their own, a copy that computes the same by such modules,
    of the same weights.

    They are none in a `torch.nn.TransformerEncoder` without a plan.
    """
    stack = find_stack(model)
    if type(stack.module) is not nn.TransformerEncoder or applied_to(model):
        return model
    return apply(copy_with_same_weights(model), ReusePlan.full(len(stack.layers)))


def _demand(plan: ReusePlan, published: Sequence[int]) -> MapCounts:
    spans = {layer: plan.readers(layer) for layer in range(plan.num_layers) if plan.readers(layer)}
    heads = {layer: published[layer] for layer in spans}
    alive = [
        sum(heads[source] for source, readers in spans.items() if source <= layer <= readers[-1])
        for layer in range(plan.num_layers)
    ]
    return MapCounts(len(spans), sum(map(len, spans.values())), sum(heads.values()), max(alive))


def _open_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the stack: every pass carries maps of its own."""
    applied: Applied = module._map_reuse  # type: ignore[assignment]
    given = dict(zip(applied.parameter_names, args, strict=False)) | kwargs
    refuse_cache(module, given, allowed=ENCODER_STATES if applied.cross_attends else None)
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise Unsupported(f"{type(module).__name__} makes masks for {implementation!r}; use 'sdpa' or 'eager'")
    kwargs = dict(kwargs)
    if "use_cache" in applied.parameter_names:
        if given.get("use_cache"):
            raise ValueError(
                f"{type(module).__name__} reuses attention maps and keeps no cache: "
                "call it with use_cache=False, without generate()"
            )
        if given.get("use_cache") is None:
            kwargs["use_cache"] = False  # a decoder would make a cache of its own accord
    maps = SharedMaps(
        storage=applied.storage,
        counts=applied.demand,
        budget=applied.memory_budget,
        retain=torch.is_grad_enabled(),
        differentiable=torch.is_grad_enabled(),
        output_attentions=bool(given.get("output_attentions", getattr(config, "output_attentions", False))),
    )
    return args, kwargs | {ARGUMENT: maps}


def _close_maps(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the stack: maps live as long as what the pass gave."""
    if not torch.compiler.is_compiling():
        kwargs[ARGUMENT].close(output)
