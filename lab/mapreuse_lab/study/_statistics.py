"""Error rates of techniques, and whether their differences are significant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mapreuse_lab.training import Errors, middle_of


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
    drawn = technique.resampled(metric) - full.resampled(metric)
    widened = drawn
    if noise.freedom:
        chance = np.random.default_rng(1).standard_t(noise.freedom, len(drawn))
        rates = technique.rate(metric) ** 2 + full.rate(metric) ** 2
        widened = drawn + chance * noise.deviation * (rates / len(technique.counts[metric])) ** 0.5
    return Difference(technique.rate(metric) - full.rate(metric), middle_of(drawn), middle_of(widened))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for the number of tests, so that the chance of any false finding is at most the level.

        p̃₍ᵢ₎ = min(1, max over j ≤ i of (m − j + 1) p₍ⱼ₎)

    for the m p-values in ascending order (Holm, 1979). The order of the result is that of `p_values`.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected
