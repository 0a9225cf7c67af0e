"""Is the difference between two techniques' error rates more than chance?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mapreuse.speech import error_counts

RESAMPLES = 2000


@dataclass(frozen=True)
class Errors:
    """Errors and reference units of every test utterance, for every seed of one technique.

    Attributes:
        counts: by measure ("wer", "cer"), an array (seeds, utterances, 2) of errors and of words or characters.
    """

    counts: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, references: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> Errors:
        """From the references and each seed's hypotheses.

        Raises `ValueError` where a seed's hypotheses are not as many as the references.
        """
        counted = [error_counts(references, said) for said in hypotheses]
        return cls({"wer": np.stack([words for words, _ in counted]), "cer": np.stack([c for _, c in counted])})

    def rate(self, measure: str) -> float:
        """Error rate, pooled over seeds and utterances."""
        errors, units = self.counts[measure].sum((0, 1))
        return float(errors / units)

    def interval(self, measure: str) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances."""
        return _middle(_resampled(self.counts[measure]))

    def by_seed(self, measure: str) -> np.ndarray:
        """The rate of each seed."""
        errors, units = np.moveaxis(self.counts[measure].sum(1), -1, 0)
        return errors / units


@dataclass(frozen=True)
class Difference:
    """Error rate of a technique minus that of full attention.

    Attributes:
        difference: as fractions; below zero, the technique errs less.
        over_utterances: its 95 % interval by the paired bootstrap over utterances, pooled over seeds, alone.
        interval: the same, widened by the chance that lies in a seed.
    """

    difference: float
    over_utterances: tuple[float, float]
    interval: tuple[float, float]

    @property
    def found(self) -> str:
        """What can be said: "better", "worse", or "no difference found"."""
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "no difference found"


def difference(technique: Errors, full: Errors, measure: str, seed_deviation: float) -> Difference:
    """Paired bootstrap over utterances, pooled over seeds, and widened by the chance that lies in a seed.

        d* = rate(technique, U*) − rate(full, U*)
        widened: d* + N(0, (s · rate(full))² · (1/n_technique + 1/n_full))

    U* are the test utterances drawn with replacement, the same for both; s is the relative deviation of rates between
    seeds of one technique (see `seed_deviation`). The second term is what a bootstrap over utterances alone leaves
    out: a run with another seed gives another rate on the very same utterances.
    """
    one, other = technique.counts[measure], full.counts[measure]
    drawn = _resampled(one) - _resampled(other)
    deviation = seed_deviation * full.rate(measure) * (1 / len(one) + 1 / len(other)) ** 0.5
    widened = drawn + np.random.default_rng(1).normal(0.0, 1.0, len(drawn)) * deviation
    return Difference(technique.rate(measure) - full.rate(measure), _middle(drawn), _middle(widened))


def seed_deviation(techniques: Sequence[Errors], measure: str) -> float:
    """Standard deviation of the rate between seeds of one technique, relative to its mean; 0 without repeated seeds.

        s² = Σ_techniques Σ_seeds (rate / the technique's mean − 1)² / Σ_techniques (seeds − 1)

    Relative, so that what several seeds tell on one corpus holds on another, where rates are higher or lower.
    """
    rates = [technique.by_seed(measure) for technique in techniques]
    freedom = sum(len(rate) - 1 for rate in rates)
    squares = sum((float(((rate / rate.mean() - 1) ** 2).sum()) for rate in rates if len(rate) > 1), 0.0)
    return (squares / freedom) ** 0.5 if freedom else 0.0


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    """The interval that holds 95 % of what was drawn."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _resampled(counts: np.ndarray) -> np.ndarray:
    """The rate over utterances drawn with replacement, many times; the same draws for every technique."""
    pooled = counts.sum(0)
    draws = np.random.default_rng(0).integers(len(pooled), size=(RESAMPLES, len(pooled)))
    drawn = pooled[draws].sum(1)
    return drawn[:, 0] / drawn[:, 1]
