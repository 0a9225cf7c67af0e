"""Which head of the source layer should each head of a reusing layer apply?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mapreuse.measure import Similarity, similarity
from mapreuse.plan import LayerSource, ReusePlan


def align(
    original: nn.Module,
    plan: ReusePlan,
    batches: Iterable[Mapping[str, Any]],
    *,
    mode: Literal["best", "one-to-one"] = "best",
) -> ReusePlan:
    """The plan with the heads of every wholly reusing layer assigned by the similarity of their maps.

        assignment[l] = argmax Σ_h similarity(source(l), assignment[l][h]; l, h)

    Args:
        original: the model before `apply`; it is left as it is.
        plan: which layers share. Layers that are planned head by head already keep their heads.
        batches: calibration batches, keyword dictionaries for the model's forward.
        mode: "best" takes the most similar source head for each head, so several may share one; "one-to-one" uses
            every source head once (the Hungarian assignment).

    Raises:
        ValueError: where there are no batches, or the plan does not fit the model.
    """
    return align_by(similarity(original, batches), plan, mode=mode)


def align_by(measured: Similarity, plan: ReusePlan, *, mode: Literal["best", "one-to-one"] = "best") -> ReusePlan:
    """As `align`, from similarities measured before."""
    if plan.num_layers != len(measured.heads):
        raise ValueError(f"the plan speaks of {plan.num_layers} layers, but the model has {len(measured.heads)}")
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
    raise ValueError(f"mode must be best or one-to-one, got {mode!r}")
