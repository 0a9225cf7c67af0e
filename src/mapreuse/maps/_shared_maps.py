"""The shared maps of one forward pass."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mapreuse.maps._map import DenseMap
from mapreuse.maps._operators import is_plain
from mapreuse.maps._scores import Scores
from mapreuse.maps._storage import STORAGES, stored_dtype
from mapreuse.maps._storage_choice import MapCounts, choose_storage

logger = logging.getLogger("mapreuse")

_EXACT: tuple[str, ...] = ("dense", "recompute")
"""Storages with exact weights and with gradients."""


class _Maps(dict[tuple[str, int], Any]):
    """Maps by share mode and layer. Unlike `dict` itself, it supports weak references."""


class SharedMaps:
    """Carries attention maps from computing to reusing layers during one forward pass.

    Every forward pass of a stack of layers makes its own object and passes it to its layers as an argument, so that
    threads, models and calls share nothing. In each pass:

    1. a computing layer calls `publish(layer, attention_map)`;
    2. each reusing layer calls `read(source).apply(values)`;
    3. the last of them calls `release(source)`, which frees the map. Its memory serves the next computing layer;
    4. the stack calls `close(output)`.

    In share mode "keys", layers publish `SharedKeys` in place of an `AttentionMap`, and in share mode "corrected",
    `SharedScores`. Any other object will do, too.

    Args:
        storage: one of `STORAGES`, or "auto" to choose the fastest when the first map is computed.
        counts: numbers of maps in the pass. Needed for "auto" and for a budget.
        budget: maximum size in bytes of the maps alive at once. None: no limit; for "auto", a quarter of the memory.
        retain: keep every map until the end of the pass. Passes with gradients need it: autograd keeps the maps
            anyway, and gradient checkpointing runs layers again.
        differentiable: gradients will flow through the pass, so publishing a map without gradients is an error.
        output_attentions: the caller wants the map that each layer applied. Maps are not compressed then.
    """

    _kept: weakref.ref[_Maps] | None = None  # `torch.compile` also makes objects without calling `__init__`

    def __init__(
        self,
        *,
        storage: str = "dense",
        counts: MapCounts | None = None,
        budget: int | None = None,
        retain: bool = False,
        differentiable: bool = False,
        output_attentions: bool = False,
    ) -> None:
        is_compressed = storage not in (*_EXACT, "auto")
        self._storage = "dense" if output_attentions and is_compressed else storage
        self._counts = counts
        self._budget = budget
        self._is_chosen = counts is None or (storage != "auto" and budget is None)
        self.output_attentions = output_attentions
        self._maps: _Maps | None = _Maps()
        self._kept = None
        self._retain = retain
        self._differentiable = differentiable
        self._free: Tensor | None = None

    def storage(self, scores: Scores, values: Tensor) -> str:
        """The storage of this pass, chosen when the first map is about to be computed.

        Raises:
            ValueError: if no storage fits the budget. The message names a budget that would.
        """
        if self._is_chosen:
            return self._storage
        assert self._counts is not None
        exact = "recompute" if self._storage == "recompute" else "dense"
        plain = is_plain(scores, values)
        stored = exact if plain or torch.is_grad_enabled() or self._storage == "auto" else self._storage
        if plain or torch.compiler.is_compiling():  # the choice by a benchmark cannot be recorded
            needed = self._counts.nbytes(stored, scores, retain=self._retain)
            if self._budget is not None and needed > self._budget:
                raise ValueError(
                    f"a compiled or recorded pass stores shared maps as {stored}, which needs "
                    f"memory_budget={needed}, but got memory_budget={self._budget}"
                )
            self._storage, self._is_chosen = stored, True
            return stored
        names: tuple[str, ...] = (stored,)
        if self._storage == "auto":
            names = _EXACT if torch.is_grad_enabled() or self.output_attentions else STORAGES
        choice = choose_storage(scores, values, self._counts, names, budget=self._budget, retain=self._retain)
        self._storage, self._is_chosen = choice.storage, True
        logger.info("maps of %s positions: %s", "×".join(map(str, scores.shape[2:])), choice)
        return self._storage

    def publish(self, layer: int, attention_map: Any, share: str = "map") -> None:
        """Make what a computing layer shares, in a share mode, available to its readers.

        Raises:
            ValueError: if gradients are needed but disabled, as in reentrant gradient checkpointing.
        """
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {layer} computes its shared map without gradients, but the pass needs them. Reentrant "
                "gradient checkpointing loses the gradient of shared maps; use use_reentrant=False: "
                "activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False})"
            )
        # After the pass, checkpointing runs layers again; their readers have the map already.
        if self._maps is not None:
            self._maps[share, layer] = attention_map

    def read(self, layer: int, share: str = "map") -> Any:
        """What `layer` published in a share mode, or None if LayerDrop skipped that layer."""
        maps = self._kept() if self._maps is None and self._kept is not None else self._maps
        if maps is None:
            raise RuntimeError(
                "gradient checkpointing runs a layer again, but the output of the forward pass was deleted and the "
                "shared maps with it; keep the output until the backward pass is done"
            )
        return maps.get((share, layer))

    def close(self, output: Any) -> None:
        """End the pass: from now on, the autograd graph of its output keeps the maps alive.

        Gradient checkpointing stores this object in that graph, and the maps are part of the graph. If this object
        kept the maps as well, the reference cycle would never be freed.
        """
        roots: set[Any] = {tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)} - {None}
        if not roots or self._maps is None:
            return
        for root in roots:
            root.metadata.setdefault("attention maps", []).append(self._maps)
        self._kept, self._maps = weakref.ref(self._maps), None

    def __del__(self) -> None:
        # No layer will run again, and the graph keeps the tensors that it needs itself.
        if self._kept is not None and (maps := self._kept()) is not None:
            maps.clear()

    def release(self, layer: int) -> None:
        """Drop what `layer` published after its last reader."""
        if self._retain or self._maps is None:
            return
        for share in ("keys", "corrected"):
            self._maps.pop((share, layer), None)
        attention_map = self._maps.pop(("map", layer), None)
        if isinstance(attention_map, DenseMap):
            self._free = attention_map.weights

    def buffer(self, scores: Scores) -> Tensor | None:
        """Memory of a released map if it fits the map of these scores, else None. It is returned once."""
        free, self._free = self._free, None
        if free is None or free.shape != scores.shape or free.device != scores.query.device:
            return None
        return free if free.dtype == stored_dtype(self._storage, scores) else None
