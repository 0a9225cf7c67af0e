"""Quality figures with intervals, comparable pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mapreuse_lab.training import Errors, middle_of, resampled_rates

_PERMUTATIONS, _ROUNDING = 10_000, 1e-9


@dataclass(frozen=True)
class Metric:
    """A quality figure of a model on a test set.

        value = f(Σ amounts / Σ units)

    Attributes:
        name: such as "WER" or "perplexity, bible".
        kind: "rate" and "similarity" with f(x) = x, or "perplexity" with f = exp.
        sums: for each test sample, its amount (errors, or negative log-likelihood) and its units (words, or tokens).
    """

    name: str
    kind: Literal["rate", "similarity", "perplexity"]
    sums: Float[np.ndarray, "samples 2"]

    @property
    def value(self) -> float:
        """The figure over all samples."""
        amount, units = self.sums.sum(0)
        return float(self._scaled(amount / units))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over samples."""
        return middle_of(self._resampled())

    def against(self, original: Metric) -> tuple[float, tuple[float, float]]:
        """Value and 95 % interval of the paired bootstrap: the ratio of perplexities, else the difference."""
        drawn, others = self._resampled(), original._resampled()
        if self.kind == "perplexity":
            return self.value / original.value, middle_of(drawn / others)
        return self.value - original.value, middle_of(drawn - others)

    def p_value(self, other: Metric) -> float:
        """Two-sided p-value of the paired permutation test: each sample's two amounts are swapped or not, at random.

            statistic = |Σ ±(aᵢ − bᵢ)|

        for amounts a and b with the same units.
        """
        differences = self.sums[:, 0] - other.sums[:, 0]
        signs = np.random.default_rng(0).integers(2, size=(_PERMUTATIONS, len(differences)), dtype=np.int8) * 2 - 1
        reached = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - _ROUNDING)
        return float((1 + reached.sum()) / (1 + _PERMUTATIONS))

    def text(self) -> str:
        """The value with its interval."""
        return _with_interval(self.value, self.interval, ".1%" if self.kind == "rate" else ".4g")

    def text_against(self, original: Metric) -> str:
        """The comparison with its interval."""
        form = {"rate": "+.1%", "similarity": "+.4f", "perplexity": ".3f"}[self.kind]
        times = "×" if self.kind == "perplexity" else ""
        return times + _with_interval(*self.against(original), form)

    def _resampled(self) -> Float[np.ndarray, " draws"]:
        return self._scaled(resampled_rates(self.sums))

    def _scaled(self, rates: np.ndarray) -> np.ndarray:
        return np.exp(rates) if self.kind == "perplexity" else rates


def error_rate_metrics(references: Sequence[str], hypotheses: Sequence[str]) -> list[Metric]:
    """Word and character error rates of transcripts."""
    counts = Errors.of(references, [hypotheses]).counts
    return [Metric(name.upper(), "rate", one.sum(0)) for name, one in counts.items()]


def _with_interval(value: float, interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
