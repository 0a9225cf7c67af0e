"""Word and character error rates of a recogniser."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from jaxtyping import Int
from lhotse.cut import Cut

from mapreuse.data import batches_by_length
from mapreuse_lab.training._audio import MAX_WHOLE_SECONDS, waveform_of
from mapreuse_lab.training._recogniser import Recogniser

_RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class ErrorRates:
    """Error rates over a set of utterances, as fractions.

        WER = (substitutions + deletions + insertions) / reference words

    Errors and words are summed over the set. CER is the same over characters, including spaces.

    Attributes:
        wer: word error rate.
        cer: character error rate.
        wer_interval: 95 % bootstrap interval over utterances.
        cer_interval: likewise.
        num_utterances: number of utterances.
        num_words: number of reference words.
        references: the reference transcripts.
        hypotheses: the recogniser's transcripts, in the same order.
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


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Error rates of `hypotheses` against `references`, which are in the same order.

    Raises:
        ValueError: if there are no references, or the lengths differ.
    """
    words, characters = error_counts(references, hypotheses)
    draws = np.random.default_rng(0).integers(len(references), size=(_RESAMPLES, len(references)))

    def rate_and_interval(counts: np.ndarray) -> tuple[float, tuple[float, float]]:
        drawn = counts[draws].sum(1)
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        return float(counts[:, 0].sum() / counts[:, 1].sum()), (float(low), float(high))

    wer, wer_interval = rate_and_interval(words)
    cer, cer_interval = rate_and_interval(characters)
    num_words = int(words[:, 1].sum())
    texts = list(references), list(hypotheses)
    return ErrorRates(wer, cer, wer_interval, cer_interval, len(references), num_words, *texts)


def error_counts(
    references: Sequence[str], hypotheses: Sequence[str]
) -> tuple[Int[np.ndarray, "utterances 2"], Int[np.ndarray, "utterances 2"]]:
    """The number of errors and the reference length of each utterance, in words and in characters.

    Raises:
        ValueError: if there are no references, or the lengths differ.
    """
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"cannot score {len(hypotheses)} hypotheses against {len(references)} references")
    counts = []
    for process in (jiwer.process_words, jiwer.process_characters):
        found = [process(*pair) for pair in zip(references, hypotheses, strict=True)]
        errors = [one.substitutions + one.deletions + one.insertions for one in found]
        lengths = [one.hits + one.substitutions + one.deletions for one in found]
        counts.append(np.stack([errors, lengths], axis=1))
    return counts[0], counts[1]


def evaluate(recogniser: Recogniser, cuts: Iterable[Cut]) -> ErrorRates:
    """Error rates of a recogniser on cuts with normalised transcripts, in the order of the cuts.

    Raises:
        ValueError: if there are no cuts, or a recording cannot be read.
    """
    cuts = list(cuts)
    if not cuts:
        raise ValueError("no utterances to evaluate: this split of the corpus is empty; use all of it (--split all)")
    rate = recogniser.feature_config.sampling_rate
    audio = [waveform_of(cut, rate) for cut in cuts]
    recogniser.model.eval()
    hypotheses: dict[int, str] = {}
    for batch in batches_by_length([len(samples) for samples in audio], len(cuts), round(MAX_WHOLE_SECONDS * rate)):
        logits, lengths = recogniser.logits([audio[index] for index in batch])
        hypotheses |= zip(batch, recogniser.texts(logits, lengths), strict=True)
    return error_rates([cut.supervisions[0].text for cut in cuts], [hypotheses[i] for i in range(len(cuts))])
