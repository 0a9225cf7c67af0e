"""A character CTC speech recogniser: logits, decoding, saving and loading."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

from mapreuse import models
from mapreuse.console import one_line
from mapreuse_lab.techniques import Full, Reuse, Technique, parse
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import write_whole

BASELINE = Path(__file__).parent / "baseline"
"""Directory of the shipped recogniser."""

_DESCRIPTION, _WEIGHTS = "recogniser.json", "weights.safetensors"
_SUBSAMPLING = 4  # frames of the features per frame of the model


class Recogniser:
    """A `ParakeetForCTC` with the characters it writes and the features it reads.

    Args:
        model: the model. It has one frame for every four frames of the features.
        vocabulary: the characters of outputs 1, 2, ...; output 0 is the blank of CTC.
        feature_config: settings of the features.

    Raises:
        ValueError: if the vocabulary or the features do not fit the model.
    """

    def __init__(self, model: ParakeetForCTC, vocabulary: Sequence[str], feature_config: FeatureConfig):
        for entry in vocabulary:
            if not isinstance(entry, str) or len(entry) != 1:
                raise ValueError(f"the vocabulary must list single characters, got {entry!r}")
        if model.config.vocab_size != len(vocabulary) + 1:
            raise ValueError(
                f"the model has {model.config.vocab_size} outputs, but the vocabulary and the blank need "
                f"{len(vocabulary) + 1}"
            )
        num_mel_bins = model.config.encoder_config.num_mel_bins
        if feature_config.num_mel_bins != num_mel_bins:
            raise ValueError(
                f"the model reads {num_mel_bins} mel bins, but the features have {feature_config.num_mel_bins}"
            )
        self.model = model
        self.vocabulary = list(vocabulary)
        self.feature_config = feature_config
        self._compressed: tuple[Technique, ParakeetCTCConfig] | None = None  # and the config of the original model

    @classmethod
    def create(
        cls,
        vocabulary: Iterable[str],
        *,
        num_layers: int = 8,
        hidden_size: int = 144,
        num_heads: int = 4,
        intermediate_size: int = 432,
        subsampling_channels: int = 64,
        kernel_size: int = 15,
        dropout: float = 0.1,
        feature_config: FeatureConfig | None = None,
        seed: int = 0,
    ) -> "Recogniser":
        """An untrained recogniser. The default size is that of the shipped one: 3.5 million parameters.

        Args:
            vocabulary: characters in any order, also repeated.
            num_layers, hidden_size, num_heads, intermediate_size: of the encoder.
            subsampling_channels: channels of the subsampling convolutions.
            kernel_size: number of frames that the convolution of a layer spans.
            dropout: dropout rate, everywhere.
            feature_config: settings of the features; default: `FeatureConfig()`.
            seed: random seed of the weights.
        """
        characters = sorted(set(vocabulary))
        feature_config = feature_config or FeatureConfig()
        encoder_config = ParakeetEncoderConfig(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            conv_kernel_size=kernel_size,
            subsampling_factor=_SUBSAMPLING,
            subsampling_conv_channels=subsampling_channels,
            num_mel_bins=feature_config.num_mel_bins,
            dropout=dropout,
            activation_dropout=dropout,
            attention_dropout=dropout,
            layerdrop=0.0,  # a dropped layer would have no map to share
            scale_input=False,
            initializer_range=0.08,  # with the default of 0.02 so small a model never outputs more than blanks
        )
        config = ParakeetCTCConfig(vocab_size=len(characters) + 1, pad_token_id=0, encoder_config=encoder_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ParakeetForCTC(config)
        return cls(model.eval(), characters, feature_config)

    def compress(self, technique: Technique) -> None:
        """Apply a technique to the encoder, in place. `save` and `load` support the result.

        Raises `ValueError` if the technique does not fit; the recogniser is then unchanged.
        """
        config = copy.deepcopy(self.model.config)
        technique.apply(self.model)
        if not isinstance(technique, Full | Reuse):  # `mapreuse.save` stores these as plans
            self._compressed = technique, config

    def with_model(self, model: Any) -> "Recogniser":
        """The same recogniser with another model, such as a converted one."""
        other = copy.copy(self)
        other.model = model
        return other

    def encode(self, text: str) -> list[int]:
        """Output numbers of a normalised text. Raises `ValueError` for a character that is not in the vocabulary."""
        numbers = {character: number for number, character in enumerate(self.vocabulary, start=1)}
        if unknown := [character for character in text if character not in numbers]:
            raise ValueError(f"the recogniser has no character {unknown[0]!r} (in {text!r})")
        return [numbers[character] for character in text]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of output numbers, without blanks and with single spaces."""
        return " ".join("".join(self.vocabulary[number - 1] for number in numbers if number).split())

    def num_frames(self, feature_frames: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The number of the model's frames for each number of feature frames."""
        return self.model._get_subsampling_output_length(feature_frames)

    @torch.no_grad()
    def logits(
        self, audio: Sequence[np.ndarray]
    ) -> tuple[Float[Tensor, "batch frames outputs"], Int[Tensor, " batch"]]:
        """Logits of a batch of waveforms (in [−1, 1], at the features' sampling rate) and their numbers of frames."""
        batch, mask = features(audio, self.feature_config)
        batch, mask = batch.to(self.model.device), mask.to(self.model.device)
        logits = self.model(input_features=batch, attention_mask=mask).logits
        return logits.float(), self.num_frames(mask.sum(1))

    def texts(self, logits: Float[Tensor, "batch frames outputs"], lengths: Int[Tensor, " batch"]) -> list[str]:
        """Transcripts by best path decoding: the most likely output of each frame, repeats merged, blanks removed."""
        paths = zip(logits.argmax(-1).cpu(), lengths.tolist(), strict=True)
        return [self.decode(torch.unique_consecutive(path[:length]).tolist()) for path, length in paths]

    def save(self, directory: str | Path) -> None:
        """Save the recogniser: the model as `mapreuse.save` does, and `recogniser.json`.

        The model of a technique that is not a reuse plan is saved as `weights.safetensors`; only `load` opens it.
        The directory is created if missing.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        description: dict[str, Any] = {"vocabulary": self.vocabulary, "features": asdict(self.feature_config)}
        if self._compressed is None:
            models.save(self.model, directory)
        else:
            technique, config = self._compressed
            description["technique"] = {
                "name": technique.name,
                "config": json.loads(config.to_json_string(use_diff=False)),
            }
            weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            write_whole(directory / _WEIGHTS, lambda unfinished: save_file(weights, unfinished))
        text = json.dumps(description, ensure_ascii=False) + "\n"
        write_whole(directory / _DESCRIPTION, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    @staticmethod
    def is_saved_in(directory: str | Path) -> bool:
        """Whether a directory was written by `save`."""
        return (Path(directory) / _DESCRIPTION).is_file()

    @classmethod
    def load(cls, directory: str | Path) -> "Recogniser":
        """Load a recogniser that `save` wrote, in float32 and evaluation mode.

        The language model of a recogniser saved by version 0.1.0 is ignored.

        Raises:
            ValueError: with one line, if the directory holds no recogniser or a damaged one.
        """
        directory = Path(directory)
        if not cls.is_saved_in(directory):
            raise ValueError(f"{directory} holds no recogniser: {_DESCRIPTION} is missing")
        try:
            vocabulary, feature_config, compressed = _read_description(directory / _DESCRIPTION)
            if compressed is None:
                return cls(models.load(directory), vocabulary, feature_config)
            model, technique, config = _load_compressed(compressed, directory / _WEIGHTS)
            recogniser = cls(model, vocabulary, feature_config)
            recogniser._compressed = technique, config
            return recogniser
        except (OSError, ValueError, SafetensorError) as problem:
            raise ValueError(f"{directory} holds a damaged recogniser: {one_line(problem)}") from None


def _read_description(file: Path) -> tuple[list[str], FeatureConfig, dict[str, Any] | None]:
    """Vocabulary, features and technique from `recogniser.json`. Raises `ValueError` if it has another form."""
    names = {field.name for field in fields(FeatureConfig)}
    match json.loads(file.read_text(encoding="utf-8")):
        case {"vocabulary": list(vocabulary), "features": dict(settings), **others} if settings.keys() <= names:
            technique: Any = others.get("technique")
            match technique:
                case None | {"name": str(), "config": dict()}:
                    return vocabulary, FeatureConfig(**settings), technique
    raise ValueError(
        f"{_DESCRIPTION} must have a list `vocabulary`, an object `features` with the keys "
        f"{', '.join(sorted(names))} and, for a technique, its `name` and `config`"
    )


def _load_compressed(description: dict[str, Any], file: Path) -> tuple[ParakeetForCTC, Technique, ParakeetCTCConfig]:
    """The model of a technique, the technique, and the config of the original model."""
    technique, config = parse(description["name"]), ParakeetCTCConfig.from_dict(description["config"])
    model = technique.apply(ParakeetForCTC(copy.deepcopy(config)))
    weights = load_file(file)
    try:
        model.load_state_dict(weights)
    except RuntimeError as mismatch:
        raise ValueError(mismatch) from None
    return model.float().eval(), technique, config
