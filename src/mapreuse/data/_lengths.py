"""Batches of chosen lengths, for benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mapreuse.console import check_number


def batches_by_quantile(batches: Sequence[dict[str, Tensor]], number: int) -> list[dict[str, Tensor]]:
    """Some of the batches, which are sorted by length: the medians of `number` equal parts."""
    check_number("number", number, 1, whole=True)
    number = min(number, len(batches))
    return [batches[int((part + 0.5) * len(batches) / number)] for part in range(number)]


def with_batch_size(batch: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """The first items of a batch, or all of them repeated."""
    check_number("batch_size", batch_size, 1, whole=True)
    return {name: tensor[torch.arange(batch_size) % len(tensor)] for name, tensor in batch.items()}


def batches_of_lengths(
    batches: Sequence[Mapping[str, Tensor]], lengths: Sequence[int], batch_size: int
) -> list[dict[str, Tensor]]:
    """One batch without padding for each length, cut or repeated from the longest batch.

    Lengths are those of the inputs: tokens, samples of audio, or frames of features.

    Raises:
        ValueError: if a length is not a positive whole number, or inputs have no length, as images.
    """
    given = with_batch_size(batches[-1], batch_size)
    main = given.get("attention_mask", next(iter(given.values())))
    if main.dim() not in (2, 3):
        raise ValueError("--lengths: images have no length; leave the option out")
    found = []
    for length in lengths:
        check_number("a length", length, 1, whole=True)
        batch = {}
        for name, tensor in given.items():
            dim = next((dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == main.shape[1]), None)
            if dim is not None:
                tensor = tensor.index_select(dim, torch.arange(length) % tensor.shape[dim])
            batch[name] = torch.ones_like(tensor) if name == "attention_mask" else tensor.contiguous()
        found.append(batch)
    return found
