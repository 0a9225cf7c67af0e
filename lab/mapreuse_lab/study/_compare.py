"""Is the difference between two techniques' error rates more than chance?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mapreuse_lab.training import error_counts

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

    def some(self, seeds: Sequence[int]) -> Errors:
        """Of the seeds at these places."""
        return Errors({measure: counts[list(seeds)] for measure, counts in self.counts.items()})

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


@dataclass(frozen=True)
class SeedNoise:
    """How much a rate depends on the seed, beyond what a seed does to all techniques alike.

    Attributes:
        deviation: standard deviation of the rate of a run, relative to its technique's mean.
        freedom: degrees of freedom that it was estimated with; 0 where no technique has two seeds.
    """

    deviation: float
    freedom: int


def difference(technique: Errors, full: Errors, measure: str, noise: SeedNoise) -> Difference:
    """Paired bootstrap over utterances, pooled over the same seeds of both, and widened by the chance in a seed.

        d* = rate(technique, U*) − rate(full, U*)
        widened: d* + t · s · √((rate(technique)² + rate(full)²) / n),    t ~ Student(f)

    U* are the test utterances drawn with replacement, the same for both; n is the number of seeds, s the relative
    deviation of a run and f its degrees of freedom (see `seed_noise`). The second term is what a bootstrap over
    utterances alone leaves out: a run with another seed gives another rate on the very same utterances. It is assumed
    to be as great for every technique as for those with several seeds, and left out where there are none.

    Raises `ValueError` where the two have not as many seeds.
    """
    one, other = technique.counts[measure], full.counts[measure]
    if len(one) != len(other):
        raise ValueError(f"pairs need the same seeds: got {len(one)} and {len(other)}")
    drawn = _resampled(one) - _resampled(other)
    widened = drawn
    if noise.freedom:
        chance = np.random.default_rng(1).standard_t(noise.freedom, len(drawn))
        rates = technique.rate(measure) ** 2 + full.rate(measure) ** 2
        widened = drawn + chance * noise.deviation * (rates / len(one)) ** 0.5
    return Difference(technique.rate(measure) - full.rate(measure), _middle(drawn), _middle(widened))


def seed_noise(corpora: Sequence[Sequence[Errors]], measure: str) -> SeedNoise:
    """From techniques that were trained with the same several seeds, corpus by corpus.

        x = rate / the technique's mean − 1,    s² = Σ (x − the seed's mean x)² / f,    f = Σ_corpora (T − 1)(S − 1)

    for T techniques with S seeds. What a seed does to all of them (easy batches, say) cancels in a difference of the
    same seeds and does not count. Relative, so that what is learned on one corpus holds on another, where rates are
    higher or lower.
    """
    squares, freedom = 0.0, 0
    for techniques in corpora:
        rates = np.stack([technique.by_seed(measure) for technique in techniques])
        relative = rates / rates.mean(1, keepdims=True) - 1
        squares += float(((relative - relative.mean(0)) ** 2).sum())
        freedom += (rates.shape[0] - 1) * (rates.shape[1] - 1)
    return SeedNoise((squares / freedom) ** 0.5 if freedom else 0.0, freedom)


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
