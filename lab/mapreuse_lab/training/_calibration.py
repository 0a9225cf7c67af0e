from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from mapreuse.data import batches_by_length, check_enough, sound_files
from mapreuse_lab.training._audio import LONGEST_WHOLE, file_pieces, waveform_of, waveform_pieces
from mapreuse_lab.training._corpora import open_corpus
from mapreuse_lab.training._features import features
from mapreuse_lab.training._recogniser import Recogniser


def speech_batches(
    recogniser: Recogniser,
    source: str | Path,
    *,
    split: str = "dev",
    batch_size: int = 8,
    max_batches: int | None = None,
    fewest_batches: int = 1,
    fewest: int = 4,
) -> list[dict[str, Tensor]]:
    """Batches for the recogniser's model, sorted by length, at most 60 s of padded audio in each.

    `source` is a folder of wav or flac files, searched in depth, or the name of a corpus (see `open_corpus`), of
    which `split` is read. No more than the first `max_batches · batch_size` utterances are; one above 60 s counts as
    several (see `Recogniser.transcribe`). Batches are smaller where there would be fewer than `fewest_batches`.

    Raises `ValueError` with one line for a missing or empty source, fewer than `fewest` utterances, or what is not
    audio.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    rate = recogniser.feature_config.sampling_rate
    most = None if max_batches is None else max_batches * batch_size
    audio = list(islice(_utterances(str(source), split, rate), most))
    check_enough(audio, source, "utterances", fewest)
    batch_size = min(batch_size, max(1, len(audio) // fewest_batches))
    lengths = [len(samples) for samples in audio]
    batches = []
    for indices in batches_by_length(lengths, batch_size, round(LONGEST_WHOLE * rate)):
        batch, mask = features([audio[index] for index in indices], recogniser.feature_config)
        batches.append({"input_features": batch, "attention_mask": mask})
    return batches


def _utterances(source: str, split: str, rate: int) -> Iterator[np.ndarray]:
    if Path(source).exists():
        for file in sound_files(source):
            yield from (samples for samples, _, _ in file_pieces(file, rate))
        return
    if ":" not in source:
        raise ValueError(f"{source}: no such folder of wav or flac files, nor a corpus such as prompts:en")
    for cut in getattr(open_corpus(source), split):
        pieces = waveform_pieces(waveform_of(cut, rate), rate, rate, cut.id)
        yield from (samples for samples, _, _ in pieces)
