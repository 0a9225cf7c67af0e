"""Sentences for synthetic speech: always other sentences than those the error rates are measured on."""

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

_MOST_FREQUENT = 5000

Source = Callable[[random.Random], str]

# Telephone sentences with slots, and the words that fill them; the slot {number} is filled by a spoken number.
_TEMPLATES = json.loads((Path(__file__).parent / "templates.json").read_text(encoding="utf-8"))


def generate_sentences(
    count: int, language: str, *, seed: int, transcripts: Sequence[str] = (), exclude: Iterable[str] = ()
) -> list[str]:
    """`count` different normalised sentences to synthesise, the same for the same arguments and the same wordfreq.

    A third recombines the given training `transcripts` (a Markov chain of order two over their words); the others
    are telephone templates, numbers and frequent words in any order. A sentence that contains any of `exclude` (the dev and test transcripts) as a run of whole
    words is dropped.

    Raises `ValueError` if so many different sentences cannot be made.
    """
    generator = random.Random(f"{language}:{seed}")
    banned = [f" {text} " for text in exclude if text]
    sources = [_templated(language), _numbers(language), _frequent_words(language)]
    if transcripts:
        chain = _recombined(transcripts)
        sources += [chain] * max(2, len(sources) // 2)
    texts: dict[str, None] = {}
    for _attempt in range(60 * count):
        if len(texts) == count:
            break
        text = normalise(generator.choice(sources)(generator), language)
        if text and not any(held_out in f" {text} " for held_out in banned):
            texts.setdefault(text)
    if len(texts) < count:
        raise ValueError(f"only {len(texts)} different sentences could be made in {language!r}, {count} wanted")
    return list(texts)


def _recombined(transcripts: Sequence[str]) -> Source:
    following = defaultdict(list)
    for text in transcripts:
        words = ["", "", *text.split(), ""]
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            following[first, second].append(third)

    def sample(generator: random.Random) -> str:
        words = ["", ""]
        while len(words) < 40:
            # Leaving the order-two context now and then joins phrases that never met.
            context = (words[-2], words[-1])
            if words[-1] and generator.random() < 0.15:
                context = generator.choice([key for key in following if key[1] == words[-1]] or [context])
            word = generator.choice(following[context])
            if not word:
                break
            words.append(word)
        return " ".join(words[2:])

    return sample


def _templated(language: str) -> Source:
    def sample(generator: random.Random) -> str:
        text = generator.choice(_TEMPLATES[language]["templates"])
        while match := re.search(r"\{(\w+)\}", text):
            kind = match.group(1)
            filling = (
                _number(generator, language)
                if kind == "number"
                else generator.choice(_TEMPLATES[language]["words"][kind])
            )
            text = text[: match.start()] + filling + text[match.end() :]
        return text

    return sample


def _number(generator: random.Random, language: str) -> str:
    kind = generator.random()
    if kind < 0.5:
        return spell_number(str(generator.randrange(10)), language)
    if kind < 0.8:
        return spell_number(str(generator.randrange(1000)), language)
    return spell_number("".join(str(generator.randrange(10)) for _ in range(generator.randrange(4, 9))), language)


def _numbers(language: str) -> Source:
    def sample(generator: random.Random) -> str:
        return " ".join(_number(generator, language) for _ in range(generator.randrange(1, 5)))

    return sample


def _frequent_words(language: str) -> Source:
    """Words in any order, so that none is known by its neighbours; rare ones more often than they are used."""
    letters = set(alphabet(language))
    words = [word for word in top_n_list(language, _MOST_FREQUENT) if set(word) <= letters]
    totals = list(accumulate(math.sqrt(word_frequency(word, language)) for word in words))

    def sample(generator: random.Random) -> str:
        return " ".join(generator.choices(words, cum_weights=totals, k=generator.randrange(2, 9)))

    return sample
