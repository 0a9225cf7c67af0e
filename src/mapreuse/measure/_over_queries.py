"""Means over the queries of all maps of a model: every batch is recorded once, whatever is measured of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapreuse.measure._config import Progress
from mapreuse.models import MapRecorder

Summed = Callable[[Float[Tensor, "layers heads query key"]], Float[Tensor, "*measured"]]
"""What is measured of the maps of one sequence without its padding, summed over its queries, in float64."""


def mean_over_queries(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *measures: Summed,
    progress: Progress = lambda doing, done, total: None,
) -> tuple[list[Float[Tensor, "*measured"]], int]:
    """The mean of each measure over the queries of `batches`, padding left out, in float32; and how many queries.

    Raises `ValueError` where there are no batches, or a map is not finite.
    """
    recorder = MapRecorder(model)
    totals: list[Tensor | float] = [0.0] * len(measures)
    num_queries, num_batches = 0, operator.length_hint(batches)
    for done, batch in enumerate(batches, start=1):
        recording = recorder(batch)
        for item, rows in enumerate(recording[1]):
            if not bool(rows.any()):
                continue
            maps = torch.stack([weights[item][:, rows][:, :, rows] for weights in recording[0]])
            if not bool(torch.isfinite(maps).all()):
                raise ValueError(
                    "an attention map is not finite: check the model's weights and the calibration batches"
                )
            totals = [total + measure(maps).cpu() for total, measure in zip(totals, measures, strict=True)]
            num_queries += int(rows.sum())
        progress(f"batch {done}", done, max(done, num_batches))
    if num_queries == 0:
        raise ValueError("no calibration batches: give at least one, such as [{'input_ids': …}]")
    return [(torch.as_tensor(total) / num_queries).float() for total in totals], num_queries
