"""Models and calibration data from disk, as the command line names them."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors import SafetensorError
from scipy.signal import resample_poly
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer, PreTrainedModel

from mapreuse import models
from mapreuse.convert._batches import check_precision

FEWEST = 4
"""Fewer sequences than these say too little about a model."""

_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_EXTRACTORS = ("preprocessor_config.json", "processor_config.json")
_SOUNDS = (".wav", ".flac")
_DATASETS = ("dataset_info.json", "dataset_dict.json")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises on directories that are damaged or foreign."""

_OPTIONAL = re.compile(r"(^|\.)pooler\.|(^|\.)masked_spec_embed$|(^|\.)mask_token$")
"""Weights that a model of hidden states does without: directories often lack them."""

_MOST_TOKENS = 256
_SHORTEST, _LONGEST = 0.05, 20.0  # seconds of audio


@dataclass(frozen=True)
class OpenedModel:
    """A model, and the directory where its tokenizer or feature extractor lies beside its weights."""

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


def open_model(path: str | Path, stack: str = "") -> OpenedModel:
    """Opens a model's directory: one that `save_pretrained` wrote, `mapreuse.save`, or sentence-transformers.

    Weights are read from safetensors only, in the type they are stored in; the class is the one that the directory
    names. Of a sentence-transformers directory (`modules.json`) it is the transformer, its first module.

    Args:
        path: of the directory.
        stack: path of the module that holds the stack of layers in question, such as `model.encoder`, where the model
            has several.

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
        check_precision(model)
        opened = OpenedModel(model.eval(), directory, stack)
        models.find_stack(opened.part)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    return opened


def open_batches(
    opened: OpenedModel,
    path: str | Path,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    fewest_batches: int = 1,
) -> list[dict[str, Tensor]]:
    """Calibration batches for a model, on the CPU: keyword dictionaries for its forward.

    Sequences are sorted by length, and padded per batch. What `path` may be:

    - for a model that reads tokens: a text file, one sentence per line (empty lines are passed over). At most 256
      tokens of a sentence are read, or as many as the model takes.
    - for a model that reads audio: a folder of wav or flac files, searched in depth, of any sampling rate; channels
      are averaged. The first 20 s of a recording are read; a batch holds at most 20 s of padded audio.
    - for either: a directory that `datasets.save_to_disk` wrote, with a column `text` or `audio` (or only one that
      holds texts or audio); of several splits, `train` or the first.

    Args:
        opened: from `open_model`.
        path: of the text or the audio.
        batch_size: most sequences in a batch.
        max_batches: read no more than the first `max_batches · batch_size` sequences.
        fewest_batches: make batches smaller where there would be fewer than these.

    Raises:
        ValueError: in one line, where the path is missing, empty, too short (fewer than 4 sequences), not text or
            audio, where the directory has no tokenizer or feature extractor, or a package is missing.
    """
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise ValueError(f"batch_size and max_batches must be at least 1, got {batch_size} and {max_batches}")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    most = None if max_batches is None else max_batches * batch_size
    part = opened.part
    reads = getattr(part, "main_input_name", opened.model.main_input_name)
    if reads == "input_ids":
        batches = _token_batches(opened, path, batch_size, most, fewest_batches)
    elif reads in ("input_values", "input_features"):
        batches = _audio_batches(opened, path, batch_size, most, fewest_batches)
    else:
        raise ValueError(f"{type(part).__name__} reads {reads}; calibration takes text or audio")
    taken = _taken(part)
    return [{name: tensor for name, tensor in batch.items() if taken(name)} for batch in batches]


def sound_files(folder: str | Path) -> list[Path]:
    """The wav and flac files below a folder, in order of their paths. Raises `ValueError` where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder of wav or flac files")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SOUNDS and file.is_file())
    if not found:
        raise ValueError(f"{folder}: holds no wav or flac files")
    return found


def check_enough(found: Sequence[object], source: str | Path, what: str) -> None:
    """Raises `ValueError` where fewer than `FEWEST` sequences were found."""
    if len(found) < FEWEST:
        raise ValueError(f"{source}: {len(found)} {what}, at least {FEWEST} are wanted")


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


