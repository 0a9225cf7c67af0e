"""Which head of the source layer should each head of a reusing layer apply?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mapreuse.conversion._validation import check_plan, check_precision
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

_WRONG_DEPTH = "the plan speaks of {} layers, but the model has {}"


def align(
    original: nn.Module, plan: ReusePlan, batches: Iterable[Mapping[str, Any]], *, mode: Mode = "error"
) -> ReusePlan:
    """The plan with the heads of every wholly reusing layer assigned anew.

    With A the maps, V the values and O the output projection's part of a head, by default head h of layer l takes the
    head of its source whose map changes the layer's output least,

        assignment[l][h] = argmin_g Σ ‖(A[source(l), g] − A[l, h]) V[l, h] O[l, h]‖²

    over the calibration batches, padding left out; the alternatives go by the maps alone (see `align_by`).

    Args:
        original: the model before `apply`; it is left as it is.
        plan: which layers share. Layers that are planned head by head already keep their heads.
        batches: calibration batches, keyword dictionaries for the model's forward.
        mode: "error" as above; "best" takes the most similar source head for each head, so several may share one, as
            with "error"; "one-to-one" uses every source head once (the Hungarian assignment).

    Raises:
        ValueError: where there are no batches, the plan does not fit the model, the mode is none of the three, or the
            model has a plan already or is in half precision on a CPU.
    """
    check_plan(plan)
    check_precision(original)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}: got {mode!r}")
    if plan_of(original) is not None:
        raise ValueError("the model reuses attention maps already; align the heads of the original model instead")
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
    """What it costs each head of a layer to apply each head of some earlier layers.

        errors[l][s, g, h] = Σ ‖(A[s, g] − A[l, h]) V[l, h] O[l, h]‖² / Σ Σ_h ‖A[l, h] V[l, h] O[l, h]‖²

    summed over the queries of `batches` that are not padding, one batch at a time; `sources` names the candidates of
    each layer.

    Raises `ValueError` where there are no batches, a layer is not the model's, or a map is not finite.
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
                roots[layer], _ = factors(stack.layers[layer], num_heads, own_values)
            weighted = own_values.double() @ roots[layer]
            own = (maps[layer].double() @ weighted).transpose(1, 2).flatten(2)
            if not bool(torch.isfinite(own).all()):
                raise ValueError(
                    f"layer {layer}: its output is not finite; check the weights and the calibration batches"
                )
            of_heads, found = weighted.transpose(1, 2).flatten(2), []
            # The same memory for all: temporaries of this size would leave gaps.
            head_map, applied = maps[layer][:, 0].double(), torch.empty_like(own)
            for source in candidates:
                for one in maps[source].unbind(1):
                    torch.bmm(head_map.copy_(one), of_heads, out=applied).sub_(own).mul_(rows).square_()
                    found.append(applied.unflatten(-1, (num_heads, -1)).sum((0, 1, 3)))
            wrong = torch.stack(found).view(len(candidates), num_heads, num_heads)
            summed[layer] = summed.get(layer, 0) + wrong.cpu()
            sizes[layer] = sizes.get(layer, 0) + (own * rows).square().sum().cpu()
    if not seen:
        raise ValueError("no calibration batches, or nothing but padding: give at least one, as [{'input_ids': …}]")
    return {layer: (summed[layer] / sizes[layer]).float() for layer in sources}


def factors(
    layer: Any, num_heads: int, values: Tensor, most: int | None = None
) -> tuple[Float[Tensor, "heads head_dim rank"], Float[Tensor, "heads rank width"]]:
    """U S and Vᵀ of the output projection's part U S Vᵀ of every head, in float64, the `most` largest of S or all.

    ‖x U S‖ = ‖x O‖, at the width of a head. Where there is no plain projection, the context itself is the output.
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
    return (left * sizes[:, None])[..., :most], right[:, :most]


def align_by(measured: Similarity, plan: ReusePlan, *, mode: Literal["best", "one-to-one"] = "best") -> ReusePlan:
    """The plan with the heads of every wholly reusing layer assigned by the similarity of their maps.

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
    """The plan of `num_groups` groups of consecutive layers whose maps are most alike, heads assigned.

    Maximises, over all ways to cut the layers into groups, the summed similarity of every reusing layer to the first
    layer of its group (dynamic programming over the last group's first layer).
    """
    layers = measured.layers
    num_layers = len(layers)
    if not 1 <= num_groups <= num_layers:
        raise ValueError(f"num_groups must be between 1 and the model's {num_layers} layers, got {num_groups}")
    # best[g][n]: the greatest summed similarity of the first n layers in g groups, and where the last group starts.
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


def _assign(alike: Tensor, mode: str) -> list[int]:
    """For each head of the reusing layer (columns), a head of the source layer (rows)."""
    if mode == "best":
        return alike.argmax(dim=0).tolist()
    if mode == "one-to-one":
        heads, sources = linear_sum_assignment(alike.T.numpy(), maximize=True)
        return [int(source) for _, source in sorted(zip(heads, sources, strict=True))]
    raise ValueError(f"mode must be error, best or one-to-one, got {mode!r}")
