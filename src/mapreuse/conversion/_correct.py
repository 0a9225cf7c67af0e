"""Fits the low-rank queries and keys of share mode "corrected" to the maps of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mapreuse.conversion._layer_cache import LayerCache
from mapreuse.conversion._targets import Targets, is_held_out, sampled_queries
from mapreuse.maps import HeadPairs, RecomputedMap, SharedScores
from mapreuse.models import layout_of

_STEPS, _CHECK = 300, 50
"""Number of gradient steps, and of steps between evaluations on held-out batches."""

_RATE = 3e-3
"""Learning rate of Adam at the first step, for inputs of variance one. It falls to zero along a cosine."""


@dataclass(frozen=True)
class _Sample:
    """Some queries of a batch.

    Attributes:
        inputs: inputs of the attention.
        published: scores of the source at these queries.
        queries: their indices.
        target: the original's map at these queries.
        valid: True for queries that are not padding.
    """

    inputs: Float[Tensor, "batch positions width"]
    published: SharedScores
    queries: Tensor
    target: Float[Tensor, "batch heads query key"]
    valid: Bool[Tensor, "batch query"]

    def divergence(self, query: Tensor, key: Tensor, heads: HeadPairs, rank: int) -> tuple[Tensor, int]:
        """The sum over queries and heads, and their number."""
        queries, keys = (
            functional.linear(states, weight).unflatten(-1, (-1, rank)).transpose(1, 2)
            for states, weight in ((self.inputs[:, self.queries], query), (self.inputs, key))
        )
        found = RecomputedMap(self.published.corrected(queries, keys, heads)).dense()
        least = torch.finfo(found.dtype).tiny
        logarithms = self.target.clamp(min=least).log() - found.clamp(min=least).log()
        by_row = (self.target * logarithms).sum(-1) * self.valid[:, None]
        return by_row.sum(), int(self.valid.sum()) * by_row.shape[1]


def fit_correction(index: int, layers: LayerCache, targets: Targets) -> tuple[float, float]:
    """Fit the correction of a layer, in place; returns its held-out divergence with A = 0 and after the fit.

        A, B = argmin Σ KL(M[h] ‖ softmax(S[m_h] + R(X A[h]) R(X B[g])ᵀ))

    with M the maps of the layer in the original, S the scores of its source and X its inputs in the converted model.
    Adam takes 300 steps over the training batches, at 64 evenly spaced queries each, from A = 0. The weights with the
    least divergence on the held-out batches are kept, A = 0 among them.
    """
    layer = layers.layers[index]
    layout, correction = layout_of(layer), cast(Any, layer.attention).correction
    rank, ((_, heads),) = layout.rank, layout.parts
    assert rank is not None
    samples: dict[bool, list[_Sample]] = {False: [], True: []}
    for number, valid in enumerate(targets.valid):
        inputs, published = layers.source_scores(index, number)
        queries = sampled_queries(valid.shape[1]).to(inputs.device)
        target = targets.maps(index, number)
        sample = _Sample(inputs.clone(), published.at(queries), queries, target, valid[:, queries])
        samples[is_held_out(number)].append(sample)
    inputs = torch.cat([sample.inputs.flatten(0, 1) for sample in samples[False]])
    scale = inputs.float().square().mean(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def held_out(query: Tensor, key: Tensor) -> float:
        with torch.no_grad():
            sums, numbers = zip(*(one.divergence(query, key, heads, rank) for one in samples[True]), strict=True)
        return float(sum(sums)) / sum(numbers)

    query = torch.zeros_like(correction.query.weight).requires_grad_()
    key = correction.key.weight.detach().clone().requires_grad_()
    best = before = held_out(query, key)
    chosen = query.detach().clone(), key.detach().clone()
    optimizer = torch.optim.Adam([query, key], _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for step in range(1, _STEPS + 1):
        sample = samples[False][step % len(samples[False])]
        with torch.enable_grad():
            total, number = sample.divergence(query / scale, key / scale, heads, rank)
            (total / max(number, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % _CHECK == 0 and (error := held_out(query / scale, key / scale)) < best:
            best, chosen = error, (query.detach() / scale, key.detach() / scale)
    with torch.no_grad():
        correction.query.weight.copy_(chosen[0])
        correction.key.weight.copy_(chosen[1])
    return before, best
