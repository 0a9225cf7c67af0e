"""Head assignment: which head of the source layer should each head of a reusing layer apply?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._validation import check_plan
from mapreuse.data import check_precision
from mapreuse.measure import Similarity, similarity
from mapreuse.models import (
    MapRecorder,
    Unsupported,
    check_batch,
    find_stack,
    output_projection,
    plan_of,
    with_projections,
)
from mapreuse.plan import LayerSource, ReusePlan

Head: TypeAlias = tuple[int, int]
"""Layer and head."""

Mode = Literal["error", "best", "one-to-one"]

_WRONG_DEPTH = "the plan has {} layers, but the model has {}"


def align(
    original: nn.Module, plan: ReusePlan, batches: Iterable[Mapping[str, Any]], *, mode: Mode = "error"
) -> ReusePlan:
    """Assign a source head to each head of the layers that reuse all their maps.

    With A the maps, V the values and O a head's part of the output projection, head h of layer l applies the head of
    its source layer that changes the output of layer l least over the calibration batches, padding left out:

        assignment[l][h] = argmin_g Σ ‖(A[source(l), g] − A[l, h]) V[l, h] O[l, h]‖²

    Args:
        original: the model before `apply`; it is not changed.
        plan: which layers share. Layers planned head by head keep their assignment.
        batches: calibration batches, keyword dictionaries for the model's forward.
        mode: "error" as above; "best" the source head with the most similar map; "one-to-one" the most similar maps
            with every source head used once (Hungarian algorithm). The last two ignore values; see `align_by`.

    Returns:
        The plan, head by head.

    Raises:
        ValueError: if there are no batches, the plan does not fit the model, the mode is unknown, or the model has a
            plan already or is in half precision on a CPU.
    """
    check_plan(plan)
    check_precision(original)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}: got {mode!r}")
    if plan_of(original) is not None:
        raise ValueError("the model shares attention maps already; align the heads of the original model instead")
    if mode != "error":
        return align_by(similarity(original, batches), plan, mode=mode)
    if plan.num_layers != (num_layers := len(find_stack(original).layers)):
        raise ValueError(_WRONG_DEPTH.format(plan.num_layers, num_layers))
    layers = list(plan.layers)
    sources = {layer: (source,) for layer, source in enumerate(plan.layers) if isinstance(source, int)}
    for layer, errors in output_errors(original, sources, batches).items():
        (source,) = sources[layer]
        layers[layer] = tuple((source, head) for head in errors[0].argmin(dim=0).tolist())
    return ReusePlan(tuple(layers))


def output_errors(
    original: nn.Module, sources: Mapping[int, tuple[int, ...]], batches: Iterable[Mapping[str, Any]]
) -> dict[int, Float[Tensor, "sources source_heads heads"]]:
    """Error of a layer's output when a head applies the map of a head of an earlier layer.

        errors[l][s, g, h] = Σ ‖(A[s, g] − A[l, h]) V[l, h] O[l, h]‖² / Σ Σ_h ‖A[l, h] V[l, h] O[l, h]‖²

    summed over the queries of `batches` that are not padding, one batch at a time.

    Args:
        original: the model before `apply`.
        sources: for each layer l, the earlier layers s to try.
        batches: calibration batches.

    Raises:
        ValueError: if there are no batches, the model has no such layer, or a map is not finite.
    """
    recorder = MapRecorder(original)
    if unknown := [layer for layer in (*sources, *sum(sources.values(), ())) if layer >= recorder.num_layers]:
        raise ValueError(f"layer {unknown[0]} is planned, but the model has {recorder.num_layers} layers")
    stack = find_stack(with_projections(original))
    roots: dict[int, Tensor] = {}
    summed: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    seen = False
    for batch in batches:
        check_batch(batch)
        maps, valid, values = recorder(batch)
        seen |= bool(valid.any())
        rows = valid[..., None].double()
        for layer, candidates in sources.items():
            num_heads = maps[layer].shape[1]
            own_values = values[layer].repeat_interleave(num_heads // values[layer].shape[1], 1)
            if layer not in roots:
                roots[layer], _ = output_factors(stack.layers[layer], num_heads, own_values)
            weighted = own_values.double() @ roots[layer]
            own = (maps[layer].double() @ weighted).transpose(1, 2).flatten(2)
            if not bool(torch.isfinite(own).all()):
                raise ValueError(
                    f"layer {layer}: its output is not finite; check the weights and the calibration batches"
                )
            of_heads, found = weighted.transpose(1, 2).flatten(2), []
            # One buffer for all heads: temporaries of this size would fragment memory.
            head_map, applied = maps[layer][:, 0].double(), torch.empty_like(own)
            for source in candidates:
                for one in maps[source].unbind(1):
                    torch.bmm(head_map.copy_(one), of_heads, out=applied).sub_(own).mul_(rows).square_()
                    found.append(applied.unflatten(-1, (num_heads, -1)).sum((0, 1, 3)))
            errors = torch.stack(found).view(len(candidates), num_heads, num_heads)
            summed[layer] = summed.get(layer, 0) + errors.cpu()
            sizes[layer] = sizes.get(layer, 0) + (own * rows).square().sum().cpu()
    if not seen:
        raise ValueError(
            "no calibration batches, or only padding: pass at least one batch, such as [{'input_ids': …}]"
        )
    return {layer: (summed[layer] / sizes[layer]).float() for layer in sources}


def output_factors(
    layer: Any, num_heads: int, values: Tensor, max_rank: int | None = None
) -> tuple[Float[Tensor, "heads head_dim rank"], Float[Tensor, "heads rank width"]]:
    """U S and Vᵀ of the singular value decomposition O[h] = U S Vᵀ of each head's output projection, in float64.

    ‖x U S‖ = ‖x O[h]‖, at the width of a head. `max_rank` keeps the largest singular values. A layer without a plain
    output projection has the identity in its place.
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


