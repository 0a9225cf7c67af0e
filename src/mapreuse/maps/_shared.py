"""The maps of one forward pass, on their way from computing to reusing layers."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mapreuse.maps._map import AttentionMap, DenseMap
from mapreuse.maps._scores import Scores
from mapreuse.maps._storage import STORAGES, stored_dtype
from mapreuse.maps._storage_choice import Demand, choose

logger = logging.getLogger("mapreuse")

_DIFFERENTIABLE = ("dense", "recompute")


class _Maps(dict[int, Any]):
    """Maps by layer; a class of its own, so that there are weak references to it."""


class SharedMaps:
    """The attention maps alive during one forward pass of one stack of layers.

    A new one is made for every forward pass and travels as an argument from layer to layer, so nothing is shared
    between threads, models or calls. A map is dropped after its last reader, and its memory is handed to the next
    computing layer. Layers may share other tensors the same way, such as keys and values: `publish`, `read` and
    `release` take any object.

    Args:
        storage: how maps are carried, one of `STORAGES`, or "auto" for what `choose` finds for the first of them.
        demand: what the plan asks of the maps; needed by "auto" and by a budget.
        budget: bytes that the maps alive at once may take; None for no limit, or, under "auto", `choose`'s own.
        retain: keep every map until the end of the pass. Autograd holds them that long anyway, and gradient
            checkpointing runs layers again.
        differentiable: the pass is one that gradients will flow through, so that no map may be published without.
        output_attentions: the caller wants to see the map in effect in every layer.
    """

    _kept: weakref.ref[_Maps] | None = None  # of the class, too: `torch.compile` makes objects that it never sets up

    def __init__(
        self,
        *,
        storage: str = "dense",
        demand: Demand | None = None,
        budget: int | None = None,
        retain: bool = False,
        differentiable: bool = False,
        output_attentions: bool = False,
    ) -> None:
        self._storage = storage
        self._demand = demand
        self._budget = budget
        self._is_settled = demand is None or (storage != "auto" and budget is None)
        self.output_attentions = output_attentions
        self._maps: _Maps | None = _Maps()
        self._kept = None
        self._retain = retain
        self._differentiable = differentiable
        self._free: Tensor | None = None

    def storage(self, scores: Scores, values: Tensor) -> str:
        """How the maps of this pass are carried, settled when the first is about to be computed.

        Raises `ValueError`, naming the budget that would do, where no map can be carried within the budget.
        """
        if self._is_settled:
            return self._storage
        assert self._demand is not None
        # What compresses without gradients stores weights as they are with them, and in compiled code.
        exact = "recompute" if self._storage == "recompute" else "dense"
        if torch.compiler.is_compiling():
            needed = self._demand.nbytes(exact, scores, retain=self._retain)
            if self._budget is not None and needed > self._budget:
                raise ValueError(
                    f"compiled code carries shared maps as {exact}, which needs memory_budget={needed}, more than "
                    f"memory_budget={self._budget}"
                )
            self._storage, self._is_settled = exact, True
        else:
            names: tuple[str, ...] = (exact if torch.is_grad_enabled() else self._storage,)
            if self._storage == "auto":
                names = _DIFFERENTIABLE if torch.is_grad_enabled() else STORAGES
            choice = choose(scores, values, self._demand, storages=names, budget=self._budget, retain=self._retain)
            self._storage, self._is_settled = choice.storage, True
            logger.info("maps of %s positions: %s", "×".join(map(str, scores.shape[2:])), choice)
        return self._storage

    def publish(self, layer: int, attention_map: AttentionMap | Any) -> None:
        """Hand on the map of a computing layer. Raises `ValueError` where its gradient would be lost."""
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {layer} computes its map without gradients inside a pass that needs them: reentrant gradient "
                "checkpointing would cut the gradient of shared maps; use use_reentrant=False, as in "
                "activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False})"
            )
        # A layer that runs again after the pass does so for its own gradient: its readers had theirs before.
        if self._maps is not None:
            self._maps[layer] = attention_map

    def read(self, layer: int) -> AttentionMap | Any | None:
        """The map of `layer`, or None where that layer did not run (LayerDrop)."""
        return self._alive().get(layer)

    def _alive(self) -> _Maps:
        maps = self._kept() if self._maps is None and self._kept is not None else self._maps
        if maps is None:
            raise RuntimeError(
                "a layer is run again for its gradient (gradient checkpointing) after the output of its pass was "
                "deleted, and the maps with it; keep the output until the backward pass is done"
            )
        return maps

    def close(self, output: Any) -> None:
        """The pass is over: from now on, its maps are kept by the autograd graph of its output.

        Gradient checkpointing keeps this object in that graph, and maps are part of the graph themselves; were they
        kept by this object, too, they would keep each other for ever.
        """
        roots: set[Any] = {tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)} - {None}
        if not roots or self._maps is None:
            return
        for root in roots:
            root.metadata.setdefault("attention maps", []).append(self._maps)
        self._kept, self._maps = weakref.ref(self._maps), None

    def __del__(self) -> None:
        # Nothing is going to run again: the graph holds what it needs of the maps itself.
        if self._kept is not None and (maps := self._kept()) is not None:
            maps.clear()

    def release(self, layer: int) -> None:
        """Forget the map of `layer`: its last reader is done."""
        if self._retain or self._maps is None:
            return
        attention_map = self._maps.pop(layer, None)
        if isinstance(attention_map, DenseMap):
            self._free = attention_map.weights

    def buffer(self, scores: Scores) -> Tensor | None:
        """Memory of a released map, if it can hold that of these scores; what cannot is given back."""
        free, self._free = self._free, None
        if free is None or free.shape != scores.shape or free.device != scores.query.device:
            return None
        return free if free.dtype == stored_dtype(self._storage, scores) else None
