"""Models and calibration data from disk, as the command line names them."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from mapreuse import models
from mapreuse.conversion._validation import check_precision
from mapreuse.data._files import (
    LONGEST,
    UNREADABLE,
    images_of,
    one_line,
    read_audio,
    read_image,
    sounds_of,
    texts_of,
)

FEWEST = 4
"""Fewer sequences than these say too little about a model."""

_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_EXTRACTORS = ("preprocessor_config.json", "processor_config.json")

_OPTIONAL = re.compile(r"(^|\.)pooler\.|(^|\.)masked_spec_embed$|(^|\.)mask_token$")
"""Weights that a model of hidden states does without: directories often lack them."""

_ENCODER_STATES = "encoder_hidden_states"
_CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encoder_decoder_attention|EncDecAttention")
"""Names of modules that attend to the states of an encoder."""

_MOST_TOKENS = 256


@dataclass(frozen=True)
class OpenedModel:
    """A model, and the directory where its tokenizer or the like lies beside its weights."""

    model: PreTrainedModel
    directory: Path
    stack: str = ""
    """Path of the module that holds the stack of layers in question; empty where the model has but one."""

    @property
    def part(self) -> nn.Module:
        """The module that holds the stack of layers in question."""
        return self.model.get_submodule(self.stack)

    def with_part(self, part: nn.Module) -> PreTrainedModel:
        """The model with this module in place of `part`."""
        if not self.stack:
            return part
        self.model.set_submodule(self.stack, part)
        self.model.tie_weights()
        return self.model


def open_model(path: str | Path, stack: str = "", *, float32: bool = False) -> OpenedModel:
    """Opens a model's directory: one that `save_pretrained` wrote, `mapreuse.save`, or sentence-transformers.

    Weights are read from safetensors only, in the type they are stored in; the class is the one that the directory
    names. Of a sentence-transformers directory (`modules.json`) it is the transformer, its first module.

    Args:
        path: of the directory.
        stack: path of the module that holds the stack of layers in question, such as `model.encoder`, where the model
            has several.
        float32: weights are in float32, in whatever type they are stored.

    Raises:
        ValueError: in one line, where there is no such directory, it holds no model, weights are missing or do not
            fit, they are in half precision, or there is no stack of layers there.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{path}: no such directory")
    try:
        directory = models.transformer_directory(directory)
        if not (directory / _CONFIG).is_file():
            raise ValueError(f"it holds no model: {_CONFIG} is missing")
        model = _model(directory)
        if float32:
            model.float()
        check_precision(model)
        opened = OpenedModel(model.eval(), directory, stack)
        models.find_stack(opened.part)
    except UNREADABLE as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return opened


