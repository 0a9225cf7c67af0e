"""Which layer should reuse next, and by which share mode? Predicted errors of plans for whole layers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.console import tracked
from mapreuse.conversion._align import output_errors, output_factors
from mapreuse.conversion._kept_work import LayerSums
from mapreuse.conversion._targets import sampled_queries
from mapreuse.conversion._validation import digest
from mapreuse.maps import KeySettings, keys_of_map
from mapreuse.models import (
    MapRecorder,
    apply,
    copy_with_same_weights,
    find_stack,
    possible_sources,
    with_projections,
)
from mapreuse.plan import SETTINGS, LayerSource, ReusePlan

Reader: TypeAlias = tuple[int, str]
"""A reusing layer and its share mode."""


class ShareModeHeuristic:
    """Predicts errors of plans for whole layers, in several share modes, and proposes the next layers to reuse.

    A plan is a set of reusing layers with a share mode each. In the order of layers, each takes the source with the
    least output error, among the earlier layers of its kind that compute and have no reader of another mode. The
    predicted error is a sum over the reusing layers:

        error = Σ_l weight[l, mode] · (error of the output of layer l, in this mode and with this source)

    The error of an output is that of `key_errors` in share mode "keys". In the modes "map" and "corrected", it is the
    sum over the heads of the least error in `output_errors`, and each head is assigned the source head with this
    error. A weight is measured once: the model's error if only this layer reuses, in this mode and from its best
    source, divided by the error of the layer's output.

    Args:
        original: a trained model that `apply` accepts; it is not changed.
        batches: calibration batches, at least four.
        evaluate: the error of a plan after `refit`, such as a `PlanEvaluator`.
        cache: as for `output_errors`.
        share: share modes to choose from.
        keys, window, block, rank: settings of the share modes, as for `ReusePlan`.

    Attributes:
        sources: for each layer that can reuse, the possible source layers.
        num_layers: of the model.
        timed: for each share mode, the largest set of reusing layers.

    Raises:
        ValueError: if no layer can reuse another one's maps, the model does not serve a share mode (`Unsupported`),
            or a share mode or setting is not valid.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        evaluate: Callable[[ReusePlan], float],
        cache: Path | None = None,
        *,
        share: Sequence[str],
        keys: int | None = None,
        window: int | None = None,
        block: int | None = None,
        rank: int | None = None,
    ) -> None:
        self._example = example_of(share, keys=keys, window=window, block=block, rank=rank)
        self._modes = tuple(dict.fromkeys(share))
        self.sources = {layer: found for layer, found in possible_sources(original).items() if found}
        if not self.sources:
            raise ValueError(f"{type(original).__name__}: no two layers are of one kind, so none can share a map")
        self.num_layers = len(find_stack(original).layers)
        self._evaluate = evaluate
        self._heads: dict[Reader, dict[int, LayerSource]] = {}
        self._errors: dict[Reader, dict[int, float]] = {}
        for mode in self._modes:
            last = max(self.sources)
            trial = ReusePlan.from_sources([*range(last), self.sources[last][0], *range(last + 1, self.num_layers)])
            apply(copy_with_same_weights(original), self._shared(trial.layers, (mode,) * self.num_layers))
        if {"map", "corrected"} & set(self._modes):
            found = output_errors(original, self.sources, tracked("comparing maps", batches), cache=cache)
            for layer, errors in found.items():
                least, heads = errors.min(dim=1)
                for mode in (mode for mode in self._modes if mode != "keys"):
                    self._note(layer, mode, least.sum(-1).tolist(), heads.tolist())
        if "keys" in self._modes:
            settings = KeySettings(*(getattr(self._example, name) for name in ("keys", "window", "block")))
            compared = tracked("comparing keys", batches)
            for layer, errors in key_errors(original, self.sources, compared, settings, cache=cache).items():
                self._note(layer, "keys", errors.tolist())
        self.timed = {mode: self._largest(mode) for mode in self._modes}

    def _note(self, layer: int, mode: str, errors: list[float], heads: list[list[int]] | None = None) -> None:
        """Store the errors of a layer by source, and the head assignments."""
        sources = self.sources[layer]
        self._errors[layer, mode] = dict(zip(sources, errors, strict=True))
        self._heads[layer, mode] = {
            source: source if heads is None else tuple((source, head) for head in heads[index])
            for index, source in enumerate(sources)
        }

    @property
    def size(self) -> int:
        """Number of layers that can reuse."""
        return len(self.sources)

    @functools.cached_property
    def _weights(self) -> dict[Reader, float]:
        """Growth of the model's error with each layer's output error, in each mode."""
        original_error, found = self._evaluate(ReusePlan.full(self.num_layers)), {}
        for reader in tracked("measuring layers", [(one, mode) for mode in self._modes for one in self.sources]):
            growth = self._evaluate(self.plan(frozenset({reader}))) - original_error
            found[reader] = max(growth, 0.0) / max(min(self._errors[reader].values()), 1e-9)
        return found

    def _assigned(self, reusing: frozenset[Reader]) -> dict[int, int]:
        """The source of each reusing layer; `ValueError` if one has none."""
        modes, found = dict(reusing), dict[int, int]()
        for layer, mode in sorted(reusing):
            taken = {source for reader, source in found.items() if modes[reader] != mode}
            errors = self._errors.get((layer, mode), {})
            possible = [source for source in errors if source not in modes and source not in taken]
            if not possible:
                raise ValueError(
                    f"layer {layer}: no earlier layer of its kind computes its map for share mode {mode!r}"
                )
            found[layer] = min(possible, key=errors.__getitem__)
        return found

    def plan(self, reusing: frozenset[Reader]) -> ReusePlan:
        """The plan with these reusing layers, each with its best source; `ValueError` if a layer has no source."""
        layers: list[LayerSource] = [None] * self.num_layers
        shares: list[str | None] = [None] * self.num_layers
        sources = self._assigned(reusing)
        for layer, mode in reusing:
            layers[layer], shares[layer] = self._heads[layer, mode][sources[layer]], mode
        return self._shared(tuple(layers), tuple(shares))

    def _shared(self, layers: tuple[LayerSource, ...], shares: tuple[str | None, ...]) -> ReusePlan:
        """A plan with the settings of the share modes that it uses."""
        used = {mode for mode, source in zip(shares, layers, strict=True) if source is not None}
        settings = {name: getattr(self._example, name) for name, (mode, _) in SETTINGS.items() if mode in used}
        return ReusePlan(layers, shares if used else "map", **settings)

    def predicted(self, reusing: frozenset[Reader]) -> float:
        """The predicted error of the plan with these reusing layers."""
        sources = self._assigned(reusing)
        return sum((self._weights[one] * self._errors[one][sources[one[0]]] for one in reusing), 0.0)

    def extensions(self, reusing: frozenset[Reader]) -> list[frozenset[Reader]]:
        """Plans in which one more layer reuses, or all readers of a source reuse by another mode."""
        modes, sources = dict(reusing), self._assigned(reusing)
        found = [reusing | {(layer, mode)} for layer in self.sources if layer not in modes for mode in self._modes]
        for source in sorted(set(sources.values())):
            readers = {one for one in reusing if sources[one[0]] == source}
            changed = (frozenset((layer, mode) for layer, _ in readers) for mode in self._modes)
            found += [reusing - readers | one for one in changed if one != readers]
        return [one for one in found if self._is_possible(one)]

    def units(self, reusing: frozenset[Reader]) -> Mapping[str, int]:
        """Number of reusing layers of each share mode."""
        return Counter(mode for _, mode in reusing)

    def _is_possible(self, reusing: frozenset[Reader]) -> bool:
        try:
            self._assigned(reusing)
        except ValueError:
            return False
        return True

    def _largest(self, mode: str) -> frozenset[Reader]:
        """All layers that can reuse, with one mode."""
        return frozenset((layer, mode) for layer in self.sources)


def example_of(share: Sequence[str], **settings: int | None) -> ReusePlan:
    """A plan that uses each of these share modes; `ValueError` if a mode or setting is not valid."""
    if not share:
        raise ValueError("share needs at least one mode, such as ('map', 'keys')")
    layers = tuple(None if index % 2 == 0 else index - 1 for index in range(2 * len(share)))
    return ReusePlan(layers, tuple(one for mode in share for one in (None, mode)), **settings)


def key_errors(
    original: nn.Module,
    sources: Mapping[int, tuple[int, ...]],
    batches: Iterable[Mapping[str, Any]],
    settings: KeySettings,
    *,
    cache: Path | None = None,
) -> dict[int, Float[Tensor, " sources"]]:
    """Error of a layer's output if it attends to the keys of an earlier layer s.

        errors[l][s] = Σ ‖Σ_h (A[l, s, h] − A[l, h]) V[l, h] O[l, h]‖² / Σ ‖Σ_h A[l, h] V[l, h] O[l, h]‖²

    with A[l, h] the map of head h, and A[l, s, h] its weights at the keys that s publishes, the window and the first
    key, divided by their sum. The sums over queries and the arguments are those of `output_errors`.
    """
    recorder, stack = MapRecorder(original), find_stack(with_projections(original))
    projections: dict[int, Tensor] = {}
    name = digest([{str(layer): found for layer, found in sources.items()}, vars(settings)])
    with LayerSums(None if cache is None else cache / f"keys-{name}.safetensors", "comparing keys") as kept:
        for number, batch in enumerate(batches):
            layers = [layer for layer in sources if kept.lacks(layer, number)]
            if not layers:
                continue
            maps, valid, values = recorder(batch)
            queries = sampled_queries(valid.shape[1]).to(valid.device)
            rows = valid[:, queries, None]
            attended = {
                source: keys_of_map(maps[source], valid, settings).attended(valid.shape[1])[:, None, queries]
                for source in {source for layer in layers for source in sources[layer]}
            }
            for layer in layers:
                own, num_heads = maps[layer][:, :, queries].float(), maps[layer].shape[1]
                own_values = values[layer].repeat_interleave(num_heads // values[layer].shape[1], 1).float()
                if layer not in projections:
                    left, right = output_factors(stack.layers[layer], num_heads, own_values)
                    projections[layer] = (left @ right).float()

                def size(weights: Tensor, layer: int = layer, own_values: Tensor = own_values) -> Tensor:
                    output = torch.einsum("bhqd,hdw->bqw", weights @ own_values, projections[layer])
                    return (output * rows).square().sum(dtype=torch.float64)  # noqa: B023  used in this iteration

                errors = [size(_renormalised(own, attended[source]) - own) for source in sources[layer]]
                kept.add(layer, number, {"errors": torch.stack(errors), "size": size(own)})
            kept.keep()
    return {layer: (kept[layer]["errors"] / kept[layer]["size"]).float() for layer in sources}


def _renormalised(weights: Tensor, attended: Tensor) -> Tensor:
    """The weights at some keys, divided by their sum."""
    left = weights * attended
    return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
