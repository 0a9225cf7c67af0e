from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.maps._scores import Scores


def softmax(scores: Scores) -> Float[Tensor, "batch heads query key"]:
    """The whole map at once, differentiable. The softmax runs in float32 where the scores are in half precision."""
    dense = scores.dense()
    weights = torch.softmax(dense, dim=-1, dtype=softmax_dtype(dense)).to(dense.dtype)
    allowed = scores.allowed(0, dense.shape[-2])
    return weights if allowed is None else weights * allowed.any(-1, keepdim=True)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def drop(weights: Tensor, probability: float) -> Tensor:
    """Weights with dropout drawn anew; the weights themselves where the probability is zero."""
    return functional.dropout(weights, probability) if probability > 0.0 else weights


@dataclass(frozen=True)
class BlockDropout:
    """Dropout of a map that is computed block by block, and drawn the same again for its gradient."""

    probability: float
    seed: int

    @classmethod
    def drawn(cls, probability: float) -> BlockDropout | None:
        """With a seed from PyTorch's own generator; None where nothing is dropped."""
        return cls(probability, int(torch.randint(2**62, ()))) if probability > 0.0 else None

    def factors(self, like: Tensor, block: int) -> Tensor:
        """What the weights of block number `block` are multiplied by: 0, or 1 / (1 − probability)."""
        generator = torch.Generator(like.device).manual_seed(self.seed + block)
        kept = torch.empty_like(like).bernoulli_(1.0 - self.probability, generator=generator)
        return kept.div_(1.0 - self.probability) if self.probability < 1.0 else kept
