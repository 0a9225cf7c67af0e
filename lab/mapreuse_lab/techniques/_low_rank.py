"""Low-rank projections: queries, keys, values and outputs of fewer dimensions, fitted to calibration data.

    y = W x + b  ≈  U (Uᵀ W x + Uᵀ (b − m)) + m

with m the mean of y on calibration data and U (outputs, r) its r principal directions, so that ‖y − m‖ loses least.

Cost: 2·T·r·(inputs + outputs) FLOPs for a projection instead of 2·T·inputs·outputs: less if r is below half of a
square projection. Maps, scores and values cost the same.

LiteASR also compresses feed-forward layers, and merges the factors of queries and keys into products of lower rank.
Here the four projections of attention alone are replaced.

Paper: https://arxiv.org/abs/2502.20583
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from mapreuse_lab.techniques._pretrained import PretrainedStack, Role
from mapreuse_lab.techniques._technique import Technique


class LowRank(Technique, notation="low-rank-{percent}", label="projections of {percent} % rank", from_scratch=False):
    """Projections of attention have `percent` % of their full rank."""

    percent: int
    source = "Kamahori et al., LiteASR, EMNLP 2025 (arXiv 2502.20583)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percent >= 100:
            raise ValueError(f"{self.notation}: percent must be below 100, got {self.percent}")

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        moments: dict[tuple[int, Role], Tensor] = {}
        for batch in batches:
            for index, rows in enumerate(stack.recorded(batch)):
                for role in get_args(Role):
                    outputs = rows["attention" if role == "output" else role]
                    given = nn.functional.pad(outputs.double(), (0, 1), value=1.0)
                    moments[index, role] = given.mT @ given + moments.get((index, role), 0)
        for (index, role), moment in moments.items():
            layer = stack.layers[index]
            projection = layer.projection(role)
            rank = max(1, min(projection.weight.shape) * self.percent // 100)
            layer.replace(role, _factored(projection, moment, rank))


def _factored(projection: nn.Linear, moment: Tensor, rank: int) -> nn.Sequential:
    """Two projections whose product keeps the outputs' principal directions.

    Args:
        projection: the projection.
        moment: sums of products of the outputs and 1, (outputs + 1, outputs + 1).
        rank: number of directions.
    """
    number = moment[-1, -1]
    mean = moment[:-1, -1] / number
    covariance = moment[:-1, :-1] / number - torch.outer(mean, mean)
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]
    weight = projection.weight.detach()
    bias = torch.zeros_like(mean) if projection.bias is None else projection.bias.detach().double()
    down = nn.Linear(projection.in_features, rank, device=weight.device, dtype=weight.dtype)
    up = nn.Linear(rank, projection.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        down.weight.copy_(directions.mT @ weight.double())
        down.bias.copy_(directions.mT @ (bias - mean))
        up.weight.copy_(directions)
        up.bias.copy_(mean)
    return nn.Sequential(down, up)