@dataclass(frozen=True)
class _Wanted:
    """How much is read, into what batches."""

    batch_size: int
    most: int | None
    fewest_batches: int
    fewest: int

    def size(self, found: Sequence[object], source: Path, what: str) -> int:
        """How many samples make a batch. Raises `ValueError` where too few were found."""
        check_enough(found, source, what, self.fewest)
        return min(self.batch_size, max(1, len(found) // self.fewest_batches))


def open_batches(
    opened: OpenedModel,
    path: str | Path,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    fewest_batches: int = 1,
    fewest: int = FEWEST,
) -> list[dict[str, Tensor]]:
    """Calibration batches for a model, on the CPU: keyword dictionaries for its forward.

    Texts and recordings are sorted by length, and padded per batch. What `path` may be:

    - for a model that reads tokens: a text file, one sentence per line (empty lines are passed over). At most 256
      tokens of a sentence are read, or as many as the model takes.
    - for a model that reads audio: a folder of wav or flac files, searched in depth, of any sampling rate; channels
      are averaged. The first 20 s of a recording are read; a batch holds at most 20 s of padded audio, or one
      recording where the feature extractor pads to a length of its own (Whisper's, to 30 s; all of it is attended).
    - for a model that reads images: a folder of png or jpg files, searched in depth.
    - for each: a directory that `datasets.save_to_disk` wrote, with a column `text`, `audio` or `image` (or only one
      that holds such); of several splits, `train` or the first.

    Args:
        opened: from `open_model`.
        path: of the texts, the audio or the images.
        batch_size: most samples in a batch.
        max_batches: read no more than the first `max_batches · batch_size` samples.
        fewest_batches: make batches smaller where there would be fewer than these.
        fewest: samples that are needed by what comes after. There are as many batches, too, where `fewest_batches` is
            no less.

    Raises:
        ValueError: in one line, where the path is missing, empty, too short (fewer than `fewest` samples), or not of
            the kind that the model reads, where the directory has no tokenizer, feature extractor or image processor,
            a package is missing, or the stack cannot run by itself: it attends to an encoder's states, or takes no
            input of the model's.
    """
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise ValueError(f"batch_size and max_batches must be at least 1, got {batch_size} and {max_batches}")
    most = None if max_batches is None else max_batches * batch_size
    if most is not None and most < fewest:
        raise ValueError(f"max_batches of {max_batches} reads {most} samples, at least {fewest} are wanted")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    reads = _input_name(opened)
    makers = {
        "input_ids": _token_batches,
        "input_values": _audio_batches,
        "input_features": _audio_batches,
        "pixel_values": _image_batches,
    }
    if reads not in makers:
        raise ValueError(f"{type(opened.part).__name__} reads {reads}; calibration takes text, audio or images")
    batches = makers[reads](opened, path, _Wanted(batch_size, most, fewest_batches, fewest))
    taken = _taken(opened.part)
    return [{name: tensor for name, tensor in batch.items() if taken(name)} for batch in batches]


def check_enough(found: Sequence[object], source: str | Path, what: str, fewest: int = FEWEST) -> None:
    """Raises `ValueError` where fewer samples were found than are needed."""
    if len(found) < fewest:
        raise ValueError(f"{source}: {len(found)} {what}, at least {fewest} are wanted")


def batches_by_length(lengths: Sequence[int], batch_size: int, budget: int) -> list[list[int]]:
    """Indices sorted by length, in batches of at most `batch_size`, padded to at most `budget` (one item may exceed
    it)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        size = len(batches[-1]) + 1 if batches else 1
        if 1 < size <= batch_size and size * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _model(directory: Path) -> PreTrainedModel:
    config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if config.get("model_type") == "mapreuse":
        return models.load(directory)
    (name, *_) = config.get("architectures") or [""]
    named = getattr(transformers, name, None)
    cls: Any = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    model, found = cls.from_pretrained(directory, **options)
    missing = sorted(name for name in found["missing_keys"] if not _OPTIONAL.search(name))
    if missing:
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others of {type(model).__name__}")
    return model


def _input_name(opened: OpenedModel) -> str:
    """The input that the part in question reads. Raises `ValueError` where it cannot run on that alone."""
    part = opened.part
    taken, name = _taken(part), type(part).__name__
    if taken(_ENCODER_STATES) and any(_CROSS_ATTENTION.search(path) for path, _ in part.named_modules()):
        raise ValueError(
            f"{name} attends to an encoder's states, which calibration data do not hold; choose the encoder (to the "
            f"command: --stack), or give batches with {_ENCODER_STATES} in Python"
        )
    reads = getattr(part, "main_input_name", opened.model.main_input_name)
    if not taken(reads):
        raise ValueError(f"{name} takes no {reads}; choose the module around it (to the command: --stack)")
    return reads


def _token_batches(opened: OpenedModel, path: Path, wanted: _Wanted) -> list[Mapping[str, Tensor]]:
    tokenizer = _beside(opened, AutoTokenizer, _TOKENIZERS, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{opened.directory}: its tokenizer has no token to pad with")
    texts = list(itertools.islice(texts_of(path), wanted.most))
    batch_size = wanted.size(texts, path, "sentences")
    reader = opened.part if isinstance(opened.part, PreTrainedModel) else opened.model
    most_tokens = min(_MOST_TOKENS, tokenizer.model_max_length, _positions(reader))
    encoded = tokenizer(texts, truncation=True, max_length=most_tokens)["input_ids"]
    unknown = max(max(tokens, default=0) for tokens in encoded)
    known = reader.get_input_embeddings().weight.shape[0]
    if unknown >= known:
        raise ValueError(
            f"{opened.directory}: its tokenizer makes token {unknown}, but {type(reader).__name__} has {known}; they "
            "are not of one model"
        )
    return [
        tokenizer(
            [texts[index] for index in indices],
            padding=True,
            truncation=True,
            max_length=most_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for indices in batches_by_length([len(tokens) for tokens in encoded], batch_size, batch_size * most_tokens)
    ]


def _audio_batches(opened: OpenedModel, path: Path, wanted: _Wanted) -> list[Mapping[str, Tensor]]:
    extractor = _beside(opened, AutoFeatureExtractor, _EXTRACTORS, "feature extractor")
    rate = extractor.sampling_rate
    audio = [read_audio(sample, rate) for sample in itertools.islice(sounds_of(path), wanted.most)]
    batch_size = wanted.size(audio, path, "recordings")
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    its_own = padding is not None and padding.default == "max_length"  # which its model may insist on
    return [
        extractor(
            [audio[index] for index in indices],
            sampling_rate=rate,
            padding="max_length" if its_own else True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for indices in batches_by_length(
            [len(samples) for samples in audio], 1 if its_own else batch_size, round(LONGEST * rate)
        )
    ]


def _image_batches(opened: OpenedModel, path: Path, wanted: _Wanted) -> list[Mapping[str, Tensor]]:
    processor = _beside(opened, AutoImageProcessor, _EXTRACTORS, "image processor")
    images = list(itertools.islice(images_of(path), wanted.most))
    batch_size = wanted.size(images, path, "images")
    batches = []
    for start in range(0, len(images), batch_size):
        read = [read_image(image) for image in images[start : start + batch_size]]  # all of them may be too many
        try:
            batch = processor(read, return_tensors="pt")
        except UNREADABLE as error:
            raise ValueError(f"{path}: {type(processor).__name__} makes no batch: {one_line(error)}") from None
        if batch["pixel_values"].dim() > 4:
            raise ValueError(f"{opened.directory}: its image processor makes videos or tiles, not one image of each")
        batches.append(batch)
    return batches


def _beside(opened: OpenedModel, kind: Any, files: Iterable[str], what: str) -> Any:
    """The tokenizer, feature extractor or image processor that lies in a model's directory."""
    if not any(found for pattern in files for found in opened.directory.glob(pattern)):
        raise ValueError(f"{opened.directory}: holds no {what}; copy it there from where the model came from")
    try:
        return kind.from_pretrained(opened.directory, local_files_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{opened.directory}: its {what} cannot be opened: {one_line(error)}") from None


def _positions(model: PreTrainedModel) -> int:
    """How many positions the model takes; many, where it has no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return _MOST_TOKENS
    for name, module in model.named_modules():  # RoBERTa's count from the one after its padding's
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return positions - module.padding_idx - 1
    return positions


def _taken(model: nn.Module) -> Callable[[str], bool]:
    """Whether the model's forward takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return lambda name: name in parameters
