"""Error rates of techniques, and whether their differences are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mapreuse_lab.training import error_counts

RESAMPLES = 2000


@dataclass(frozen=True)
class Errors:
    """Errors of one technique on each test utterance, for each seed.

    Attributes:
        counts: for each metric ("wer", "cer"), an array of shape (seeds, utterances, 2): number of errors, and number
            of words or characters in the reference.
    """

    counts: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, references: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> Errors:
        """Count the errors of each seed's hypotheses.

        Raises:
            ValueError: if the number of hypotheses of a seed differs from the number of references.
        """
        counted = [error_counts(references, one) for one in hypotheses]
        return cls({"wer": np.stack([words for words, _ in counted]), "cer": np.stack([c for _, c in counted])})

    def rate(self, metric: str) -> float:
        """Error rate over all seeds and utterances."""
        errors, units = self.counts[metric].sum((0, 1))
        return float(errors / units)

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances."""
        return _middle(_resampled(self.counts[metric]))

    def select(self, seeds: Sequence[int]) -> Errors:
        """The seeds at these indices."""
        return Errors({metric: counts[list(seeds)] for metric, counts in self.counts.items()})

    def by_seed(self, metric: str) -> np.ndarray:
        """Error rate of each seed."""
        errors, units = np.moveaxis(self.counts[metric].sum(1), -1, 0)
        return errors / units


@dataclass(frozen=True)
class Difference:
    """Error rate of a technique minus that of full attention.

    Attributes:
        difference: the difference, as a fraction; negative if the technique has fewer errors.
        over_utterances: 95 % interval of the paired bootstrap over utterances.
        interval: the same interval, widened by seed noise.
    """

    difference: float
    over_utterances: tuple[float, float]
    interval: tuple[float, float]


@dataclass(frozen=True)
class SeedNoise:
    """Variation of an error rate with the seed, without what a seed changes for all techniques alike.

    Attributes:
        deviation: standard deviation of the rate of a run, relative to the mean of its technique.
        freedom: degrees of freedom of the estimate; 0 if no technique has two seeds.
    """

    deviation: float
    freedom: int


def significance(interval: Sequence[float]) -> str:
    """ "better" or "worse" if the 95 % interval of a difference excludes 0, else ""."""
    low, high = interval
    return "better" if high < 0 else "worse" if low > 0 else ""


def difference(technique: Errors, full: Errors, metric: str, noise: SeedNoise) -> Difference:
    """Paired bootstrap over utterances, for the same seeds of both, widened by seed noise.

        d* = rate(technique, U*) − rate(full, U*)
        widened: d* + t · s · √((rate(technique)² + rate(full)²) / n),    t ~ Student(f)

    U* are test utterances drawn with replacement, the same for both; n is the number of seeds, s the relative
    deviation of a run and f its degrees of freedom (see `seed_noise`). A bootstrap over utterances alone misses that
    another seed gives another rate on the same utterances. The noise of the techniques with several seeds is used for
    all techniques. Without such techniques, the interval is not widened.
    """
    one, other = technique.counts[metric], full.counts[metric]
    drawn = _resampled(one) - _resampled(other)
    widened = drawn
    if noise.freedom:
        chance = np.random.default_rng(1).standard_t(noise.freedom, len(drawn))
        rates = technique.rate(metric) ** 2 + full.rate(metric) ** 2
        widened = drawn + chance * noise.deviation * (rates / len(one)) ** 0.5
    return Difference(technique.rate(metric) - full.rate(metric), _middle(drawn), _middle(widened))


def seed_noise(corpora: Sequence[Sequence[Errors]], metric: str) -> SeedNoise:
    """Seed noise, from the techniques that were trained with the same several seeds on each corpus.

        x = rate / mean rate of the technique − 1
        s² = Σ (x − mean x of the seed)² / f,    f = Σ_corpora (T − 1)(S − 1)

    for T techniques with S seeds. What a seed changes for all techniques alike (easy batches, for example) cancels in
    a difference and does not count. The deviation is relative because corpora differ in their error rates.
    """
    squares, freedom = 0.0, 0
    for techniques in corpora:
        rates = np.stack([technique.by_seed(metric) for technique in techniques])
        relative = rates / rates.mean(1, keepdims=True) - 1
        squares += float(((relative - relative.mean(0)) ** 2).sum())
        freedom += (rates.shape[0] - 1) * (rates.shape[1] - 1)
    return SeedNoise((squares / freedom) ** 0.5 if freedom else 0.0, freedom)


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    """The interval of the middle 95 % of the samples."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _resampled(counts: np.ndarray) -> np.ndarray:
    """Rates over utterances drawn with replacement; the draws are the same for every technique."""
    pooled = counts.sum(0)
    draws = np.random.default_rng(0).integers(len(pooled), size=(RESAMPLES, len(pooled)))
    drawn = pooled[draws].sum(1)
    return drawn[:, 0] / drawn[:, 1]
