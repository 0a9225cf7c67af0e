"""Calibration batches from texts, recordings and images."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from mapreuse.console import check_number, refused_in_one_line
from mapreuse.data._audio import check_sampling_rate
from mapreuse.data._files import MAX_SECONDS, Sample, read_audio, read_image, samples_of
from mapreuse.data._models import OpenedModel

MIN_SAMPLES = 4
"""Minimum number of samples that represent a model's inputs."""

Prepared = tuple[list[int], int, Callable[[list[int]], Mapping[str, Tensor]]]
"""Lengths of samples, maximum total length of a batch after padding, and a function that makes a batch of some."""

_MAX_TOKENS = 256
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_EXTRACTORS = ("preprocessor_config.json", "processor_config.json")
_ENCODER_STATES = "encoder_hidden_states"
_CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encoder_decoder_attention|EncDecAttention")
"""Names of modules that attend to the hidden states of an encoder."""


def open_batches(
    opened: OpenedModel,
    path: str | Path,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    min_batches: int = 1,
    min_samples: int = MIN_SAMPLES,
    window: int | None = None,
) -> list[dict[str, Tensor]]:
    """Read calibration data and prepare batches for a model: keyword arguments of its forward, on the CPU.

    Texts and recordings are sorted by length, and each batch is padded to its longest sample. The model determines
    the kind of data:

    - tokens: a text file with one sentence per line. A sentence is cut after 256 tokens, or the model's maximum.
      With `window`, the file is one text instead, and each sample is a window of so many tokens, without overlap.
      Give a language model windows that are as long as its contexts will be.
    - audio: a folder of wav or flac files, searched recursively. Recordings are averaged over channels, resampled,
      and cut after 20 s. A batch contains at most 20 s of padded audio. If the feature extractor pads to a fixed
      length, as Whisper's does to 30 s, a batch is one recording.
    - images: a folder of png or jpg files, searched recursively.
    - each of them: a directory that `datasets.save_to_disk` wrote, with a column "text", "audio" or "image", or with
      only one column of that type. If there are several splits, "train" or the first is read.

    Args:
        opened: from `open_model`.
        path: the data.
        batch_size: maximum number of samples in a batch.
        max_batches: read at most `max_batches · batch_size` samples.
        min_batches: reduce the batch size to get at least this many batches.
        min_samples: number of samples that the caller needs. If `min_batches` is at least as large, there will also
            be this many batches.
        window: number of tokens of each sample of a text; None for one sample per line.

    Raises:
        ValueError: if the data is missing, unreadable, of the wrong kind, or has fewer than `min_samples` samples; if
            the model's directory has no tokenizer, feature extractor or image processor; if the stack of layers
            cannot run on such data alone; or if `window` is more than the model's maximum. The message is one line.
        ModuleNotFoundError: if reading the data needs an optional package: soundfile, pillow or datasets.
    """
    given = {"batch_size": batch_size, "max_batches": 1 if max_batches is None else max_batches}
    for name, number in (given | {"min_batches": min_batches, "min_samples": min_samples}).items():
        check_number(name, number, 1, whole=True)
    max_samples = None if max_batches is None else max_batches * batch_size
    if max_samples is not None and max_samples < min_samples:
        raise ValueError(
            f"max_batches={max_batches} reads {max_samples} samples, but at least {min_samples} are needed"
        )
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    input_name = _input_name(opened)
    if input_name not in _KINDS:
        raise ValueError(
            f"{type(opened.part).__name__} takes {input_name}; calibration data can be text, audio or images"
        )
    kind, noun, prepare = _KINDS[input_name]
    found = samples_of(path, kind)
    if window is not None:
        if kind != "text":
            raise ValueError(f"a window is a number of tokens, but {type(opened.part).__name__} takes {noun}")
        noun, prepare = f"windows of {window} tokens", _prepare_windows
        found = _windows(opened, "\n".join(found), window)
    samples = list(itertools.islice(found, max_samples))
    check_enough(samples, path, noun, min_samples)
    size = min(batch_size, max(1, len(samples) // min_batches))
    lengths, budget, make_batch = prepare(opened, samples)
    batches = [make_batch(indices) for indices in batches_by_length(lengths, size, budget)]
    taken = _parameters(opened.part)
    return [{name: tensor for name, tensor in batch.items() if name in taken} for batch in batches]


def check_enough(samples: Sequence[object], source: str | Path, kind: str, minimum: int = MIN_SAMPLES) -> None:
    """Raise `ValueError` if `source` has fewer than `minimum` samples of this kind."""
    if len(samples) < minimum:
        raise ValueError(f"{source}: found {len(samples)} {kind}, but at least {minimum} are needed")


def batches_by_length(lengths: Sequence[int], batch_size: int, budget: int) -> list[list[int]]:
    """Sort samples by length and divide their indices into batches.

    Args:
        lengths: length of each sample.
        batch_size: maximum number of samples in a batch.
        budget: maximum total length of a batch after padding. A longer sample is a batch of its own.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        size = len(batches[-1]) + 1 if batches else 1
        if 1 < size <= batch_size and size * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _input_name(opened: OpenedModel) -> str:
    """The main input of the stack of layers. Raises `ValueError` if the stack cannot run on it alone."""
    part = opened.part
    taken, name = _parameters(part), type(part).__name__
    if _ENCODER_STATES in taken and any(_CROSS_ATTENTION.search(path) for path, _ in part.named_modules()):
        raise ValueError(
            f"{name} attends to the hidden states of an encoder, which calibration data does not contain; choose the "
            f"encoder (on the command line: --stack), or pass batches with {_ENCODER_STATES} in Python"
        )
    input_name = getattr(part, "main_input_name", opened.model.main_input_name)
    if input_name not in taken:
        raise ValueError(f"{name} takes no {input_name}; choose the module around it (on the command line: --stack)")
    return input_name


def _prepare_texts(opened: OpenedModel, texts: list[str]) -> Prepared:
    tokenizer = _companion(opened, AutoTokenizer, _TOKENIZERS, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{opened.directory}: the tokenizer has no padding token")
    options: dict[str, Any] = {"truncation": True, "max_length": min(_MAX_TOKENS, _max_tokens(opened, tokenizer))}
    encoded = tokenizer(texts, **options)["input_ids"]
    _check_tokens(opened, encoded)
    options |= {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
    lengths = [len(tokens) for tokens in encoded]
    return lengths, sys.maxsize, lambda indices: tokenizer([texts[index] for index in indices], **options)


def _windows(opened: OpenedModel, text: str, window: int) -> Iterator[list[int]]:
    """The tokens of a text, cut into windows; what is left at the end is dropped."""
    check_number("window", window, 2, whole=True)
    tokenizer = _companion(opened, AutoTokenizer, _TOKENIZERS, "tokenizer")
    if window > (maximum := _max_tokens(opened, tokenizer)):
        raise ValueError(f"window={window} is more than the {maximum} tokens that the model takes")
    tokens = tokenizer(text, verbose=False)["input_ids"]
    return (tokens[start : start + window] for start in range(0, len(tokens) - window + 1, window))


def _prepare_windows(opened: OpenedModel, windows: list[list[int]]) -> Prepared:
    _check_tokens(opened, windows)

    def batch(indices: list[int]) -> Mapping[str, Tensor]:
        tokens = torch.tensor([windows[index] for index in indices])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return [len(tokens) for tokens in windows], sys.maxsize, batch


def _max_tokens(opened: OpenedModel, tokenizer: Any) -> int:
    return min(tokenizer.model_max_length, _max_positions(_reader(opened)))


def _reader(opened: OpenedModel) -> PreTrainedModel:
    return opened.part if isinstance(opened.part, PreTrainedModel) else opened.model


def _check_tokens(opened: OpenedModel, encoded: list[list[int]]) -> None:
    largest, reader = max(max(tokens, default=0) for tokens in encoded), _reader(opened)
    num_embeddings = reader.get_input_embeddings().weight.shape[0]
    if largest >= num_embeddings:
        raise ValueError(
            f"{opened.directory}: the tokenizer returns token {largest}, but {type(reader).__name__} has only "
            f"{num_embeddings}; they belong to different models"
        )


def _prepare_audio(opened: OpenedModel, samples: list[Sample]) -> Prepared:
    extractor = _companion(opened, AutoFeatureExtractor, _EXTRACTORS, "feature extractor")
    rate = check_sampling_rate(extractor.sampling_rate, f"{opened.directory}: the feature extractor")
    audio = [read_audio(sample, rate) for sample in samples]
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    fixed_length = padding is not None and padding.default == "max_length"  # the model may require it
    options = {"sampling_rate": rate, "padding": "max_length" if fixed_length else True}
    options |= {"return_attention_mask": True, "return_tensors": "pt"}
    lengths, budget = [len(waveform) for waveform in audio], 0 if fixed_length else round(MAX_SECONDS * rate)
    return lengths, budget, lambda indices: extractor([audio[index] for index in indices], **options)


def _prepare_images(opened: OpenedModel, samples: list[Sample]) -> Prepared:
    processor = _companion(opened, AutoImageProcessor, _EXTRACTORS, "image processor")

    def batch(indices: list[int]) -> Mapping[str, Tensor]:
        images = [read_image(samples[index]) for index in indices]  # one batch at a time, for memory
        with refused_in_one_line(f"{type(processor).__name__} cannot make a batch: "):
            made = processor(images, return_tensors="pt")
        if made["pixel_values"].dim() > 4:
            raise ValueError(f"{opened.directory}: the image processor makes videos or tiles, not single images")
        return made

    return [1] * len(samples), sys.maxsize, batch


_KINDS: dict[str, tuple[str, str, Callable[[OpenedModel, list], Prepared]]] = {
    "input_ids": ("text", "sentences", _prepare_texts),
    "input_values": ("audio", "recordings", _prepare_audio),
    "input_features": ("audio", "recordings", _prepare_audio),
    "pixel_values": ("image", "images", _prepare_images),
}
"""For each input of models: the kind of its samples, their name in messages, and the function that prepares them."""


def _companion(opened: OpenedModel, cls: Any, patterns: Sequence[str], name: str) -> Any:
    """Open the tokenizer, feature extractor or image processor in a model's directory."""
    if not any(any(opened.directory.glob(pattern)) for pattern in patterns):
        raise ValueError(
            f"{opened.directory}: the directory contains no {name}; copy it there from the original model"
        )
    with refused_in_one_line(f"{opened.directory}: the {name} cannot be opened: "):
        return cls.from_pretrained(opened.directory, local_files_only=True)


def _max_positions(model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return sys.maxsize
    for name, module in model.named_modules():
        is_embedding = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_embedding and module.padding_idx is not None:
            return positions - module.padding_idx - 1  # RoBERTa counts positions from after the padding index
    return positions


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters
