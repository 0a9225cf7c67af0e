"""The language model: its formula, and that a text is as likely letter by letter as word by word."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapreuse.speech import LanguageModel, alphabet

TEXTS = ["press one", "press two", "press one now", "call one"]
LETTERS = alphabet("en")


@pytest.fixture(scope="module")
def model():
    return LanguageModel.train(TEXTS, LETTERS, "en", num_words=40, fewest=1)


def numbers(text):
    return tuple(LETTERS.index(letter) + 1 for letter in text)


def by_letters(model, text):
    said = (*numbers(text), 0)
    return sum(model.log_probabilities(said[:end])[said[end]] for end in range(len(said)))


def word_log_probability(model, word, history):
    """log p(word | the words before it), the end of a text being the word ""; a text begins with it too."""
    context = tuple(model._number.get(w, -1) if w else 0 for w in history)[-2:]
    return math.log(model._spelt(word, context))


def by_words(model, text):
    words = ["", "", *text.split(), ""]
    return sum(word_log_probability(model, words[end], words[:end]) for end in range(2, len(words)))


@given(st.lists(st.sampled_from(["press", "one", "two", "call", "the", "zebra", "pre", "i'm", "x"]), max_size=5))
def test_letters_add_up_to_words_known_and_unknown(words):
    model = LanguageModel.train(TEXTS, LETTERS, "en", num_words=40, fewest=1)

    assert by_letters(model, " ".join(words)) == pytest.approx(by_words(model, " ".join(words)))


@pytest.mark.parametrize("history", [(), ("press",), ("press", "one"), ("one", "press"), ("zebra", "call")])
def test_after_any_words_the_known_ones_the_end_and_the_unknown_share_probability_one(model, history):
    history = ("", "", *history)
    known = sum(math.exp(word_log_probability(model, word, history)) for word in ["", *model.words])
    letters = sum(0.01 * len(LETTERS) ** -(len(word) + 1) for word in model.words)  # they might be unknown as well

    assert known - letters == pytest.approx(0.99)


def test_smoothing_follows_its_formula(model):
    # After words that were never read nothing but the words themselves count.
    words = {"press": 1, "call": 1, "two": 1, "now": 1, "one": 2}  # how many words each comes after, or begins with
    ends = 3  # of sentences, after one, two and now
    total = sum(words.values()) + ends
    uses = model.frequencies[model.words.index("one")] / model.frequencies.sum()
    alone = (2 - 0.75 + 0.75 * 6 * 0.9 * uses) / total
    found = math.exp(word_log_probability(model, "one", ("zebra", "zebra")))

    assert found == pytest.approx(0.99 * alone, rel=1e-4)


def test_a_prefix_is_as_likely_as_all_words_that_begin_with_it(model):
    after_p = model.log_probabilities(numbers("p"))
    starting = [word for word in model.words if word.startswith("pr")]
    with_p = [word for word in model.words if word.startswith("p")]

    def share(words):
        return sum(
            math.exp(word_log_probability(model, w, ("x", "x"))) - 0.01 * len(LETTERS) ** -(len(w) + 1.0)
            for w in words
        )

    unknown = 0.01 / len(LETTERS)
    expected = (share(starting) + unknown / len(LETTERS)) / (share(with_p) + unknown)
    assert math.exp(after_p[LETTERS.index("r") + 1]) == pytest.approx(expected, rel=1e-4)


def test_only_the_last_two_words_of_a_long_history_count(model):
    long, short = numbers("now now call press one now"), numbers("two press one now")
    assert np.array_equal(model.log_probabilities(long), model.log_probabilities(short))
    assert not np.array_equal(model.log_probabilities(long), model.log_probabilities(numbers("zebra one now")))


def test_words_in_use_are_likelier_than_others_that_were_never_read(model):
    assert word_log_probability(model, "the", ("call",)) > word_log_probability(model, "by", ("call",))
    assert word_log_probability(model, "by", ("call",)) > word_log_probability(model, "zebra", ("call",))


def test_rare_pairs_are_left_out_and_words_never():
    kept = LanguageModel.train([*TEXTS, "press one"], LETTERS, "en", num_words=40, fewest=2).counts
    everything = LanguageModel.train([*TEXTS, "press one"], LETTERS, "en", num_words=40, fewest=1).counts

    assert kept.keys() < everything.keys()
    assert {ngram for ngram in everything if len(ngram) == 1} <= kept.keys()


def test_it_comes_back_from_disk_as_it_was(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    again = LanguageModel.load(tmp_path / "model.safetensors")

    assert again.counts == model.counts
    for text in itertools.chain(TEXTS, ["press", "nowhere"]):
        assert by_letters(again, text) == by_letters(model, text)
