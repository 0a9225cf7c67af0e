"""Calls of a benchmark's contestants, and what is watched while they run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
import torch._dynamo
from torch import Tensor, nn

from mapreuse.maps import StorageChoice
from mapreuse.measure._contestants import Batch
from mapreuse.models import not_padding, recorded_states


def call_of(model: nn.Module, compiled: bool) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        output = model(**batch)
        return output if isinstance(output, Tensor) else output[0]

    if not compiled:
        return call
    # The compiler caches by code object. With its own, no contestant suffers from the graph breaks of another.
    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, dynamic=False)


def training_step(model: nn.Module, call: Callable[[Batch], Tensor], batch: Batch, keep: bool = False) -> Tensor:
    """Forward and backward of the loss `mean(output · direction)`, for a fixed random direction.

    The norm of the output would be a useless loss: a final layer norm keeps it constant.
    """
    with torch.inference_mode(False), torch.enable_grad():
        output = call(batch)
        (output * _direction(output.shape, output.dtype, output.device)).mean().backward()
    # Norms are in every contestant, in the same order; projections may be permuted, fused or absent.
    gradients = [
        weights.grad.flatten()
        for name, weights in model.named_parameters()
        if keep and weights.grad is not None and "norm" in name.lower()
    ]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients) if gradients else output.detach()


@functools.cache
def _direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(device, dtype)


def valid_positions(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad(), recorded_states(model) as (states, masks):
        model(**batch)
    return not_padding(masks[0], states[-1])


@contextlib.contextmanager
def storage_choices() -> Iterator[list[StorageChoice]]:
    """The choices of storage "auto", from the log."""
    choices: list[StorageChoice] = []

    def collect(record: logging.LogRecord) -> bool:
        choices.extend(argument for argument in record.args or () if isinstance(argument, StorageChoice))
        return True

    logger = logging.getLogger("mapreuse")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.INFO)
    try:
        yield choices
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def num_graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
