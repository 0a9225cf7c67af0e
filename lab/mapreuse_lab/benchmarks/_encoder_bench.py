"""`bench` and its inputs for encoders with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mapreuse.console import check_device
from mapreuse.measure import Contestant, bench, contestant_memory, memory_in_fresh_process
from mapreuse_lab import models
from mapreuse_lab.benchmarks._flex import use_flex_attention

ATTENTIONS = {"flex": use_flex_attention}
"""Attention implementations that the lab adds to those of `measure.bench`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CALIBRATION = (128, 180, 250, 350, 500)
"""Lengths of the inputs that int8 is calibrated on."""

_FRAMES = "encoder frames of 40 ms"
_SPEECH_LIKE = (
    "log-mel-like features: noise smoothed over time and frequency, with an envelope of 4 syllables per second, "
    "normalised bin by bin (seed 0)"
)


@dataclass(frozen=True)
class Encoder:
    """How to build an encoder and its inputs.

    Attributes:
        unit: unit of its lengths.
        signal: description of its inputs.
        lengths: default lengths.
        build: makes the encoder for inputs up to a length; its weights are always the same.
        inputs: makes inputs of a length and a batch size.
        argument: name of the encoder's input.
        front: path of the module that makes the hidden states of the first layer; empty if it is not in the encoder.
        states: name of the argument that takes hidden states once `front` is replaced.
    """

    unit: str
    signal: str
    lengths: tuple[int, ...]
    build: Callable[[int], nn.Module]
    inputs: Callable[[int, int], Tensor]
    argument: str
    front: str
    states: str


ENCODERS = {
    "conformer-m": Encoder(
        unit=_FRAMES,
        signal=_SPEECH_LIKE,
        lengths=(1000, 2000, 3000),
        build=lambda max_length: models.conformer_m(),
        inputs=models.speech_like_features,
        argument="input_features",
        front="subsampling",
        states="input_features",
    ),
    "plain-conformer-m": Encoder(
        unit=_FRAMES,
        signal=_SPEECH_LIKE,
        lengths=(1000, 2000, 3000, 4000),
        build=lambda max_length: models.plain_conformer_m(),
        inputs=models.speech_like_states,
        argument="hidden_states",
        front="",
        states="hidden_states",
    ),
    "bert-base": Encoder(
        unit="tokens",
        signal="token ids with Zipf-distributed frequencies (seed 0)",
        lengths=(128, 256, 512),
        build=models.bert_base,
        inputs=models.text_like_tokens,
        argument="input_ids",
        front="embeddings",
        states="inputs_embeds",
    ),
    "minilm": Encoder(
        unit="tokens",
        signal="token ids with Zipf-distributed frequencies (seed 0)",
        lengths=(128, 256, 512),
        build=models.minilm,
        inputs=models.text_like_tokens,
        argument="input_ids",
        front="embeddings",
        states="inputs_embeds",
    ),
}
"""The encoders of `mapreuse-lab bench`, by name."""


class _PassThrough(nn.Module):
    """Replaces a front end whose output is the input of the encoder."""

    def forward(self, hidden_states: Tensor | None = None, *args: object, **kwargs: Any) -> Tensor:
        return kwargs["inputs_embeds"] if hidden_states is None else hidden_states


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
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    lengths = tuple(lengths) or ENCODERS[name].lengths
    if min(*lengths, batch_size) < 1:
        raise ValueError(f"--lengths and --batch must be at least 1, got {min(*lengths, batch_size)}")
    check_device(device)
    spec = ENCODERS[name]
    if part == "whole" and not spec.front:
        raise ValueError(f"{name} has no front end; leave out --part whole")
    model = spec.build(max(lengths))
    inputs = {length: spec.inputs(length, batch_size) for length in lengths}
    if part == "layers" and spec.front:
        front = model.get_submodule(spec.front)
        with torch.no_grad():
            inputs = {length: front(tensor) for length, tensor in inputs.items()}
        model.set_submodule(spec.front, _PassThrough())
    argument = spec.argument if part == "whole" else spec.states

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, DTYPES[dtype] if tensor.is_floating_point() else None)

    return model.to(device, DTYPES[dtype]), {str(n): {argument: moved(tensor)} for n, tensor in inputs.items()}


def bench_encoder(
    name: str,
    lengths: Sequence[int] = (),
    *,
    threads: int | None = None,
    memory: bool = False,
    part: str = "layers",
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    exports: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Results of `measure.bench` for an encoder, with FlexAttention among the possible contestants.

    int8 is calibrated on inputs of 128 to 500 positions.

    Args:
        name, lengths, part, batch_size, dtype, device: see `open_encoder`.
        threads: CPU threads; None for PyTorch's default.
        memory: measure each contestant's peak memory too, in fresh processes.
        exports: directory that keeps exported models; needed with `memory`.
        options: other arguments of `measure.bench`.
    """
    opening: dict[str, Any] = {"part": part, "batch_size": batch_size, "dtype": dtype, "device": device}
    model, batches = open_encoder(name, lengths, **opening)

    def measured(contestant: Contestant, length: str) -> int:
        request = {"name": name, "length": int(length), "threads": threads, "contestant": asdict(contestant)}
        request |= {"exports": None if exports is None else str(exports)}
        return memory_in_fresh_process(encoder_memory, request | opening)

    samples = list(open_encoder(name, _CALIBRATION, **opening | {"batch_size": 2})[1].values())
    options |= {"memory": measured if memory else None, "exports": exports, "calibration": samples}
    results = bench(model, batches, attentions=ATTENTIONS, threads=threads, **options)
    spec = ENCODERS[name]
    described = f"{name}, {'layers' if part == 'layers' else 'whole encoder'}, batch {batch_size}"
    return results | {"model": described, "unit": spec.unit, "signal": spec.signal}


def encoder_memory(
    name: str,
    length: int,
    threads: int | None,
    contestant: dict[str, Any],
    exports: str | None = None,
    **opening: Any,
) -> int:
    """Peak memory of one contestant, in bytes; for `memory_in_fresh_process`."""
    model, batches = open_encoder(name, (length,), **opening)
    described = Contestant(**contestant)
    options: dict[str, Any] = {"attentions": ATTENTIONS, "threads": threads, "exports": exports}
    return contestant_memory(model, batches, str(length), described, **options)
