"""Paired differences of error rates, against what is obvious."""

import numpy as np
import pytest

from mapreuse.study._compare import Errors, difference, seed_deviation

REFERENCES = [f"one two three {number}" for number in range(40)]
"""Forty utterances of four words."""


def wrong(references, every):
    """The first word of every so many utterances left out."""
    return [text.partition(" ")[2] if index % every == 0 else text for index, text in enumerate(references)]


def test_rates_are_pooled_over_seeds_and_utterances():
    errors = Errors.of(REFERENCES, [wrong(REFERENCES, 2), REFERENCES])
    assert errors.rate("wer") == pytest.approx(20 / 320)
    assert errors.by_seed("wer").tolist() == pytest.approx([20 / 160, 0.0])
    characters = 2 * sum(map(len, REFERENCES))
    assert errors.rate("cer") == pytest.approx(20 * len("one ") / characters)
    low, high = errors.interval("wer")
    assert low < errors.rate("wer") < high


def test_the_same_hypotheses_differ_by_nothing():
    errors = Errors.of(REFERENCES, [wrong(REFERENCES, 3)])
    found = difference(errors, errors, "cer", 0.0)
    assert (found.difference, found.interval, found.found) == (0.0, (0.0, 0.0), "no difference found")
    assert found.over_utterances == (0.0, 0.0)


def test_a_great_difference_is_found_and_its_sign_told():
    good, bad = Errors.of(REFERENCES, [wrong(REFERENCES, 20)]), Errors.of(REFERENCES, [wrong(REFERENCES, 2)])
    assert difference(bad, good, "wer", 0.0).found == "worse"
    assert difference(good, bad, "wer", 0.0).found == "better"


def test_pairing_finds_what_two_separate_intervals_overlap_on():
    """One more error in four utterances of forty, where half of all utterances are wrong in both."""
    one = wrong(REFERENCES, 2)
    other = [text if index % 10 != 1 else "" for index, text in enumerate(one)]
    first, second = Errors.of(REFERENCES, [one]), Errors.of(REFERENCES, [other])
    assert first.interval("wer")[1] > second.interval("wer")[0]
    assert difference(second, first, "wer", 0.0).found == "worse"


def test_chance_between_seeds_widens_the_interval_as_stated():
    good, bad = Errors.of(REFERENCES, [wrong(REFERENCES, 4)]), Errors.of(REFERENCES, [wrong(REFERENCES, 3)])
    narrow, wide = (difference(bad, good, "wer", deviation) for deviation in (0.0, 2.0))
    assert wide.difference == narrow.difference
    assert wide.over_utterances == narrow.over_utterances == narrow.interval
    width = wide.interval[1] - wide.interval[0]
    assert width == pytest.approx(2 * 1.96 * 2.0 * 2**0.5 * good.rate("wer"), rel=0.2)
    assert wide.found == "no difference found"


def test_the_deviation_between_seeds_is_that_within_techniques_relative_to_their_rates():
    spread = [
        Errors.of(REFERENCES, [wrong(REFERENCES, 2), wrong(REFERENCES, 4)]),
        Errors.of(REFERENCES, [REFERENCES]),
    ]
    rates = np.array([20 / 160, 10 / 160])
    assert seed_deviation(spread, "wer") == pytest.approx(np.std(rates, ddof=1) / rates.mean())
    assert seed_deviation(spread[1:], "wer") == 0.0


def test_hypotheses_of_another_test_set_are_refused():
    with pytest.raises(ValueError, match="cannot score 39 hypotheses against 40 references"):
        Errors.of(REFERENCES, [REFERENCES[:-1]])
