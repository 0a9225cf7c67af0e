"""Synthetic speech with the times of its phonemes, and the phoneme at each frame of a recogniser's encoder."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mapreuse.data import batches_by_length
from mapreuse_lab.training._audio import MAX_WHOLE_SECONDS
from mapreuse_lab.training._features import features
from mapreuse_lab.training._recogniser import Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import key_of, speak

PAUSE = "_"
"""The name of a pause."""

# Similar sounds side by side: labial, dental and velar plosives, then fricatives, nasals, and so on.
_ORDER = "pbtdɾkɡʔfvθðszʃʒɕʂʐçxɣhβmɱnɲŋlʎɫʌɹrʁʀwɥjiɪyeɛøœæaɐɑɒɔoʊuɯɨəɚɜɝ"
_BATCH_SIZE = 8
_MIN_SHARE = 0.005  # of all frames with a phoneme


@dataclass(frozen=True)
class Phone:
    """A phoneme or a pause, from `start` to `stop` seconds of the recording."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class SpokenPhonemes:
    """A waveform and its phonemes.

    Attributes:
        samples: the waveform, mono, in [−1, 1].
        phonemes: in order, without gaps from the first sample to the last. Names are those of the International
            Phonetic Alphabet without stress; a pause is `PAUSE`.
    """

    samples: Float[np.ndarray, " samples"]
    phonemes: tuple[Phone, ...]


def speak_with_phonemes(
    texts: Sequence[str], language: str, *, seed: int, sampling_rate: int = 8000
) -> list[SpokenPhonemes]:
    """Speak texts with the same waveforms as `synthesise`, and return the times of their phonemes.

    A phoneme starts when espeak-ng starts to make it. The closure of a plosive, about 50 ms of near silence, counts
    as part of the phoneme before. The arguments are those of `synthesise`.

    Raises:
        ValueError: for another language.
        RuntimeError: if espeak-ng does not start.
    """
    spoken = []
    for text in texts:
        generator = random.Random(key_of(text, language, seed, sampling_rate))
        samples, starts = speak(text, language, generator, sampling_rate)
        spoken.append(SpokenPhonemes(samples, _intervals(starts, len(samples) / sampling_rate)))
    return spoken


def phoneme_batches(
    recogniser: Recogniser, language: str, *, sentences: int = 60, seed: int = 0
) -> tuple[list[dict[str, Tensor]], list[Tensor], list[str]]:
    """Batches of synthetic sentences, and the phoneme at each frame of the recogniser's encoder.

    The phoneme of a frame is the one at the centre of its window. Phonemes with less than 0.5 % of the frames are
    left out: they come from rare accents.

    Args:
        recogniser: the recogniser whose frames are labelled.
        language: en, fr, es, it or ru.
        sentences: number of sentences.
        seed: random seed of sentences and voices.

    Returns:
        Batches of up to 8 sentences for the recogniser's model, sorted by length.

        For each batch, the indices of the phonemes: an integer tensor of shape (batch, frames), with −1 for pauses,
        padding and rare phonemes.

        The names of the phonemes, with similar sounds side by side.
    """
    config = recogniser.feature_config
    texts = generate_sentences(sentences, language, seed=seed)
    spoken = speak_with_phonemes(texts, language, seed=seed, sampling_rate=config.sampling_rate)
    lengths = [len(one.samples) for one in spoken]
    batches, names = [], []
    for indices in batches_by_length(lengths, _BATCH_SIZE, round(MAX_WHOLE_SECONDS * config.sampling_rate)):
        batch, mask = features([spoken[index].samples for index in indices], config)
        batches.append({"input_features": batch, "attention_mask": mask})
        counts = recogniser.num_frames(mask.sum(1)).tolist()
        names.append([_names(recogniser, spoken[i], count) for i, count in zip(indices, counts, strict=True)])
    frames = Counter(name for rows in names for row in rows for name in row if name != PAUSE)
    phonemes = sorted((name for name, count in frames.items() if count >= _MIN_SHARE * frames.total()), key=_place)
    index_of = {name: index for index, name in enumerate(phonemes)}
    labels = [
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([index_of.get(name, -1) for name in row]) for row in rows],
            batch_first=True,
            padding_value=-1,
        )
        for rows in names
    ]
    return batches, labels, phonemes


def _intervals(starts: Sequence[tuple[str, float]], duration: float) -> tuple[Phone, ...]:
    """Phones from their starts. Adjacent pauses are merged; phones without length are dropped."""
    starts = [(name, start) for name, start in starts if not name.startswith("(")]  # "(en)": a foreign word follows
    names = [PAUSE, *(re.sub("[ˈˌ-]", "", name) or PAUSE for name, _ in starts)]
    times = [0.0, *(min(start, duration) for _, start in starts), duration]
    phones: list[Phone] = []
    for name, start, stop in zip(names, times, times[1:], strict=False):
        if stop <= start:
            continue
        if phones and phones[-1].name == name == PAUSE:
            phones[-1] = Phone(PAUSE, phones[-1].start, stop)
        else:
            phones.append(Phone(name, start, stop))
    return tuple(phones)


def _names(recogniser: Recogniser, spoken: SpokenPhonemes, num_frames: int) -> list[str]:
    """The phoneme at the centre of each frame of the encoder."""
    config, factor = recogniser.feature_config, recogniser.model.config.encoder_config.subsampling_factor
    centres = config.window / 2 + np.arange(num_frames) * factor * config.hop
    index = np.searchsorted([phone.stop for phone in spoken.phonemes], centres, side="right")
    return [spoken.phonemes[min(found, len(spoken.phonemes) - 1)].name for found in index]


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.find(name[0]) if name[0] in _ORDER else len(_ORDER), name)
