"""Which heads should reuse next? What each set of reusing heads should cost, before any plan is converted."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from mapreuse.conversion._align import Head, factors, output_errors
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

_CANDIDATES = 4
"""Maps by which each head is tried: those that change its layer's output least."""

_DIMENSIONS = 32
"""Of each head's context, at most: those that the output projection makes most of."""

_PART = 0.25
"""Share of what a layer can lose that its heads lose together where its weight is measured."""

_RIDGE = 1e-3
"""Relative to the mean square of what is regressed on."""


class RefitErrors:
    """What a layer's output loses where heads of it apply other maps and its output projection is refitted.

    With C[h] the context of head h by its own map, C[h, g] by map g, O the output projection, and m the map that each
    head applies, None for its own:

        error(m) = min over W of ‖Σ_h C[h, m[h]] W[h] − Σ_h C[h] O[h]‖² / ‖Σ_h C[h] O[h]‖²

    over the positions of the calibration batches that are not padding. So a head costs nothing that the other heads
    of its layer, or its values under another map, can make up for. Contexts are reduced to the 32 dimensions that O
    makes most of. One float64 matrix for each layer holds all of that, of width heads · min(head_dim, 32) · 5.

    Args:
        original: the model before `apply`; it is left as it is.
        errors, sources: from `output_errors`, and what it was given: they name the four maps by which each head is
            tried.
        batches: calibration batches.
    """

    def __init__(
        self,
        original: nn.Module,
        errors: Mapping[int, Tensor],
        sources: Mapping[int, tuple[int, ...]],
        batches: Iterable[Mapping[str, Any]],
    ) -> None:
        self._num_heads = next(iter(errors.values())).shape[-1]
        self._parts = {layer: _parts(found, sources[layer]) for layer, found in errors.items()}
        self._grams: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._found: dict[tuple[int, tuple[Head | None, ...]], float] = {}
        reduction: dict[int, Tensor] = {}
        recorder = MapRecorder(original)
        stack = find_stack(with_projections(original))
        for batch in batches:
            maps, valid, values = recorder(batch)
            for layer, parts in self._parts.items():
                own_values = values[layer].repeat_interleave(self._num_heads // values[layer].shape[1], 1)
                if layer not in reduction:
                    reduction[layer], outputs = factors(stack.layers[layer], self._num_heads, own_values, _DIMENSIONS)
                    self._outputs[layer] = outputs.flatten(0, 1).cpu()
                reduced = own_values.double() @ reduction[layer]
                contexts = [_map_of(maps, layer, head, source).double() @ reduced[:, head] for head, source in parts]
                inputs = torch.cat([*contexts, torch.ones_like(contexts[0][..., :1])], -1)[valid]
                gram = (inputs.mT @ inputs).cpu()
                self._grams[layer] = self._grams[layer] + gram if layer in self._grams else gram

    def __call__(self, layer: int, applied: Sequence[Head | None]) -> float:
        """The error of a layer where its heads apply these maps; a map that its head was not tried by counts as
        one that contributes nothing."""
        key = layer, tuple(applied)
        if key not in self._found:
            self._found[key] = self._least(*key) if any(source is not None for source in applied) else 0.0
        return self._found[key]

    def _least(self, layer: int, applied: tuple[Head | None, ...]) -> float:
        gram, outputs, parts = self._grams[layer], self._outputs[layer], self._parts[layer]
        dim = len(outputs) // self._num_heads
        starts = [parts[one] * dim for one in enumerate(applied) if one in parts]
        constant = torch.tensor([len(gram) - 1])
        columns = torch.cat([*(torch.arange(start, start + dim) for start in starts), constant])
        own = torch.arange(len(outputs))
        among = gram[columns[:, None], columns]
        among.diagonal().add_(_RIDGE * among.diagonal().mean() + 1e-300)
        towards = gram[columns[:, None], own] @ outputs
        explained = (towards * torch.cholesky_solve(towards, torch.linalg.cholesky(among))).sum()
        size = (outputs * (gram[own[:, None], own] @ outputs)).sum()
        return max(0.0, float(1 - explained / size)) if float(size) > 0 else 0.0


def _parts(errors: Tensor, sources: tuple[int, ...]) -> dict[tuple[int, Head | None], int]:
    """For each head and map by which it is tried, its own first, where its context is among all."""
    num_heads = errors.shape[-1]
    tried: list[tuple[int, Head | None]] = [(head, None) for head in range(num_heads)]
    for head in range(num_heads):
        tried += [(head, source) for _, source in _by_error(errors[..., head], sources)[:_CANDIDATES]]
    return {one: index for index, one in enumerate(tried)}


def _by_error(errors: Float[Tensor, "sources source_heads"], sources: tuple[int, ...]) -> list[tuple[float, Head]]:
    """The heads of these layers, with what applying their map costs, the least first."""
    pairs = zip(sources, errors.tolist(), strict=True)
    return sorted((error, (source, head)) for source, row in pairs for head, error in enumerate(row))


def _map_of(maps: Sequence[Tensor], layer: int, head: int, source: Head | None) -> Float[Tensor, "batch query key"]:
    source_layer, source_head = (layer, head) if source is None else source
    return maps[source_layer][:, source_head]


class Ranking:
    """What plans should cost, and those that promise most.

    A plan is the set of heads that reuse; each takes, of the heads of earlier layers that still compute, the one
    whose map changes its layer's output least (`output_errors`). It is predicted to cost, layer by layer, what the
    layer's output loses (`RefitErrors`), weighed by what that did to the model's error, after `refit`, when only heads
    of this layer reused: the cheapest that lose a quarter of what all of them would. That is found out, one `refit` for
    each layer, where it is first asked for.

    Args:
        original: a trained model that `apply` accepts; it is left as it is.
        batches: calibration batches, at least four.
        judged: the error of a plan after `refit`, such as `Judged`.

    Attributes:
        sharing: the layers that can reuse, and the layers whose maps each may apply.
        partial: whether the model takes plans where only some heads of a layer reuse.

    Raises:
        ValueError: where no layer can reuse another's maps.
    """

    def __init__(
        self, original: nn.Module, batches: Sequence[Mapping[str, Any]], judged: Callable[[ReusePlan], float]
    ) -> None:
        sources = {layer: found for layer, found in possible_sources(original).items() if found}
        if not sources:
            raise ValueError(f"{type(original).__name__}: no two layers are of one kind, so none can share a map")
        errors = output_errors(original, sources, tqdm(batches, desc="Comparing maps", leave=False))
        progress = tqdm(batches, desc="Comparing outputs", leave=False)
        self._refit_errors = RefitErrors(original, errors, sources, progress)
        self.sharing = sources
        self.num_layers = len(find_stack(original).layers)
        self.num_heads = next(iter(errors.values())).shape[-1]
        self._by_error = {
            (layer, head): _by_error(found[..., head], sources[layer])
            for layer, found in errors.items()
            for head in range(self.num_heads)
        }
        self.partial = self._allows_partial(original)
        self._judged = judged

    @functools.cached_property
    def _weights(self) -> dict[int, float]:
        """By how much the model's error grows with what a layer's output loses, found out of each layer alone: of the
        cheapest heads of it, or of all if not `partial`."""
        of_original, found = self._judged(ReusePlan.full(self.num_layers)), {}
        for layer in tqdm(self.sharing, desc="Layers alone", leave=False):
            part = self._part(layer)
            error = self._judged(self.plan(part))
            found[layer] = max(error - of_original, 0.0) / max(self._lost(part), 1e-9)
        return found

    @property
    def all(self) -> frozenset[Head]:
        """Every head of every layer that can reuse."""
        return frozenset().union(*map(self.heads, self.sharing))

    def heads(self, layer: int) -> frozenset[Head]:
        """Every head of a layer."""
        return frozenset((layer, head) for head in range(self.num_heads))

    def plan(self, reusing: frozenset[Head]) -> ReusePlan:
        """The plan where these heads reuse, each its best source. Raises `ValueError` where a head has none left."""
        layers: list[list[Head | None]] = [[None] * self.num_heads for _ in range(self.num_layers)]
        for layer, head in reusing:
            left = (source for _, source in self._by_error.get((layer, head), []) if source not in reusing)
            layers[layer][head] = next(left, None)
            if layers[layer][head] is None:
                raise ValueError(
                    f"layer {layer}, head {head}: no head of an earlier layer of its kind computes its map"
                )
        return ReusePlan(tuple(map(tuple, layers)))

    def predicted(self, reusing: frozenset[Head]) -> float:
        """What that plan should cost."""
        return self._lost(reusing, self._weights)

    def grown(self, reusing: frozenset[Head], number: int) -> frozenset[Head]:
        """These heads and `number` more, one after the other, whichever should cost least; or all there are."""
        for _ in range(number):
            if reusing == self.all:
                break
            reusing = self._with_cheapest(reusing, self.all, self._weights)
        return reusing

    def _lost(self, reusing: frozenset[Head], weights: Mapping[int, float] | None = None) -> float:
        """What the outputs of layers lose where these heads reuse, weighed layer by layer, or summed as it is."""
        plan, cost = self.plan(reusing), 0.0
        for layer in sorted({layer for layer, _ in reusing}):
            lost = self._refit_errors(layer, plan.heads(layer, self.num_heads))
            cost += lost if weights is None else weights[layer] * lost
        return cost

    def _with_cheapest(
        self, reusing: frozenset[Head], among: frozenset[Head], weights: Mapping[int, float] | None = None
    ) -> frozenset[Head]:
        prices = {head: self._lost(reusing | {head}, weights) for head in sorted(among - reusing)}
        return reusing | {min(prices, key=prices.__getitem__)}

    def _part(self, layer: int) -> frozenset[Head]:
        """The cheapest heads of a layer that together lose a good part of what all would; all if not `partial`."""
        heads = self.heads(layer)
        if not self.partial:
            return heads
        enough, reusing = _PART * self._lost(heads), frozenset[Head]()
        while not reusing or self._lost(reusing) < enough:
            reusing = self._with_cheapest(reusing, heads)
        return reusing

    def _allows_partial(self, original: nn.Module) -> bool:
        if self.num_heads == 1:
            return False
        half = frozenset((max(self.sharing), head) for head in range(1, self.num_heads, 2))
        try:
            apply(copy_with_same_weights(original), self.plan(half))
        except Unsupported as reason:
            logger.info("plans that let part of a layer's heads reuse are left out: %s", reason)
            return False
        return True
