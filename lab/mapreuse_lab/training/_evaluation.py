from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
import torch
from jaxtyping import Float, Int
from lhotse.cut import Cut
from torch import Tensor

from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._recogniser import Recogniser


@dataclass(frozen=True)
class ErrorRates:
    """Error rates over a set of utterances, as fractions, with 95 % bootstrap intervals over utterances.

    WER = (substitutions + deletions + insertions) / reference words, pooled over the set; CER likewise over
    characters, spaces included. `references` and `hypotheses` are in the order of the cuts.
    """

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]
    num_utterances: int
    num_words: int
    references: list[str]
    hypotheses: list[str]

    def __str__(self) -> str:
        rates = (("WER", self.wer, self.wer_interval), ("CER", self.cer, self.cer_interval))
        shown = [f"{name} {rate:.1%} [{low:.1%}, {high:.1%}]" for name, rate, (low, high) in rates]
        return ", ".join([*shown, f"{self.num_utterances} utterances", f"{self.num_words} words"])


def score(
    references: Sequence[str], hypotheses: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> ErrorRates:
    """Error rates of `hypotheses` against `references`; the interval resamples utterances `resamples` times.

    Raises `ValueError` where there is nothing to score.
    """
    words, characters = error_counts(references, hypotheses)
    draws = np.random.default_rng(seed).integers(len(references), size=(resamples, len(references)))

    def rate_and_interval(counts: np.ndarray) -> tuple[float, tuple[float, float]]:
        drawn = counts[draws].sum(1)
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        return counts[:, 0].sum() / counts[:, 1].sum(), (float(low), float(high))

    wer, wer_interval = rate_and_interval(words)
    cer, cer_interval = rate_and_interval(characters)
    return ErrorRates(
        float(wer),
        float(cer),
        wer_interval,
        cer_interval,
        len(references),
        int(words[:, 1].sum()),
        list(references),
        list(hypotheses),
    )


def error_counts(
    references: Sequence[str], hypotheses: Sequence[str]
) -> tuple[Int[np.ndarray, "utterances 2"], Int[np.ndarray, "utterances 2"]]:
    """Errors and reference units of every utterance: by words, and by characters.

    Raises `ValueError` where there is nothing to score.
    """
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"cannot score {len(hypotheses)} hypotheses against {len(references)} references")
    pairs = list(zip(references, hypotheses, strict=True))
    words = np.array([_errors(jiwer.process_words, *pair) for pair in pairs])
    return words, np.array([_errors(jiwer.process_characters, *pair) for pair in pairs])


def evaluate(recogniser: Recogniser, cuts: Iterable[Cut], *, batch_seconds: float = 60.0) -> ErrorRates:
    """Error rates of the recogniser on cuts with normalised transcripts.

    Cuts are read, resampled, sorted by length and batched to at most `batch_seconds` of padded audio; the order of
    the returned hypotheses is that of `cuts`.

    Raises `ValueError` where there are no cuts.
    """
    cuts = list(cuts)
    if not cuts:
        raise ValueError("no utterances to evaluate: this split of the corpus is empty; take them all (--split all)")
    logits = logits_of(recogniser, cuts, batch_seconds=batch_seconds)
    hypotheses = [text_of(recogniser, frames) for frames in logits]
    return score([cut.supervisions[0].text for cut in cuts], hypotheses)


def logits_of(
    recogniser: Recogniser, cuts: Sequence[Cut], *, batch_seconds: float = 60.0
) -> list[Float[Tensor, "frames outputs"]]:
    """Every cut's logits, without padding, in the order of `cuts`."""
    rate = recogniser.feature_config.sampling_rate
    audio = [waveform_of(cut, rate) for cut in cuts]
    recogniser.model.eval()
    found: dict[int, Tensor] = {}
    for batch in batches_by_length([len(samples) for samples in audio], round(batch_seconds * rate)):
        logits, lengths = recogniser.logits([audio[index] for index in batch])
        found |= {i: rows[:length] for i, rows, length in zip(batch, logits, lengths.tolist(), strict=True)}
    return [found[index] for index in range(len(cuts))]


def text_of(recogniser: Recogniser, frames: Float[Tensor, "frames outputs"]) -> str:
    """What one utterance's logits say."""
    return recogniser.texts(frames[None], torch.tensor([len(frames)]))[0]


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut into batches of at most `budget` padded units (one item may exceed it)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _errors(process: Callable, reference: str, hypothesis: str) -> tuple[int, int]:
    found = process(reference, hypothesis)
    return (
        found.substitutions + found.deletions + found.insertions,
        found.hits + found.substitutions + found.deletions,
    )
