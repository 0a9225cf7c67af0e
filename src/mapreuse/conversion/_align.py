"""Head assignment: which head of the source layer should each head of a reusing layer apply?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._kept_work import LayerSums
from mapreuse.conversion._targets import sampled_queries
from mapreuse.conversion._validation import check_plan, digest
from mapreuse.data import check_precision
from mapreuse.models import (
    MapRecorder,
    Unsupported,
    check_batch,
    find_stack,
    output_projection,
    plan_of,
    with_projections,
)
from mapreuse.plan import ReusePlan

Head: TypeAlias = tuple[int, int]
"""Layer and head."""


def align(
    original: nn.Module, plan: ReusePlan, batches: Iterable[Mapping[str, Any]], *, attention: str = "self"
) -> ReusePlan:
    """Assign a source head to each head of the layers that reuse all their maps.

    Each head applies the source head that changes the output of its layer least:

        assignment[l][h] = argmin_g Σ ‖(A[source(l), g] − A[l, h]) V[l, h] O[l, h]‖²

    with A the maps, V the values and O a head's part of the output projection. The sum is over the queries of the
    calibration batches except padding; over 64 evenly spaced ones in longer samples.

    Args:
        original: the model before `apply`; it is not changed.
        plan: which layers share. Layers planned head by head keep their assignment; share mode "keys" has none.
        batches: calibration batches, keyword dictionaries for the model's forward.
        attention: "self" or "cross", as for `apply`.

    Returns:
        The plan, head by head.

    Raises:
        ValueError: if there are no batches, the plan does not fit the model, the model has a plan already, or it is
            in half precision on a CPU.
    """
    check_plan(plan)
    check_precision(original)
    if plan_of(original, attention) is not None:
        raise ValueError("the model shares attention maps already; align the heads of the original model instead")
    return aligned(original, plan, batches, attention=attention)


def aligned(
    original: nn.Module,
    plan: ReusePlan,
    batches: Iterable[Mapping[str, Any]],
    cache: Path | None = None,
    attention: str = "self",
) -> ReusePlan:
    """`align` without its checks of the model; `cache` is as for `output_errors`."""
    if plan.num_layers != (num_layers := len(find_stack(original, attention).layers)):
        raise ValueError(f"the plan has {plan.num_layers} layers, but the model has {num_layers}")
    layers = list(plan.layers)
    sources = {
        layer: (source,)
        for layer, source in enumerate(plan.layers)
        if isinstance(source, int) and plan.share_of(layer) != "keys"
    }
    if not sources:
        return plan
    for layer, errors in output_errors(original, sources, batches, cache=cache, attention=attention).items():
        (source,) = sources[layer]
        layers[layer] = tuple((source, head) for head in errors[0].argmin(dim=0).tolist())
    return replace(plan, layers=tuple(layers))


def output_errors(
    original: nn.Module,
    sources: Mapping[int, tuple[int, ...]],
    batches: Iterable[Mapping[str, Any]],
    *,
    cache: Path | None = None,
    attention: str = "self",
) -> dict[int, Float[Tensor, "sources source_heads heads"]]:
    """Error of a layer's output if head h applies the map of head g of an earlier layer s.

        errors[l][s, g, h] = Σ ‖(A[s, g] − A[l, h]) V[l, h] O[l, h]‖² / Σ Σ_h ‖A[l, h] V[l, h] O[l, h]‖²

    The sums are over the queries of the batches except padding; over 64 evenly spaced ones in longer samples.

    Args:
        original: the model before `apply`.
        sources: for each layer l, the earlier layers s to try.
        batches: calibration batches.
        cache: folder of this model and these batches. An interrupted call leaves its sums there, and the next one
            continues.
        attention: "self" or "cross", as for `apply`.

    Raises:
        ValueError: if there are no batches, the model has no such layer, or a map is not finite.
    """
    recorder = MapRecorder(original, attention=attention)
    if unknown := [layer for layer in (*sources, *sum(sources.values(), ())) if layer >= recorder.num_layers]:
        raise ValueError(f"layer {unknown[0]} is planned, but the model has {recorder.num_layers} layers")
    stack = find_stack(with_projections(original, attention), attention)
    roots: dict[int, Tensor] = {}
    name = digest([{str(layer): found for layer, found in sources.items()}])
    file = None if cache is None else cache / f"maps-{name}.safetensors"
    any_valid = False
    with LayerSums(file, "comparing maps") as kept:
        for number, batch in enumerate(batches):
            check_batch(batch)
            layers = [layer for layer in sources if kept.lacks(layer, number)]
            if not layers:
                any_valid = True
                continue
            maps, valid, values = recorder(batch)
            any_valid |= bool(valid.any())
            length = valid.shape[1]
            queries = sampled_queries(length).to(valid.device)
            rows = valid[:, queries, None].float()
            for layer in layers:
                num_heads = maps[layer].shape[1]
                own_values = values[layer].repeat_interleave(num_heads // values[layer].shape[1], 1)
                if layer not in roots:
                    roots[layer], _ = output_factors(stack.layers[layer], num_heads, own_values)
                weighted = own_values.float() @ roots[layer].float()
                own = (maps[layer][:, :, queries].float() @ weighted).transpose(1, 2).flatten(2)
                if not bool(torch.isfinite(own).all()):
                    raise ValueError(
                        f"layer {layer}: its output is not finite; check the weights and the calibration batches"
                    )
                of_sources = (maps[source][:, :, queries] for source in sources[layer])
                errors = _summed_errors(own, weighted, of_sources, rows)
                size = (own * rows).square().sum(dtype=torch.float64).cpu()
                kept.add(layer, number, {"errors": errors, "size": size})
            kept.keep()
    if not any_valid:
        raise ValueError(
            "no calibration batches, or only padding: pass at least one batch, such as [{'input_ids': …}]"
        )
    return {layer: (kept[layer]["errors"] / kept[layer]["size"]).float() for layer in sources}


def _summed_errors(
    own: Float[Tensor, "batch query outputs"],
    weighted: Float[Tensor, "batch heads key rank"],
    maps: Iterable[Float[Tensor, "batch source_heads query key"]],
    rows: Float[Tensor, "batch query 1"],
) -> Float[Tensor, "sources source_heads heads"]:
    """Squared distance of a layer's own output from the one with each map, summed over the rows of a batch."""
    num_heads = weighted.shape[1]
    of_heads, applied = weighted.transpose(1, 2).flatten(2), torch.empty_like(own)  # one buffer for all heads
    found = []
    for source in maps:
        for one in source.float().unbind(1):
            torch.bmm(one, of_heads, out=applied).sub_(own).mul_(rows).square_()
            found.append(applied.sum((0, 1), dtype=torch.float64).unflatten(0, (num_heads, -1)).sum(1))
    return torch.stack(found).view(-1, source.shape[1], num_heads).cpu()


def output_factors(
    layer: Any, num_heads: int, values: Tensor, max_rank: int | None = None
) -> tuple[Float[Tensor, "heads head_dim rank"], Float[Tensor, "heads rank width"]]:
    """U S and Vᵀ of the singular value decomposition O[h] = U S Vᵀ of each head's output projection, in float64.

    ‖x U S‖ = ‖x O[h]‖ at the width of a head. `max_rank` keeps the largest singular values. The identity stands in
    for an output projection that is not a plain linear layer.
    """
    dim = values.shape[-1]
    try:
        projection = output_projection(layer)
    except Unsupported:
        weight = torch.eye(num_heads * dim, device=values.device)
    else:
        weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
    heads = weight.detach().double().unflatten(0, (num_heads, dim))
    left, sizes, right = torch.linalg.svd(heads, full_matrices=False)
    return (left * sizes[:, None])[..., :max_rank], right[:, :max_rank]
