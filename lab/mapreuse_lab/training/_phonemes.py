"""Synthetic speech with the times of its phonemes, and which phoneme each frame of a recogniser's encoder hears."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mapreuse.data import batches_by_length
from mapreuse_lab.training._audio import MAX_WHOLE_SECONDS
from mapreuse_lab.training._features import features
from mapreuse_lab.training._recogniser import Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import check_voices, key_of, speak

# Sounds that are made alike side by side: labial, dental, velar plosives, then fricatives, nasals, and so on.
_ORDER = "pbtdɾkɡʔfvθðszʃʒɕʂʐçxɣhβmɱnɲŋlʎɫʌɹrʁʀwɥjiɪyeɛøœæaɐɑɒɔoʊuɯɨəɚɜɝ"
_RAREST = 0.005  # of all frames with a phoneme


PAUSE = "_"
"""The name of a pause."""


@dataclass(frozen=True)
class Phone:
    """A phoneme or a pause, with its times in seconds from the start of the recording."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class SpokenPhonemes:
    """A mono waveform in [−1, 1], and what it says: phonemes one after another, from its first sample to its last.

    Phonemes are named in the International Phonetic Alphabet, stress left out; a pause is `PAUSE`.
    """

    samples: np.ndarray
    phonemes: tuple[Phone, ...]


def speak_with_phonemes(
    texts: Sequence[str], language: str, *, seed: int, sampling_rate: int = 8000
) -> list[SpokenPhonemes]:
    """Speaks every text as `synthesise` does, to the same waveform, and says when each phoneme starts and stops.

    The times are those at which espeak-ng begins to make each phoneme. It counts the closure of a plosive, some 50 ms
    of near silence, to the phoneme before.

    Raises `ValueError` for a language without voices, `RuntimeError` if the bundled library does not load.
    """
    check_voices(language)
    spoken = []
    for text in texts:
        generator = random.Random(key_of(text, language, seed, sampling_rate))
        samples, begun = speak(text, language, generator, sampling_rate)
        spoken.append(SpokenPhonemes(samples, _intervals(begun, len(samples) / sampling_rate)))
    return spoken


def phoneme_batches(
    recogniser: Recogniser, language: str, *, sentences: int = 60, seed: int = 0, batch_size: int = 8
) -> tuple[list[dict[str, Tensor]], list[Tensor], list[str]]:
    """Synthetic sentences as batches for the recogniser's model, and which phoneme every frame of its encoder hears.

    Returns batches, sorted by length; for every batch integers of shape (batch, frames), numbers of phonemes, −1 in
    pauses and padding; and the phonemes' names, those made alike side by side. A frame hears the phoneme at its
    centre: that of the features' window it is strided to. A phoneme that makes less than half a percent of the
    frames is none (−1), for the voices have many accents.

    Raises `ValueError` for a language without voices, or where `sentences` or `batch_size` is below 1.
    """
    check_voices(language)
    if min(sentences, batch_size) < 1:
        raise ValueError(f"sentences and batch_size must be at least 1, got {sentences} and {batch_size}")
    config = recogniser.feature_config
    texts = generate_sentences(sentences, language, seed=seed)
    spoken = speak_with_phonemes(texts, language, seed=seed, sampling_rate=config.sampling_rate)
    lengths = [len(one.samples) for one in spoken]
    batches, heard = [], []
    for indices in batches_by_length(lengths, batch_size, round(MAX_WHOLE_SECONDS * config.sampling_rate)):
        batch, mask = features([spoken[index].samples for index in indices], config)
        batches.append({"input_features": batch, "attention_mask": mask})
        num_frames = recogniser.model._get_subsampling_output_length(mask.sum(1)).tolist()
        heard.append(
            [_heard(recogniser, spoken[index], count) for index, count in zip(indices, num_frames, strict=True)]
        )
    frames = Counter(name for rows in heard for row in rows for name in row if name != PAUSE)
    phonemes = sorted((name for name, count in frames.items() if count >= _RAREST * frames.total()), key=_place)
    number = {name: index for index, name in enumerate(phonemes)}
    labels = []
    for rows in heard:
        classes = torch.full((len(rows), max(map(len, rows))), -1)
        for found, row in zip(classes, rows, strict=True):
            found[: len(row)] = torch.tensor([number.get(name, -1) for name in row])
        labels.append(classes)
    return batches, labels, phonemes


def _intervals(begun: Sequence[tuple[str, float]], duration: float) -> tuple[Phone, ...]:
    """From what begins when to what lasts from when until when; pauses in a row are one, what has no length none."""
    begun = [(name, start) for name, start in begun if not name.startswith("(")]  # "(en)": a word of another language
    names = [PAUSE, *(re.sub("[ˈˌ-]", "", name) or PAUSE for name, _ in begun)]
    starts = [0.0, *(min(start, duration) for _, start in begun), duration]
    phones: list[Phone] = []
    for name, start, stop in zip(names, starts, starts[1:], strict=False):
        if stop <= start:
            continue
        if phones and phones[-1].name == name == PAUSE:
            phones[-1] = Phone(PAUSE, phones[-1].start, stop)
        else:
            phones.append(Phone(name, start, stop))
    return tuple(phones)


def _heard(recogniser: Recogniser, spoken: SpokenPhonemes, num_frames: int) -> list[str]:
    """The phoneme at the centre of every frame of the encoder."""
    config, factor = recogniser.feature_config, recogniser.model.config.encoder_config.subsampling_factor
    centres = config.window / 2 + np.arange(num_frames) * factor * config.hop
    index = np.searchsorted([phone.stop for phone in spoken.phonemes], centres, side="right")
    return [spoken.phonemes[min(found, len(spoken.phonemes) - 1)].name for found in index]


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.find(name[0]) if name[0] in _ORDER else len(_ORDER), name)
