import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
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
from mapreuse_lab.techniques import Full, Reuse, Technique, parse
from mapreuse_lab.training._audio import PIECE_SECONDS, file_pieces, waveform_pieces
from mapreuse_lab.training._features import FeatureConfig, features
from mapreuse_lab.training._files import one_line, write_whole

BASELINE = Path(__file__).parent / "baseline"

_DESCRIPTION, _WEIGHTS = "recogniser.json", "weights.safetensors"
_SUBSAMPLING = 4  # features to one frame of the model


class Recogniser:
    """A character CTC speech recogniser: a `ParakeetForCTC`, the characters it writes and the features it reads.

    `vocabulary` lists the characters of outputs 1, 2, ...; output 0 is CTC's blank. The model has one frame for
    every four of the features.

    Raises `ValueError` where the three do not fit one another.
    """

    def __init__(self, model: ParakeetForCTC, vocabulary: Sequence[str], feature_config: FeatureConfig):
        for entry in vocabulary:
            if not isinstance(entry, str) or len(entry) != 1:
                raise ValueError(f"the vocabulary must list single characters: got {entry!r}")
        if model.config.vocab_size != len(vocabulary) + 1:
            raise ValueError(
                f"the model has {model.config.vocab_size} outputs, but blank and the vocabulary make "
                f"{len(vocabulary) + 1}"
            )
        num_mel_bins = model.config.encoder_config.num_mel_bins
        if feature_config.num_mel_bins != num_mel_bins:
            raise ValueError(
                f"the model reads {num_mel_bins} mel bins, the features have {feature_config.num_mel_bins}"
            )
        self.model = model
        self.vocabulary = list(vocabulary)
        self.feature_config = feature_config
        self._compressed: _Compressed | None = None

    @classmethod
    def create(
        cls,
        vocabulary: Iterable[str],
        *,
        num_layers: int = 8,
        hidden_size: int = 144,
        num_heads: int = 4,
        intermediate_size: int = 432,
        conv_kernel_size: int = 15,
        subsampling_channels: int = 64,
        dropout: float = 0.1,
        feature_config: FeatureConfig | None = None,
        seed: int = 0,
    ) -> "Recogniser":
        """An untrained recogniser; the defaults are the shipped baseline's size, 3.5 million parameters.

        `vocabulary` is any iterable of characters (a corpus's text, say); it is sorted and made unique. Weights
        are drawn with deviation 0.08: with transformers' default 0.02 so small a model never leaves the plateau
        where it writes only blanks. LayerDrop is off, since a dropped layer would have no map to hand on.
        """
        characters = sorted(set(vocabulary))
        feature_config = feature_config or FeatureConfig()
        encoder_config = ParakeetEncoderConfig(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            conv_kernel_size=conv_kernel_size,
            subsampling_factor=_SUBSAMPLING,
            subsampling_conv_channels=subsampling_channels,
            num_mel_bins=feature_config.num_mel_bins,
            dropout=dropout,
            activation_dropout=dropout,
            attention_dropout=dropout,
            layerdrop=0.0,
            scale_input=False,
            initializer_range=0.08,
        )
        config = ParakeetCTCConfig(vocab_size=len(characters) + 1, pad_token_id=0, encoder_config=encoder_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ParakeetForCTC(config)
        return cls(model.eval(), characters, feature_config)

    def compress(self, technique: Technique) -> None:
        """Gives the encoder a technique's attention, in place; `save` and `load` know of it.

        Raises `ValueError` where the technique does not fit; the recogniser is then unchanged.
        """
        config = copy.deepcopy(self.model.config)
        technique.apply(self.model)
        if not isinstance(technique, Full | Reuse):  # which `mapreuse.save` stores as plans
            self._compressed = _Compressed(technique, config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, text: str) -> list[int]:
        """Output numbers of a normalised text's characters; raises `ValueError` naming one the model lacks."""
        index = {character: number for number, character in enumerate(self.vocabulary, start=1)}
        try:
            return [index[character] for character in text]
        except KeyError as missing:
            raise ValueError(f"the recogniser has no character {missing} (in {text!r})") from None

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of output numbers, blanks left out, spaces single."""
        return " ".join("".join(self.vocabulary[number - 1] for number in numbers if number).split())

    @torch.no_grad()
    def logits(
        self, audio: Sequence[np.ndarray]
    ) -> tuple[Float[Tensor, "batch frames outputs"], Int[Tensor, "batch"]]:
        """Logits of a batch of waveforms (in [−1, 1], at the features' sampling rate) and their frame counts."""
        batch, mask = features(audio, self.feature_config)
        batch, mask = batch.to(self.device), mask.to(self.device)
        logits = self.model(input_features=batch, attention_mask=mask).logits
        return logits.float(), self.model._get_subsampling_output_length(mask.sum(1))

    def texts(self, logits: Float[Tensor, "batch frames outputs"], lengths: Int[Tensor, "batch"]) -> list[str]:
        """Transcripts by best path decoding: the most likely output of each frame, repeats merged, blanks removed."""
        paths = zip(logits.argmax(-1).cpu(), lengths.tolist(), strict=True)
        return [self.decode(torch.unique_consecutive(path[:length]).tolist()) for path, length in paths]

    def transcribe(self, audio: str | Path | np.ndarray, *, sampling_rate: int | None = None) -> str:
        """The text of a wav or flac file of any sampling rate, or of a mono waveform at `sampling_rate` Hz.

        Channels are averaged, and the waveform is resampled to the recogniser's rate (`sampling_rate` defaults to
        it). Audio above 60 s is recognised in pieces of 32 s that also hear 4 s on either side, whose logits are
        joined before decoding, so that memory does not grow with its length beyond the logits' 100 bytes a frame.

        Raises `ValueError` with one line for a file that cannot be read as audio, audio below 0.05 s, a waveform
        that is not one-dimensional or not finite.
        """
        rate = self.feature_config.sampling_rate
        if isinstance(audio, str | Path):
            pieces = file_pieces(audio, rate)
        else:
            pieces = waveform_pieces(audio, sampling_rate or rate, rate)
        self.model.eval()
        joined = []
        frame = _SUBSAMPLING * self.feature_config.hop
        for samples, before, more in pieces:
            logits, lengths = self.logits([samples])
            first = round(before / frame)
            last = first + round(PIECE_SECONDS / frame) if more else int(lengths[0])
            joined.append(logits[0, first:last])
        whole = torch.cat(joined)
        return self.texts(whole[None], torch.tensor([len(whole)]))[0]

    def save(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes the model as `mapreuse.save` does (weights stored as `dtype`, its own where None), with
        `recogniser.json` beside it.

        Weights under a technique that is no reuse plan go to `weights.safetensors`, and its name, with the config of
        the original, to `recogniser.json`: only `load` opens them.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        description = {
            "vocabulary": self.vocabulary,
            "features": asdict(self.feature_config),
        }
        if self._compressed is None:
            models.save(self.model, directory, dtype=dtype)
        else:
            description["technique"] = self._compressed.save(self.model, directory / _WEIGHTS, dtype)
        text = json.dumps(description, ensure_ascii=False) + "\n"
        write_whole(directory / _DESCRIPTION, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    @staticmethod
    def is_saved_in(directory: str | Path) -> bool:
        """Whether a directory is one that `save` wrote."""
        return (Path(directory) / _DESCRIPTION).is_file()

    @classmethod
    def load(cls, directory: str | Path) -> "Recogniser":
        """The recogniser of a directory that `save` wrote, in float32, ready to evaluate.

        Raises `ValueError` with one line where the directory is not one, or is damaged.
        """
        directory = Path(directory)
        if not cls.is_saved_in(directory):
            raise ValueError(f"{directory} holds no recogniser: {_DESCRIPTION} is missing")
        try:
            description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
            compressed = None
            if "technique" in description:
                compressed, model = _Compressed.load(description["technique"], directory / _WEIGHTS)
            else:
                model = models.load(directory)
            recogniser = cls(model, description["vocabulary"], FeatureConfig(**description["features"]))
            recogniser._compressed = compressed
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as damage:
            raise ValueError(f"{directory} holds a damaged or foreign recogniser: {one_line(damage)}") from None
        return recogniser


@dataclass(frozen=True)
class _Compressed:
    """A technique that changed a recogniser's encoder, and the config of the model before."""

    technique: Technique
    config: ParakeetCTCConfig

    def save(self, model: ParakeetForCTC, file: Path, dtype: torch.dtype | None) -> dict[str, Any]:
        """Writes the weights, whole or not at all; returns what `load` needs beside them."""
        stored = {
            name: tensor.detach().to(dtype if tensor.is_floating_point() and dtype else tensor.dtype).contiguous()
            for name, tensor in model.state_dict().items()
        }
        write_whole(file, lambda unfinished: save_file(stored, unfinished))
        return {"name": self.technique.name, "config": json.loads(self.config.to_json_string(use_diff=False))}

    @classmethod
    def load(cls, description: dict[str, Any], file: Path) -> "tuple[_Compressed, ParakeetForCTC]":
        """Raises what a damaged or foreign file makes safetensors, PyTorch or `transformers` raise."""
        config = ParakeetCTCConfig.from_dict(description["config"])
        technique = parse(description["name"])
        model = technique.apply(ParakeetForCTC(copy.deepcopy(config)))
        weights = load_file(file)
        try:
            model.load_state_dict(weights)
        except RuntimeError as mismatch:
            raise ValueError(mismatch) from None
        return cls(technique, config), model.float().eval()