def _token_batches(
    opened: OpenedModel, path: Path, batch_size: int, most: int | None, fewest: int
) -> list[Mapping[str, Tensor]]:
    tokenizer = _beside(opened, AutoTokenizer, _TOKENIZERS, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{opened.directory}: its tokenizer has no token to pad with")
    texts = list(itertools.islice(_texts(path), most))
    check_enough(texts, path, "sentences")
    batch_size = min(batch_size, max(1, len(texts) // fewest))
    most_tokens = min(_MOST_TOKENS, tokenizer.model_max_length, _positions(opened.model))
    encoded = tokenizer(texts, truncation=True, max_length=most_tokens)["input_ids"]
    unknown = max(max(tokens, default=0) for tokens in encoded)
    if unknown >= opened.model.get_input_embeddings().weight.shape[0]:
        raise ValueError(
            f"{opened.directory}: its tokenizer makes token {unknown}, but {type(opened.model).__name__} has "
            f"{opened.model.get_input_embeddings().weight.shape[0]}; they are not of one model"
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


def _audio_batches(
    opened: OpenedModel, path: Path, batch_size: int, most: int | None, fewest: int
) -> list[Mapping[str, Tensor]]:
    extractor = _beside(opened, AutoFeatureExtractor, _EXTRACTORS, "feature extractor")
    rate = extractor.sampling_rate
    audio = [_read_audio(file, rate, name) for file, name in itertools.islice(_sounds(path), most)]
    check_enough(audio, path, "recordings")
    batch_size = min(batch_size, max(1, len(audio) // fewest))
    lengths = [len(samples) for samples in audio]
    return [
        extractor(
            [audio[index] for index in indices],
            sampling_rate=rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for indices in batches_by_length(lengths, batch_size, round(_LONGEST * rate))
    ]


def _beside(opened: OpenedModel, kind: Any, files: Iterable[str], what: str) -> Any:
    """The tokenizer or feature extractor that lies in a model's directory."""
    if not any(found for pattern in files for found in opened.directory.glob(pattern)):
        raise ValueError(f"{opened.directory}: holds no {what}; copy it there from where the model came from")
    try:
        return kind.from_pretrained(opened.directory, local_files_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"{opened.directory}: its {what} cannot be opened: {_one_line(error)}") from None


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


def _texts(path: Path) -> Iterator[str]:
    if path.is_dir():
        if not _is_dataset(path):
            raise ValueError(f"{path}: give a text file, one sentence per line, or a datasets directory")
        lines: Iterable[str] = _column(path, "text")
        yield from (line for line in lines if line and line.strip())
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{path}: not a text file")
                if line.strip():
                    yield line.strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def _sounds(path: Path) -> Iterator[tuple[Path | io.BytesIO, str]]:
    """Audio files, or their contents, with names for them."""
    if not _is_dataset(path):
        yield from ((file, str(file)) for file in sound_files(path))
        return
    for number, row in enumerate(_column(path, "audio")):
        if row is None or not (row["bytes"] or row["path"]):
            continue
        yield io.BytesIO(row["bytes"]) if row["bytes"] else Path(row["path"]), f"{path}, row {number}"


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in _DATASETS)


def _column(path: Path, name: str) -> Iterator[Any]:
    """The column of texts or of undecoded audio of a datasets directory."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: to read it, install the package datasets: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except _UNREADABLE as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if not loaded:
            raise ValueError(f"{path}: holds no split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    audio = {column for column, kind in loaded.features.items() if isinstance(kind, datasets.Audio)}
    texts = {
        column
        for column, kind in loaded.features.items()
        if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")
    }
    columns = audio if name == "audio" else texts
    if name not in columns and len(columns) != 1:
        found = ", ".join(f"{column} of {getattr(kind, 'dtype', kind)}" for column, kind in loaded.features.items())
        raise ValueError(f"{path}: one column should hold {name}, and if there are several, be named so; got {found}")
    chosen = name if name in columns else columns.pop()
    loaded = loaded.select_columns([chosen])  # a row would decode all its columns
    if name == "audio":
        loaded = loaded.cast_column(chosen, datasets.Audio(decode=False))
    return (row[chosen] for row in loaded)


def _read_audio(file: Path | io.BytesIO, rate: int, name: str) -> np.ndarray:
    """The first seconds of a recording at `rate` Hz, mono."""
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{name}: to read it, install soundfile: pip install 'mapreuse[speech]'") from None
    try:
        with soundfile.SoundFile(file) as sound:
            source = sound.samplerate
            samples = sound.read(round(_LONGEST * source), dtype="float32", always_2d=True).mean(1)
    except soundfile.LibsndfileError as problem:
        raise ValueError(f"{name}: not a readable wav or flac file ({problem.error_string.rstrip('.')})") from None
    if len(samples) < _SHORTEST * source:
        raise ValueError(f"{name}: lasts {len(samples) / source:.3f} s; at least {_SHORTEST} s are wanted")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are not finite numbers")
    if source == rate:
        return samples
    ratio = Fraction(rate, source)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def _taken(model: nn.Module) -> Callable[[str], bool]:
    """Whether the model's forward takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return lambda name: name in parameters


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
