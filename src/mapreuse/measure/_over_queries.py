"""Means over the queries of all attention maps of a model, one batch at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mapreuse.console import ProgressCallback
from mapreuse.models import MapRecorder, Recording, check_batch

Summed = Callable[[Float[Tensor, "layers heads query key"]], Float[Tensor, "*measured"]]
"""A measure of the maps of one sequence without its padding, summed over its queries, in float64."""


def mean_over_queries(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *measures: Summed,
    progress: ProgressCallback = lambda doing, done, total: None,
) -> tuple[list[Float[Tensor, "*measured"]], int]:
    """Mean of each measure over the queries of `batches` without padding, in float32; and the number of queries.

    Raises:
        ValueError: if there are no batches, or a map is not finite.
    """
    recorder = MapRecorder(model, under_plan=True)
    totals: list[Tensor | float] = [0.0] * len(measures)
    num_queries, num_batches = 0, operator.length_hint(batches)
    for done, batch in enumerate(batches, start=1):
        check_batch(batch)
        for _, rows, maps in maps_by_sequence(recorder(batch)):
            totals = [total + measure(maps).cpu() for total, measure in zip(totals, measures, strict=True)]
            num_queries += int(rows.sum())
        progress(f"batch {done}", done, max(done, num_batches))
    if num_queries == 0:
        raise ValueError(
            "no calibration batches, or only padding: pass at least one batch, such as [{'input_ids': …}]"
        )
    return [(torch.as_tensor(total) / num_queries).float() for total in totals], num_queries


def maps_by_sequence(
    recording: Recording,
) -> Iterator[tuple[int, Bool[Tensor, " positions"], Float[Tensor, "layers heads query key"]]]:
    """For each sequence of a batch: its index, a mask of its valid positions, and its maps without padding.

    Maps in half precision are converted to float32. Sequences with padding only are skipped.

    Raises:
        ValueError: if a map is not finite.
    """
    for item, rows in enumerate(recording.valid):
        if not bool(rows.any()):
            continue
        maps = torch.stack([weights[item][:, rows][:, :, rows] for weights in recording.maps])
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if not bool(torch.isfinite(maps).all()):
            raise ValueError("an attention map is not finite: check the model's weights and the calibration batches")
        yield item, rows, maps
