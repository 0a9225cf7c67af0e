"""Generates sentences for synthetic speech."""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from wordfreq import top_n_list, word_frequency

from mapreuse_lab.training._normalise import alphabet, normalise, spell_number

_NUM_WORDS = 5000  # most frequent words of a language

# By language: sentences with slots such as {noun}, and the words for each slot. {number} is a spoken number.
_TEMPLATES = json.loads((Path(__file__).parent / "templates.json").read_text(encoding="utf-8"))

_Sample = Callable[[random.Random], str]


def generate_sentences(
    count: int, language: str, *, seed: int, transcripts: Sequence[str] = (), exclude: Iterable[str] = ()
) -> list[str]:
    """Different normalised sentences: filled templates, numbers, and frequent words in random order.

    The result depends only on the arguments and on the installed version of wordfreq.

    Args:
        count: number of sentences.
        language: en, fr, es, it or ru.
        transcripts: if given, a Markov chain of order two over their words makes 40 % of the sentences.
        exclude: texts that no sentence may contain as a run of whole words, such as dev and test transcripts.

    Raises:
        ValueError: if fewer different sentences than `count` were found.
    """
    generator = random.Random(f"{language}:{seed}")
    excluded = [f" {text} " for text in exclude if text]
    sources = [_templated(language), _numbers(language), _frequent_words(language)]
    if transcripts:
        sources += [_recombined(transcripts)] * 2
    sentences: dict[str, None] = {}
    for _attempt in range(60 * count):
        if len(sentences) == count:
            break
        text = normalise(generator.choice(sources)(generator), language)
        if text and not any(one in f" {text} " for one in excluded):
            sentences.setdefault(text)
    if len(sentences) < count:
        raise ValueError(f"found only {len(sentences)} different sentences in {language!r}, needed {count}")
    return list(sentences)


def _recombined(transcripts: Sequence[str]) -> _Sample:
    following = defaultdict(list)
    for text in transcripts:
        words = ["", "", *text.split(), ""]
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            following[first, second].append(third)

    def sample(generator: random.Random) -> str:
        words = ["", ""]
        while len(words) < 40:
            context = (words[-2], words[-1])
            # Sometimes only the last word counts: this joins phrases of different transcripts.
            if words[-1] and generator.random() < 0.15:
                context = generator.choice([key for key in following if key[1] == words[-1]] or [context])
            word = generator.choice(following[context])
            if not word:
                break
            words.append(word)
        return " ".join(words[2:])

    return sample


def _templated(language: str) -> _Sample:
    templates, words = _TEMPLATES[language]["templates"], _TEMPLATES[language]["words"]

    def sample(generator: random.Random) -> str:
        text = generator.choice(templates)
        while match := re.search(r"\{(\w+)\}", text):
            slot = match[1]
            word = _number(generator, language) if slot == "number" else generator.choice(words[slot])
            text = text[: match.start()] + word + text[match.end() :]
        return text

    return sample


def _number(generator: random.Random, language: str) -> str:
    kind = generator.random()
    if kind < 0.5:
        return spell_number(str(generator.randrange(10)), language)
    if kind < 0.8:
        return spell_number(str(generator.randrange(1000)), language)
    return spell_number("".join(str(generator.randrange(10)) for _ in range(generator.randrange(4, 9))), language)


def _numbers(language: str) -> _Sample:
    def sample(generator: random.Random) -> str:
        return " ".join(_number(generator, language) for _ in range(generator.randrange(1, 5)))

    return sample


def _frequent_words(language: str) -> _Sample:
    """Frequent words in random order, drawn by the square root of their frequency."""
    letters = set(alphabet(language))
    words = [word for word in top_n_list(language, _NUM_WORDS) if set(word) <= letters]
    totals = list(accumulate(math.sqrt(word_frequency(word, language)) for word in words))

    def sample(generator: random.Random) -> str:
        return " ".join(generator.choices(words, cum_weights=totals, k=generator.randrange(2, 9)))

    return sample
