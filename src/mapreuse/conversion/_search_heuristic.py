"""Which heads should reuse next? Predicted errors of plans, before any plan is converted."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.console import tracked
from mapreuse.conversion._align import Head, output_errors, output_factors
from mapreuse.conversion._kept_work import LayerSums
from mapreuse.models import (
    MapRecorder,
    Unsupported,
    apply,
    copy_with_same_weights,
    find_stack,
    possible_sources,
    with_projections,
)
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

_MAX_MAPS = 4
"""Maps tried for each head: those that change its layer's output least."""

_MAX_RANK = 32
"""Dimensions kept of each head's context: the largest singular values of its output projection."""

_WEIGHT_FRACTION = 0.25
"""The weight of a layer is measured at this fraction of the layer's maximum output error."""

_RIDGE = 1e-3
"""Relative to the mean square of the inputs."""


class RefitErrors:
    """Error of a layer's output after its heads apply other maps and its output projection is refitted.

        error(m) = min over W of ‖Σ_h C[h, m[h]] W[h] − Σ_h C[h] O[h]‖² / ‖Σ_h C[h] O[h]‖²

    with m[h] the map that head h applies, C[h, m] the context of head h by map m, C[h] by its own map, and O the
    output projection. Padding is left out. Contexts are reduced to the 32 dimensions with the largest singular values
    of O. Each layer stores one float64 matrix of width heads · min(head_dim, 32) · 5.

    Args:
        original: the model before `apply`; it is not changed.
        errors: from `output_errors`. They choose the four maps that are tried for each head.
        sources: the argument of `output_errors`.
        batches: calibration batches.
        cache: as for `output_errors`.
    """

    def __init__(
        self,
        original: nn.Module,
        errors: Mapping[int, Tensor],
        sources: Mapping[int, tuple[int, ...]],
        batches: Iterable[Mapping[str, Any]],
        cache: Path | None = None,
    ) -> None:
        self._num_heads = next(iter(errors.values())).shape[-1]
        self._parts = {layer: _parts(found, sources[layer]) for layer, found in errors.items()}
        self._errors: dict[tuple[int, tuple[Head | None, ...]], float] = {}
        recorder = MapRecorder(original)
        stack = find_stack(with_projections(original))
        with LayerSums(None if cache is None else cache / "outputs.safetensors", "comparing outputs") as self._sums:
            for number, batch in enumerate(batches):
                layers = [layer for layer in self._parts if self._sums.lacks(layer, number)]
                if not layers:
                    continue
                maps, valid, values = recorder(batch)
                for layer in layers:
                    own_values = values[layer].repeat_interleave(self._num_heads // values[layer].shape[1], 1)
                    if not self._sums[layer]:
                        factors = output_factors(stack.layers[layer], self._num_heads, own_values, _MAX_RANK)
                        self._sums.add(layer, number - 1, dict(zip(("reduction", "outputs"), factors, strict=True)))
                    reduced = own_values.double() @ self._sums[layer]["reduction"].to(own_values.device)
                    self._sums.add(layer, number, {"gram": self._gram(layer, maps, reduced, valid)})
                self._sums.keep()

    def __call__(self, layer: int, applied: Sequence[Head | None]) -> float:
        """The error of a layer whose heads apply these maps (None: its own). An untried map counts as zero."""
        key = layer, tuple(applied)
        if key not in self._errors:
            self._errors[key] = self._solve(*key) if any(source is not None for source in applied) else 0.0
        return self._errors[key]

    def _gram(self, layer: int, maps: Sequence[Tensor], reduced: Tensor, valid: Tensor) -> Tensor:
        """Products of the contexts by all maps that are tried, and a one, in a batch."""
        applied = [(head, source or (layer, head)) for head, source in self._parts[layer]]
        contexts = [maps[one][:, number].double() @ reduced[:, head] for head, (one, number) in applied]
        inputs = torch.cat([*contexts, torch.ones_like(contexts[0][..., :1])], -1)[valid]
        return inputs.mT @ inputs

    def _solve(self, layer: int, applied: tuple[Head | None, ...]) -> float:
        sums, parts = self._sums[layer], self._parts[layer]
        gram, outputs = sums["gram"], sums["outputs"].flatten(0, 1)
        dim = len(outputs) // self._num_heads
        starts = [parts[one] * dim for one in enumerate(applied) if one in parts]
        constant = torch.tensor([len(gram) - 1])
        columns = torch.cat([*(torch.arange(start, start + dim) for start in starts), constant])
        own = torch.arange(len(outputs))
        chosen = gram[columns[:, None], columns]
        chosen.diagonal().add_(_RIDGE * chosen.diagonal().mean() + 1e-300)
        moment = gram[columns[:, None], own] @ outputs
        explained = (moment * torch.cholesky_solve(moment, torch.linalg.cholesky(chosen))).sum()
        size = (outputs * (gram[own[:, None], own] @ outputs)).sum()
        return max(0.0, float(1 - explained / size)) if float(size) > 0 else 0.0


class SearchHeuristic:
    """Predicts errors of plans and proposes the next heads to reuse.

    A plan is a set of reusing heads. Each applies the map that changes its layer's output least, among the heads of
    earlier layers that compute. The predicted error is a sum over layers:

        error = Σ_l weight[l] · (error of the output of layer l after a refit of its output projection)

    A weight is measured once, with a plan in which only heads of this layer reuse: the model's error after `refit`,
    divided by the error of the layer's output. The plan adds heads by least output error, up to a quarter of the
    maximum of the layer.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least four.
        evaluate: the error of a plan after `refit`, such as a `PlanEvaluator`.
        cache: as for `output_errors`.

    Attributes:
        sources: for each layer that can reuse, the possible source layers.
        num_layers, num_heads: of the model.
        partial: whether some heads of a layer can reuse while others compute.

    Raises:
        ValueError: if no layer can reuse another layer's maps.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        evaluate: Callable[[ReusePlan], float],
        cache: Path | None = None,
    ) -> None:
        sources = {layer: found for layer, found in possible_sources(original).items() if found}
        if not sources:
            raise ValueError(f"{type(original).__name__}: no two layers are of one kind, so none can share a map")
        errors = output_errors(original, sources, tracked("comparing maps", batches), cache=cache)
        self._refit_errors = RefitErrors(original, errors, sources, tracked("comparing outputs", batches), cache)
        self.sources = sources
        self.num_layers = len(find_stack(original).layers)
        self.num_heads = next(iter(errors.values())).shape[-1]
        self._by_error = {
            (layer, head): _by_error(found[..., head], sources[layer])
            for layer, found in errors.items()
            for head in range(self.num_heads)
        }
        self.partial = self._supports_partial(original)
        self._evaluate = evaluate

    @functools.cached_property
    def _weights(self) -> dict[int, float]:
        """Growth of the model's error with each layer's output error."""
        original_error, found = self._evaluate(ReusePlan.full(self.num_layers)), {}
        for layer in tracked("measuring layers", list(self.sources)):
            part = self._part(layer)
            error = self._evaluate(self.plan(part))
            found[layer] = max(error - original_error, 0.0) / max(self._output_error(part), 1e-9)
        return found

    @property
    def timed(self) -> dict[str, frozenset[Head]]:
        """The largest plans: all heads reuse, and half of the heads of each layer if `partial`."""
        if not self.partial:
            return {"all": self.all}
        half = frozenset((layer, head) for layer in self.sources for head in range(1, self.num_heads, 2))
        return {"all": self.all, "half": half}

    @property
    def size(self) -> int:
        """Number of heads that can reuse."""
        return len(self.all)

    @property
    def all(self) -> frozenset[Head]:
        """Every head of every layer that can reuse."""
        return frozenset().union(*map(self.heads, self.sources))

    def heads(self, layer: int) -> frozenset[Head]:
        """Every head of a layer."""
        return frozenset((layer, head) for head in range(self.num_heads))

    def plan(self, reusing: frozenset[Head]) -> ReusePlan:
        """The plan with these reusing heads, each with its best source; `ValueError` if a head has no source."""
        layers: list[list[Head | None]] = [[None] * self.num_heads for _ in range(self.num_layers)]
        for layer, head in reusing:
            left = (source for source in self._by_error.get((layer, head), []) if source not in reusing)
            layers[layer][head] = next(left, None)
            if layers[layer][head] is None:
                raise ValueError(
                    f"layer {layer}, head {head}: no head of an earlier layer of its kind computes its map"
                )
        return ReusePlan(tuple(map(tuple, layers)))

    def predicted(self, reusing: frozenset[Head]) -> float:
        """The predicted error of the plan with these reusing heads."""
        return self._output_error(reusing, self._weights)

    def grown(self, reusing: frozenset[Head], number: int) -> frozenset[Head]:
        """These heads and at most `number` more, added one by one by least predicted error."""
        for _ in range(number):
            if reusing == self.all:
                break
            reusing = self._with_best(reusing, self.all, self._weights)
        return reusing

    def extensions(self, reusing: frozenset[Head]) -> list[frozenset[Head]]:
        """Larger sets: all heads of a layer more, or the half or full number of a layer's heads from all layers."""
        found = [reusing | self.heads(layer) for layer in self.sources]
        if self.partial:
            half = self.grown(reusing, self.num_heads // 2)
            found += [half, self.grown(half, self.num_heads - self.num_heads // 2)]
        return [one for one in dict.fromkeys(found) if one != reusing]

    def units(self, reusing: frozenset[Head]) -> dict[str, float]:
        """Number of layers that reuse like those of each of the `timed` plans."""
        found = dict.fromkeys(self.timed, 0.0)
        for number in Counter(layer for layer, _ in reusing).values():
            if number == self.num_heads:
                found["all"] += 1
            else:
                found["half"] += number / (self.num_heads // 2)
        return found

    def _output_error(self, reusing: frozenset[Head], weights: Mapping[int, float] | None = None) -> float:
        """The summed error of the layers' outputs, weighted or not."""
        plan, total = self.plan(reusing), 0.0
        for layer in sorted({layer for layer, _ in reusing}):
            error = self._refit_errors(layer, plan.heads(layer, self.num_heads))
            total += error if weights is None else weights[layer] * error
        return total

    def _with_best(
        self, reusing: frozenset[Head], among: frozenset[Head], weights: Mapping[int, float] | None = None
    ) -> frozenset[Head]:
        errors = {head: self._output_error(reusing | {head}, weights) for head in sorted(among - reusing)}
        return reusing | {min(errors, key=errors.__getitem__)}

    def _part(self, layer: int) -> frozenset[Head]:
        """The reusing heads in the measurement of a layer's weight; all heads if not `partial`."""
        heads = self.heads(layer)
        if not self.partial:
            return heads
        enough, reusing = _WEIGHT_FRACTION * self._output_error(heads), frozenset[Head]()
        while not reusing or self._output_error(reusing) < enough:
            reusing = self._with_best(reusing, heads)
        return reusing

    def _supports_partial(self, original: nn.Module) -> bool:
        if self.num_heads == 1:
            return False
        half = frozenset((max(self.sources), head) for head in range(1, self.num_heads, 2))
        try:
            apply(copy_with_same_weights(original), self.plan(half))
        except Unsupported as reason:
            logger.info("the search leaves out plans in which only some heads of a layer reuse: %s", reason)
            return False
        return True


def _parts(errors: Tensor, sources: tuple[int, ...]) -> dict[tuple[int, Head | None], int]:
    """Position among all contexts of each (head, map tried for it). The heads' own maps come first."""
    heads = range(errors.shape[-1])
    tried: list[tuple[int, Head | None]] = [(head, None) for head in heads]
    tried += [(head, source) for head in heads for source in _by_error(errors[..., head], sources)[:_MAX_MAPS]]
    return {one: index for index, one in enumerate(tried)}


def _by_error(errors: Float[Tensor, "sources source_heads"], sources: tuple[int, ...]) -> list[Head]:
    """The heads of these layers, ordered by the error of applying their map."""
    pairs = zip(sources, errors.tolist(), strict=True)
    found = sorted((error, (source, head)) for source, row in pairs for head, error in enumerate(row))
    return [head for _, head in found]
