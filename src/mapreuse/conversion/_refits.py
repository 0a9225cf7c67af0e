"""What refits did to layers, also for other plans that have these layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mapreuse.conversion._least_squares import Weights
from mapreuse.conversion._projections import maps_of, read, write
from mapreuse.models import find_stack, output_projection
from mapreuse.plan import ReusePlan


@dataclass(frozen=True)
class LayerFit:
    """What `refit` did to one reusing layer.

    Attributes:
        layer: index of the layer.
        before: held-out error of the layer's output, relative to its size, with the weights the layer had.
        after: the same with the weights it has now; equal to `before` where the refit did not help.
        ridge: the ridge chosen, or None where the layer kept its weights.
        values: whether the value projection was refitted too.
    """

    layer: int
    before: float
    after: float
    ridge: float | None
    values: bool


class Refits:
    """Layers as they were refitted. Plans of one model that are the same up to a layer refit it alike, as long as its
    heads, and those of the refitted layers before it, come in the same order, which depends on later layers too.

    Args:
        kept_bytes: how much is kept; where there is more, what was not asked for longest goes.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes, self._kept = kept_bytes, dict[tuple[Any, ...], tuple[LayerFit, Weights]]()

    def again(self, model: nn.Module, plan: ReusePlan, index: int) -> LayerFit | None:
        """Give a layer, in place, what it got in a plan that is the same up to it; None if there is none."""
        key = _up_to(index, model, plan)
        if key not in self._kept:
            return None
        report, weights = self._kept[key] = self._kept.pop(key)  # the last to go
        if report.ridge is not None:
            layer = find_stack(model).layers[index]
            write(layer, output_projection(layer), weights, moved=report.values)
        return report

    def keep(self, model: nn.Module, plan: ReusePlan, report: LayerFit) -> None:
        """Remember what a layer got."""
        layer = find_stack(model).layers[report.layer]
        projection = output_projection(layer)
        weights = read(layer, projection, maps_of(layer) if report.values else None)
        dtype = projection.weight.dtype
        kept = replace(weights, output=weights.output.to(dtype), values=weights.values.to(dtype))
        self._kept[_up_to(report.layer, model, plan)] = report, kept
        while sum(map(_nbytes, self._kept.values())) > self._kept_bytes:
            del self._kept[next(iter(self._kept))]


def _up_to(index: int, model: nn.Module, plan: ReusePlan) -> tuple[Any, ...]:
    layouts: list[Any] = [layer.attention._layout for layer in find_stack(model).layers[: index + 1]]
    return plan.layers[: index + 1], tuple(layout.order for layout in layouts if plan.reuses(layout.layer))


def _nbytes(known: tuple[LayerFit, Weights]) -> int:
    return known[1].output.nbytes + known[1].values.nbytes
