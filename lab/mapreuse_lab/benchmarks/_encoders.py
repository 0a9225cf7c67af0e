"""`bench` on encoders with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.console import ProgressCallback
from mapreuse.measure import Contestant, bench, contestant_memory, cpu_threads, memory_in_fresh_process
from mapreuse_lab.benchmarks._flex import use_flex_attention
from mapreuse_lab.models import ENCODERS

ATTENTIONS = {"flex": use_flex_attention}
"""Attention implementations that the lab adds to those of `measure.bench`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_encoder(
    name: str,
    lengths: Sequence[int] = (),
    *,
    part: str = "layers",
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """An encoder of `ENCODERS`, and a batch for each length, by the length.

    Args:
        name: name of the encoder.
        lengths: encoder frames or tokens; empty for the encoder's default lengths.
        part: "layers", or "whole" for the encoder with its front end.
        batch_size: sequences in a batch.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".

    Raises:
        ValueError: if an argument is invalid, or there is no GPU.
    """
    for option, value, allowed in (
        ("--encoder", name, ENCODERS),
        ("--part", part, ("layers", "whole")),
        ("--dtype", dtype, DTYPES),
        ("--device", device, ("cpu", "cuda")),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    lengths = tuple(lengths) or ENCODERS[name].lengths
    if min(*lengths, batch_size) < 1:
        raise ValueError(f"--lengths and --batch must be at least 1, got {min(*lengths, batch_size)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA GPU; leave the option out to run on the CPU")
    spec = ENCODERS[name]
    if part == "whole" and not spec.front:
        raise ValueError(f"{name} has no front end; leave out --part whole")
    model, batches = (spec.whole if part == "whole" else spec.layers)(lengths, batch_size)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, DTYPES[dtype] if tensor.is_floating_point() else None)

    return model.to(device, DTYPES[dtype]), {
        str(length): {argument: moved(tensor) for argument, tensor in batch.items()}
        for length, batch in batches.items()
    }


def bench_encoder(
    name: str,
    lengths: Sequence[int] = (),
    *,
    part: str = "layers",
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    memory: bool = False,
    progress: ProgressCallback = lambda doing, done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Results of `measure.bench` for an encoder, with FlexAttention among the possible contestants.

    Args:
        name, lengths, part, batch_size, dtype, device: see `open_encoder`.
        threads: CPU threads; None for PyTorch's default.
        memory: measure each contestant's peak memory too, in fresh processes.
        progress: see `measure.bench`.
        options: other arguments of `measure.bench`.
    """
    opening: dict[str, Any] = {"part": part, "batch_size": batch_size, "dtype": dtype, "device": device}
    model, batches = open_encoder(name, lengths, **opening)

    def measured(contestant: Contestant, length: str) -> int:
        request = {"name": name, "length": int(length), "threads": threads, "contestant": asdict(contestant)}
        return memory_in_fresh_process(encoder_memory, request | opening)

    results = bench(
        model,
        batches,
        attentions=ATTENTIONS,
        threads=threads,
        memory=measured if memory else None,
        progress=progress,
        **options,
    )
    spec = ENCODERS[name]
    described = f"{name}, {'layers' if part == 'layers' else 'whole encoder'}, batch {batch_size}"
    return results | {"model": described, "unit": spec.unit, "signal": spec.signal}


def encoder_memory(name: str, length: int, threads: int | None, contestant: dict[str, Any], **opening: Any) -> int:
    """Peak memory of one contestant, in bytes; for `memory_in_fresh_process`."""
    with cpu_threads(threads):
        model, batches = open_encoder(name, (length,), **opening)
        return contestant_memory(model, batches[str(length)], Contestant(**contestant), ATTENTIONS)
