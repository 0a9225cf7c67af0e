import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load_file, save_file
from wordfreq import top_n_list, word_frequency

_ORDER = 3
_DISCOUNT = 0.75
_FEWEST = 4  # occurrences of an n-gram of two words and more that is kept
_MOST = 65_535  # occurrences that are told apart in a file
_UNKNOWN = 0.01  # probability that a word is none of the vocabulary
_END = 0.1  # probability, before any text was read, that a sentence is over
_SPACES = -10.0  # log-probability of a space where no word has begun
_AFTER_ALL_LETTERS = chr(0x10FFFF)


class LanguageModel:
    """A trigram model of words, spelt out letter by letter, for the beam search over characters.

    With V the words known, an interpolated Kneser-Ney model (1995) over word histories h,

        p(w | h) = (max(n(h w) − D, 0) + D · kinds(h) · p(w | h')) / n(h),    D = 0.75,

    where h' is h without its first word, n(h) the sum of n(h w), kinds(h) how many w follow h; n(h w) is how often
    h w occurs for the longest histories and those that begin a sentence, and after how many words for the others.
    Below the empty history stands how often a word is used in the language at large, w ∈ V. A word is unknown with
    probability 0.01, and its letters and end then are equally likely. While a word is spelt, a prefix is as likely
    as all words that begin with it, under the empty history; what that differs from p(w | h) is made good when the
    word ends, so that the log-probabilities of a text's outputs sum to that of its words.
    """

    def __init__(
        self,
        characters: Sequence[str],
        words: Sequence[str],
        frequencies: Sequence[float] | ndarray,
        counts: dict[tuple[int, ...], int],
    ):
        """`characters` are the recogniser's outputs 1, 2, ...; word number i + 1 of `counts` is `words[i]`, whose
        frequency is `frequencies[i]`; number 0 begins and ends a sentence."""
        self.characters = list(characters)
        self.words = list(words)
        self.frequencies = np.asarray(frequencies, dtype=np.float32)
        self.counts = counts
        self._number = {word: number for number, word in enumerate(self.words, start=1)}
        self._totals: dict[tuple[int, ...], int] = defaultdict(int)
        self._kinds: dict[tuple[int, ...], int] = defaultdict(int)
        for ngram, count in counts.items():
            self._totals[ngram[:-1]] += count
            self._kinds[ngram[:-1]] += 1
        share = self.frequencies.astype(np.float64)
        self._base = np.concatenate([[_END], (1 - _END) * share / share.sum()])
        self._alphabetical = sorted(self.words)
        single = [self._probability(self._number[word], ()) for word in self._alphabetical]
        self._cumulated = [0.0, *accumulate(single)]
        self._space = self.characters.index(" ") + 1
        self._cache: dict[tuple[int, ...], ndarray] = {}
        self._spellings: dict[str, tuple[float, ndarray]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        characters: Sequence[str],
        language: str,
        *,
        num_words: int = 20_000,
        fewest: int = _FEWEST,
    ) -> "LanguageModel":
        """Learns from normalised texts, and from the `num_words` most used words of the language (wordfreq).

        N-grams of two words and more that occur less than `fewest` times are left out.
        """
        sentences = [text.split() for text in texts]
        letters = set(characters)
        common = [word for word in top_n_list(language, num_words) if set(word) <= letters]
        words = list(dict.fromkeys([*common, *(word for sentence in sentences for word in sentence)]))
        rarest = word_frequency(common[-1], language)
        frequencies = [word_frequency(word, language) or rarest for word in words]
        number = {word: index for index, word in enumerate(words, start=1)}
        occurrences: Counter[tuple[int, ...]] = Counter()
        for sentence in sentences:
            padded = (*[0] * (_ORDER - 1), *(number[word] for word in sentence), 0)
            for end in range(_ORDER, len(padded) + 1):
                occurrences.update(padded[end - length : end] for length in range(1, _ORDER + 1))
        kept = [ngram for ngram, count in occurrences.items() if len(ngram) == 1 or count >= fewest]
        contexts = Counter(ngram[1:] for ngram in occurrences if len(ngram) > 1)
        counts = {
            ngram: contexts[ngram] if len(ngram) == 1 or (len(ngram) < _ORDER and ngram[0]) else occurrences[ngram]
            for ngram in kept
        }
        return cls(characters, words, frequencies, counts)

    def log_probabilities(self, history: tuple[int, ...]) -> Float[ndarray, "outputs"]:
        """Of every output after `history`, outputs from the beginning of a text; output 0 is the end of the text.

        Only the last two words of the history and the word that is being spelt count.
        """
        start, spaces = len(history), 0
        while start and spaces < _ORDER:
            start -= 1
            spaces += history[start] == self._space
        key = history[start + (spaces == _ORDER) :] if spaces == _ORDER else (0, *history)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._outputs(key)
        return found

    def _outputs(self, key: tuple[int, ...]) -> ndarray:
        begins = key[:1] == (0,)
        text = "".join(self.characters[number - 1] for number in key if number)
        *before, partial = text.split(" ")
        history = (*[0] * (_ORDER - 1 if begins else 0), *(self._number.get(w, -1) for w in before if w))
        context = history[-(_ORDER - 1) :]
        spelt, letters = self._letters(partial)
        outputs = letters.copy()
        word = math.log(self._spelt(partial, context)) - spelt if partial else 0.0
        after = (*context, self._number.get(partial, -1))[-(_ORDER - 1) :] if partial else context
        outputs[0] = word + math.log(self._spelt("", after))
        outputs[self._space] = word if partial else _SPACES
        return outputs

    def _letters(self, partial: str) -> tuple[float, ndarray]:
        """log p that a word begins so, and what every output as its next letter adds, whatever came before."""
        found = self._spellings.get(partial)
        if found is None:
            spelt = math.log(self._prefix(partial))
            after = [math.log(self._prefix(partial + letter)) - spelt for letter in self.characters]
            found = self._spellings[partial] = spelt, np.array([0.0, *after])
        return found

    def _spelt(self, word: str, context: tuple[int, ...]) -> float:
        """p(word | context), unknown words by their letters; the end of the text is the word ""."""
        unknown = _UNKNOWN * len(self.characters) ** -(len(word) + 1.0) if word else 0.0
        number = self._number.get(word) if word else 0
        return unknown + ((1 - _UNKNOWN) * self._probability(number, context) if number is not None else 0.0)

    def _prefix(self, partial: str) -> float:
        """Probability that a word begins so, whatever came before."""
        first = bisect_left(self._alphabetical, partial)
        last = bisect_left(self._alphabetical, partial + _AFTER_ALL_LETTERS)
        known = self._cumulated[last] - self._cumulated[first] if partial else 1.0
        return (1 - _UNKNOWN) * known + _UNKNOWN * float(len(self.characters)) ** -len(partial)

    def _probability(self, number: int, context: tuple[int, ...]) -> float:
        total = self._totals.get(context, 0)
        lower = self._probability(number, context[1:]) if context else float(self._base[number])
        if not total:
            return lower
        count = self.counts.get((*context, number), 0)
        return (max(count - _DISCOUNT, 0.0) + _DISCOUNT * self._kinds[context] * lower) / total

    def save(self, path: str | Path) -> None:
        """Writes the words with their frequencies, and the counts, as safetensors."""
        ngrams = [(*ngram, *[-1] * (_ORDER - len(ngram))) for ngram in self.counts]
        tensors = {
            "characters": _bytes("".join(self.characters)),
            "words": _bytes(" ".join(self.words)),
            "frequencies": torch.from_numpy(self.frequencies),
            "ngrams": torch.tensor(ngrams, dtype=torch.int32 if len(self.words) >= 1 << 15 else torch.int16),
            "counts": torch.tensor(list(self.counts.values())).clamp(max=_MOST).to(torch.uint16),
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> "LanguageModel":
        """The model `save` wrote; raises `KeyError`, `ValueError` or `SafetensorError` for another file."""
        tensors = load_file(path)
        counts = {
            tuple(number for number in ngram if number >= 0): count
            for ngram, count in zip(tensors["ngrams"].tolist(), tensors["counts"].tolist(), strict=True)
        }
        return cls(
            list(_text(tensors["characters"])),
            _text(tensors["words"]).split(" "),
            tensors["frequencies"].numpy(),
            counts,
        )


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()
