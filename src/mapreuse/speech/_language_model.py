from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load_file, save_file

_BITS = 6
_LENGTH_AT = 56  # above the nine outputs of the longest n-gram
_DISCOUNT = 0.75


class NgramModel:
    """A character n-gram model with interpolated Kneser–Ney smoothing, over the recogniser's outputs.

        p(c | h) = (max(n(h c) − D, 0) + D · kinds(h) · p(c | h')) / n(h)

    where h' is h without its first character, n(h) the sum of n(h c) over c, kinds(h) how many c follow h, D = 0.75,
    and p(c | h') below the empty history is uniform. For the longest histories, and those that begin a sentence,
    n(h c) is how often h c occurs; for the others in how many contexts, that is after how many different
    characters. Output 0 stands for both ends of a sentence. Kneser and Ney, "Improved backing-off for m-gram
    language modeling", 1995.
    """

    def __init__(self, counts: dict[tuple[int, ...], int], num_outputs: int, order: int):
        self.counts = counts
        self.num_outputs = num_outputs
        self.order = order
        self._continuations: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for ngram, count in counts.items():
            self._continuations[ngram[:-1]].append((ngram[-1], count))
        self._cache: dict[tuple[int, ...], ndarray] = {}

    @classmethod
    def train(
        cls, sentences: Iterable[Sequence[int]], num_outputs: int, *, order: int, max_entries: int = 60_000
    ) -> "NgramModel":
        """Counts the n-grams, n ≤ `order`, of sentences of output numbers; keeps the `max_entries` most frequent.

        Raises `ValueError` for an order or a number of outputs that the stored form cannot hold (9, 63).
        """
        if not 1 <= order <= 9 or num_outputs >= 1 << _BITS:
            raise ValueError(
                f"order must be 1 to 9 and outputs at most {(1 << _BITS) - 1}: got {order}, {num_outputs}"
            )
        occurrences: Counter[tuple[int, ...]] = Counter()
        for sentence in sentences:
            padded = (0,) * (order - 1) + tuple(sentence) + (0,)
            for end in range(order, len(padded) + 1):
                occurrences.update(padded[end - length : end] for length in range(1, order + 1))
        contexts = Counter(ngram[1:] for ngram in occurrences if len(ngram) > 1)
        counts = {
            ngram: count if len(ngram) == order or ngram[0] == 0 else contexts[ngram]
            for ngram, count in occurrences.items()
        }
        # Ties go to shorter n-grams: what is dropped first are the longest that occurred once.
        kept = sorted(counts, key=lambda ngram: (-occurrences[ngram], len(ngram), ngram))[:max_entries]
        return cls({ngram: counts[ngram] for ngram in kept}, num_outputs, order)

    def log_probabilities(self, history: tuple[int, ...]) -> Float[ndarray, "outputs"]:
        """Log-probabilities of every output after `history` (output 0: the end), whose last `order` − 1 count."""
        padded = (0,) * (self.order - 1) + history
        context = padded[len(padded) - self.order + 1 :]
        found = self._cache.get(context)
        if found is None:
            found = self._cache[context] = np.log(self._probabilities(context))
        return found

    def _probabilities(self, context: tuple[int, ...]) -> ndarray:
        uniform = np.full(self.num_outputs, 1 / self.num_outputs)
        lower = self._probabilities(context[1:]) if context else uniform
        continuations = self._continuations.get(context)
        if not continuations:
            return lower
        numbers, counts = (np.array(column) for column in zip(*continuations, strict=True))
        probabilities = _DISCOUNT * len(numbers) * lower
        probabilities[numbers] += counts - _DISCOUNT
        return probabilities / counts.sum()

    def save(self, path: str | Path) -> None:
        """Writes the counts as safetensors: every n-gram packed into one integer, six bits an output."""
        keys = [sum(number << _BITS * place for place, number in enumerate(ngram)) for ngram in self.counts]
        keys = [key | len(ngram) << _LENGTH_AT for key, ngram in zip(keys, self.counts, strict=True)]
        tensors = {
            "ngrams": torch.tensor(keys, dtype=torch.int64),
            "counts": torch.tensor(list(self.counts.values()), dtype=torch.int32),
            "shape": torch.tensor([self.num_outputs, self.order]),
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> "NgramModel":
        """The model `save` wrote; raises `ValueError` or `SafetensorError` for another file."""
        tensors = load_file(path)
        num_outputs, order = tensors["shape"].tolist()
        mask = (1 << _BITS) - 1
        counts = {
            tuple(key >> _BITS * place & mask for place in range(key >> _LENGTH_AT)): count
            for key, count in zip(tensors["ngrams"].tolist(), tensors["counts"].tolist(), strict=True)
        }
        return cls(counts, num_outputs, order)
