"""Softmax of whole maps and of blocks, and dropout of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.maps import _c_kernel
from mapreuse.maps._scores import Scores


def softmax(scores: Scores) -> Float[Tensor, "batch heads query key"]:
    """Compute the whole map, with gradients. The softmax of half-precision scores runs in float32."""
    dense = scores.dense()
    if scores.sinks is not None:
        sinks = scores.sinks[:, None, None].expand(*dense.shape[:-1], 1)
        dense = torch.cat([dense, sinks], -1)
    weights = torch.softmax(dense, dim=-1, dtype=softmax_dtype(dense)).to(dense.dtype)
    if scores.sinks is not None:
        weights = weights[..., :-1]
    allowed = scores.allowed()
    return weights if allowed is None else weights * allowed.any(-1, keepdim=True)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    """Type in which the softmax of this tensor runs."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def softmax_of_sum(
    scores: Float[Tensor, "heads rows keys"],
    addend: Float[Tensor, "heads rows keys"] | None,
    out: Float[Tensor, "heads rows keys"],
) -> None:
    """Write `softmax(scores + addend)` over the keys to `out`; the scores are overwritten.

    The C version keeps a row in the first-level cache for all steps. Its exponential is a polynomial with a relative
    error of at most 4e-6 per weight.

    Args:
        scores: scores with stride 1 over the keys. The softmax of half-precision scores runs in float32.
        addend: like `scores`; its rows may overlap in memory.
        out: like `scores`, and may be `scores` itself.
    """
    if scores.stride(2) == out.stride(2) == 1 and _c_kernel.serves(scores, out):
        _c_kernel.softmax_of_sum(scores, addend, out)
        return
    if addend is not None:
        scores += addend
    if softmax_dtype(scores) != scores.dtype:
        out.copy_(torch.softmax(scores, dim=-1, dtype=softmax_dtype(scores)))
        return
    for head in range(len(scores)):  # one head at a time: `out` may be part of a larger map
        torch.softmax(scores[head], dim=-1, out=out[head])


def drop(weights: Tensor, probability: float) -> Tensor:
    """Apply dropout, or return the weights themselves if the probability is zero."""
    return functional.dropout(weights, probability) if probability > 0.0 else weights


@dataclass(frozen=True)
class BlockDropout:
    """Dropout for a map that is computed in blocks, repeatable for the backward pass."""

    probability: float
    seed: int

    def factors(
        self, like: Float[Tensor, "heads rows keys"], numbers: Sequence[int]
    ) -> Float[Tensor, "heads rows keys"]:
        """Factors of the weights of a block: 0 if dropped, else 1 / (1 − probability).

        They depend on the number that each head of the block has, not on which heads a block consists of.
        """
        generator = torch.Generator(like.device)
        kept = torch.empty_like(like)
        for head, number in zip(kept, numbers, strict=True):
            head.bernoulli_(1.0 - self.probability, generator=generator.manual_seed(self.seed + number))
        return kept.div_(1.0 - self.probability) if self.probability < 1.0 else kept