def align_by(measured: Similarity, plan: ReusePlan, *, mode: Literal["best", "one-to-one"] = "best") -> ReusePlan:
    """Assign heads, in the layers that reuse all their maps, by the similarity of maps.

        assignment[l] = argmax Σ_h similarity(source(l), assignment[l][h]; l, h)

    over all assignments ("best"), or over those that use every source head once ("one-to-one").
    """
    if plan.num_layers != len(measured.heads):
        raise ValueError(_WRONG_DEPTH.format(plan.num_layers, len(measured.heads)))
    layers: list[LayerSource] = []
    for layer, source in enumerate(plan.layers):
        if isinstance(source, int):
            heads = _assign(measured.heads[source, :, layer], mode)
            layers.append(tuple((source, head) for head in heads))
        else:
            layers.append(source)
    return ReusePlan(tuple(layers))


def group_by(measured: Similarity, num_groups: int) -> ReusePlan:
    """The plan of `num_groups` groups of consecutive layers with the most similar maps, heads assigned.

    Maximises, over all ways to cut the layers into groups, the summed similarity of each reusing layer to the first
    layer of its group, by dynamic programming over the first layer of the last group.
    """
    layers = measured.layers
    num_layers = len(layers)
    if not 1 <= num_groups <= num_layers:
        raise ValueError(f"num_groups must be between 1 and the model's {num_layers} layers, got {num_groups}")
    # best[g][n]: the maximum similarity of the first n layers in g groups, and the first layer of the last group.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(num_groups):
        row = {}
        for stop in range(1, num_layers + 1):
            options = [
                (best[-1][start][0] + float(layers[start, start + 1 : stop].sum()), start)
                for start in range(stop)
                if start in best[-1]
            ]
            if options:
                row[stop] = max(options)
        best.append(row)
    sources = [0] * num_layers
    stop = num_layers
    for groups in range(num_groups, 0, -1):
        start = best[groups][stop][1]
        sources[start:stop] = [start] * (stop - start)
        stop = start
    return align_by(measured, ReusePlan.from_sources(sources))


def _assign(similarities: Tensor, mode: str) -> list[int]:
    """For each head of the reusing layer (columns), a head of the source layer (rows)."""
    if mode == "best":
        return similarities.argmax(dim=0).tolist()
    if mode == "one-to-one":
        heads, sources = linear_sum_assignment(similarities.T.numpy(), maximize=True)
        return [int(source) for _, source in sorted(zip(heads, sources, strict=True))]
    raise ValueError(f"mode must be error, best or one-to-one, got {mode!r}")
