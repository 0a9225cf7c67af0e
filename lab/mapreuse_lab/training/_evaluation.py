"""Word and character error rates of a recogniser."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
from jaxtyping import Float, Int, Shaped
from lhotse.cut import Cut

from mapreuse.data import batches_by_length
from mapreuse_lab.training._audio import MAX_WHOLE_SECONDS, waveform_of
from mapreuse_lab.training._recogniser import Recogniser

_RESAMPLES = 2000  # of the bootstrap


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


@dataclass(frozen=True)
class Errors:
    """Errors on each test utterance, for each training seed.

    Attributes:
        counts: for each metric ("wer", "cer"), an array of shape (seeds, utterances, 2): number of errors, and number
            of words or characters in the reference.
    """

    counts: Mapping[str, Int[np.ndarray, "seeds utterances 2"]]

    @classmethod
    def of(cls, references: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> "Errors":
        """Count the errors of each seed's hypotheses.

        Raises:
            ValueError: if there are no references, or the number of hypotheses of a seed differs from theirs.
        """
        counts = {}
        for metric, process in {"wer": jiwer.process_words, "cer": jiwer.process_characters}.items():
            counts[metric] = np.stack([_counted(process, references, one) for one in hypotheses])
        return cls(counts)

    def rate(self, metric: str) -> float:
        """Error rate over all seeds and utterances."""
        errors, units = self.counts[metric].sum((0, 1))
        return float(errors / units)

    def by_seed(self, metric: str) -> np.ndarray:
        """Error rate of each seed."""
        errors, units = np.moveaxis(self.counts[metric].sum(1), -1, 0)
        return errors / units

    def resampled(self, metric: str) -> np.ndarray:
        """Rates over utterances drawn with replacement; the same draws for every set of as many utterances."""
        return resampled_rates(self.counts[metric].sum(0))

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances."""
        return middle_of(self.resampled(metric))

    def select(self, seeds: Sequence[int]) -> "Errors":
        """The seeds at these indices."""
        return Errors({metric: counts[list(seeds)] for metric, counts in self.counts.items()})


def resampled_rates(sums: Shaped[np.ndarray, "samples 2"]) -> Float[np.ndarray, " draws"]:
    """Bootstrap of Σ amounts / Σ units, for samples of (amount, units) drawn with replacement.

    The draws are the same for every set of as many samples: differences of two results are paired.
    """
    draws = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    drawn = sums[draws].sum(1)
    return drawn[:, 0] / drawn[:, 1]


def middle_of(samples: np.ndarray) -> tuple[float, float]:
    """The interval of the middle 95 % of the samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def _counted(process: Any, references: Sequence[str], hypotheses: Sequence[str]) -> Int[np.ndarray, "utterances 2"]:
    """Number of errors and reference length of each utterance."""
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"cannot score {len(hypotheses)} hypotheses against {len(references)} references")
    found = [process(*pair) for pair in zip(references, hypotheses, strict=True)]
    errors = [one.substitutions + one.deletions + one.insertions for one in found]
    lengths = [one.hits + one.substitutions + one.deletions for one in found]
    return np.stack([errors, lengths], axis=1)


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Error rates of `hypotheses` against `references`, which are in the same order.

    Raises:
        ValueError: if there are no references, or the lengths differ.
    """
    errors = Errors.of(references, [hypotheses])
    rates = errors.rate("wer"), errors.rate("cer"), errors.interval("wer"), errors.interval("cer")
    num_words = int(errors.counts["wer"][..., 1].sum())
    return ErrorRates(*rates, len(references), num_words, list(references), list(hypotheses))


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
