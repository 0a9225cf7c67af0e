"""A speech recogniser of transformers, an encoder and a decoder, with its calibration speech and its error rates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lhotse.cut import Cut
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

from mapreuse.console import tracked
from mapreuse.data import as_waveform, open_sound, resample
from mapreuse_lab.models._metrics import Metric, error_rate_metrics
from mapreuse_lab.models._packages import model_source
from mapreuse_lab.models._pauses import speech_pieces
from mapreuse_lab.models._varied_speech import varied_speech
from mapreuse_lab.training import LANGUAGES, normalise, open_corpus, waveform_of

_TOKENS_PER_SECOND, _MORE_TOKENS = 6.5, 8
"""Limit of the number of tokens, so that a broken model does not repeat itself for long."""


class SpeechModel:
    """A speech recogniser with an encoder and a decoder, and the speech that it is calibrated and evaluated on.

    Calibration uses the train part of a corpus; evaluation uses another part, which has no transcript in common.

    Attributes:
        stack: path of the encoder in the model.

    Args:
        name: a name of `MODEL_PACKAGES`, a directory, or a name on the Hugging Face Hub.
        corpus: name of a corpus, as `open_corpus` takes it.
        split: part of the corpus for the evaluation: test, dev or all.
        num_calibration: recordings for the calibration.
    """

    def __init__(
        self,
        name: str = "moonshine-tiny",
        corpus: str = "prompts:en",
        split: str = "test",
        num_calibration: int = 512,
    ):
        source = model_source(name)
        self.model = AutoModelForSpeechSeq2Seq.from_pretrained(source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.extractor = AutoFeatureExtractor.from_pretrained(source)
        self.corpus, self.num_calibration = open_corpus(corpus), num_calibration
        self.cuts = self.corpus.part(split)
        self.stack = next(name for name, part in self.model.named_modules() if part is self.model.get_encoder())

    def inputs(self, piece: Float[np.ndarray, " samples"]) -> dict[str, Tensor]:
        """Inputs of the encoder for a piece of speech at the model's sampling rate."""
        return dict(self.extractor(piece, sampling_rate=self.extractor.sampling_rate, return_tensors="pt"))

    @torch.no_grad()
    def calibration(self, stack: str | None = None) -> list[dict[str, Tensor]]:
        """Inputs of the encoder, or of a part of the decoder while the model writes its own transcripts.

        A batch is one piece of speech: statistics over the time of a padded batch would differ.
        """
        cuts = list(self.corpus.train)
        cuts = cuts[:: max(1, len(cuts) // self.num_calibration)][: self.num_calibration]
        pieces = [piece for cut in cuts for piece in self._pieces(cut)]
        if stack in (None, self.stack):
            return [self.inputs(piece) for piece in pieces]
        part = self.model.get_submodule(stack)
        return [self._part_inputs(part, piece) for piece in tracked("calibration", pieces)]

    def varied(self, number: int, seed: int = 0, split: str = "train") -> list[dict[str, Tensor]]:
        """Inputs of the encoder for samples of `varied_speech` from a part of the corpus.

        With recorded prompts, half of the samples are in the other languages.
        """
        names = [self.corpus.name]
        if self.corpus.name.startswith("prompts:"):
            names += [f"prompts:{one}" for one in LANGUAGES if one != self.corpus.language]
        sources = [self.corpus.part(split), *(open_corpus(name).part(split) for name in names[1:])]
        samples = varied_speech(sources, self.extractor.sampling_rate, number, seed)
        return [self.inputs(one) for one, _ in samples]

    def _part_inputs(self, part: nn.Module, piece: Float[np.ndarray, " samples"]) -> dict[str, Tensor]:
        """Tensors that a part of the model is called with when the whole transcript is given to the decoder."""
        recorded: dict[str, Tensor] = {}

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            recorded.update({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})

        tokens = self._generated(self.model, piece)
        with part.register_forward_pre_hook(record, with_kwargs=True):
            self.model(**self.inputs(piece), decoder_input_ids=tokens, use_cache=False)
        return recorded

    @torch.no_grad()
    def transcribe(self, samples: Float[np.ndarray, " samples"], model: Any = None) -> str:
        """The transcript of speech at the model's sampling rate, cut at pauses, by greedy decoding.

        Args:
            samples: mono samples.
            model: a converted copy of the model; default: the model itself.
        """
        texts = []
        for piece in speech_pieces(samples, self.extractor.sampling_rate):
            tokens = self._generated(model or self.model, piece)
            texts.append(self.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
        return " ".join(text for text in texts if text)

    def transcribe_file(self, path: str | Path) -> str:
        """The transcript of an audio file with any sampling rate; channels are averaged.

        Raises:
            OSError: if there is no such file.
            ValueError: with one line, if the file is not readable audio.
        """
        with open_sound(path) as file:
            samples = file.read(dtype="float32", always_2d=True).mean(1)
            rate = file.samplerate
        return self.transcribe(resample(as_waveform(samples, str(path)), rate, self.extractor.sampling_rate))

    def evaluate(self, model: nn.Module) -> list[Metric]:
        """Word and character error rates on the corpus."""
        rate = self.extractor.sampling_rate
        written = [self.transcribe(waveform_of(cut, rate), model) for cut in tracked("transcripts", self.cuts)]
        hypotheses = [normalise(text, self.corpus.language) for text in written]
        return error_rate_metrics([cut.supervisions[0].text for cut in self.cuts], hypotheses)

    def _generated(self, model: Any, piece: Float[np.ndarray, " samples"]) -> Int[Tensor, "1 tokens"]:
        """The most likely tokens, one after the other."""
        limit = _MORE_TOKENS + math.ceil(_TOKENS_PER_SECOND * len(piece) / self.extractor.sampling_rate)
        limit = min(limit, model.generation_config.max_length or limit)
        return model.generate(**self.inputs(piece), max_length=limit, do_sample=False, num_beams=1)

    def _pieces(self, cut: Cut) -> list[Float[np.ndarray, " samples"]]:
        rate = self.extractor.sampling_rate
        return speech_pieces(waveform_of(cut, rate), rate)
