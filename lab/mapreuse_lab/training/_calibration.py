"""Calibration batches for a recogniser."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from mapreuse.data import batches_by_length, check_enough, sound_files
from mapreuse_lab.training._audio import MAX_WHOLE_SECONDS, cut_pieces, file_pieces
from mapreuse_lab.training._corpora import open_corpus
from mapreuse_lab.training._features import features
from mapreuse_lab.training._recogniser import Recogniser

_BATCH_SIZE = 8


def speech_batches(
    recogniser: Recogniser,
    source: str | Path,
    *,
    split: str = "dev",
    max_batches: int | None = None,
    min_batches: int = 1,
    min_utterances: int = 4,
) -> list[dict[str, Tensor]]:
    """Batches of speech for the recogniser's model, sorted by length.

    A batch has at most 8 utterances and 60 s of padded audio. Recordings longer than 60 s are cut into pieces.

    Args:
        recogniser: the recogniser; its features are used.
        source: a folder of wav or flac files, searched recursively, or the name of a corpus (see `open_corpus`).
        split: part of the corpus to read: train, dev or test.
        max_batches: read at most this many times 8 utterances.
        min_batches: reduce the batch size to get at least this many batches.
        min_utterances: number of utterances that the caller needs.

    Raises:
        ValueError: if the source is missing, contains no audio, or contains fewer than `min_utterances` utterances.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    rate = recogniser.feature_config.sampling_rate
    max_utterances = None if max_batches is None else max_batches * _BATCH_SIZE
    audio = list(islice(_utterances(str(source), split, rate), max_utterances))
    check_enough(audio, source, "utterances", min_utterances)
    batch_size = min(_BATCH_SIZE, max(1, len(audio) // min_batches))
    lengths = [len(samples) for samples in audio]
    batches = []
    for indices in batches_by_length(lengths, batch_size, round(MAX_WHOLE_SECONDS * rate)):
        batch, mask = features([audio[index] for index in indices], recogniser.feature_config)
        batches.append({"input_features": batch, "attention_mask": mask})
    return batches


def _utterances(source: str, split: str, rate: int) -> Iterator[np.ndarray]:
    if Path(source).exists():
        for file in sound_files(source):
            yield from file_pieces(file, rate)
        return
    if ":" not in source:
        raise ValueError(f"{source}: expected a folder of wav or flac files, or a corpus such as prompts:en")
    for cut in getattr(open_corpus(source), split):
        yield from cut_pieces(cut, rate)
