"""Paired differences of error rates."""

import numpy as np
import pytest
from mapreuse_lab.study._statistics import SeedNoise, difference, holm, seed_noise, significance
from mapreuse_lab.training import Errors

REFERENCES = [f"one two three {number}" for number in range(40)]
"""Forty utterances of four words."""


NONE = SeedNoise(0.0, 0)


def wrong(references, every):
    """The first word of every n-th utterance is missing."""
    return [text.partition(" ")[2] if index % every == 0 else text for index, text in enumerate(references)]


def test_rates_are_pooled_over_seeds_and_utterances():
    errors = Errors.of(REFERENCES, [wrong(REFERENCES, 2), REFERENCES])
    assert errors.rate("wer") == pytest.approx(20 / 320)
    assert errors.by_seed("wer").tolist() == pytest.approx([20 / 160, 0.0])
    assert errors.select([1]).rate("wer") == 0
    characters = 2 * sum(map(len, REFERENCES))
    assert errors.rate("cer") == pytest.approx(20 * len("one ") / characters)
    low, high = errors.interval("wer")
    assert low < errors.rate("wer") < high


def test_equal_hypotheses_have_no_difference():
    errors = Errors.of(REFERENCES, [wrong(REFERENCES, 3)])
    found = difference(errors, errors, "cer", NONE)
    assert (found.difference, found.interval, significance(found.interval)) == (0.0, (0.0, 0.0), "")
    assert found.over_utterances == (0.0, 0.0)


def test_a_large_difference_is_significant_with_its_sign():
    good, bad = Errors.of(REFERENCES, [wrong(REFERENCES, 20)]), Errors.of(REFERENCES, [wrong(REFERENCES, 2)])
    assert significance(difference(bad, good, "wer", NONE).interval) == "worse"
    assert significance(difference(good, bad, "wer", NONE).interval) == "better"


def test_a_paired_difference_can_be_significant_although_the_two_intervals_overlap():
    """Half of the utterances have an error in both; four of forty have one more."""
    one = wrong(REFERENCES, 2)
    other = [text if index % 10 != 1 else "" for index, text in enumerate(one)]
    first, second = Errors.of(REFERENCES, [one]), Errors.of(REFERENCES, [other])
    assert first.interval("wer")[1] > second.interval("wer")[0]
    assert significance(difference(second, first, "wer", NONE).interval) == "worse"


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (1000, 1.962)])
def test_seed_noise_widens_the_interval(freedom, quantile):
    good, bad = Errors.of(REFERENCES, [wrong(REFERENCES, 4)]), Errors.of(REFERENCES, [wrong(REFERENCES, 3)])
    narrow, wide = difference(bad, good, "wer", NONE), difference(bad, good, "wer", SeedNoise(2.0, freedom))
    assert wide.difference == narrow.difference
    assert wide.over_utterances == narrow.over_utterances == narrow.interval
    width = wide.interval[1] - wide.interval[0]
    rates = (good.rate("wer") ** 2 + bad.rate("wer") ** 2) ** 0.5
    assert width == pytest.approx(2 * quantile * 2.0 * rates, rel=0.15)
    assert not significance(wide.interval)


def rated(rates):
    """A technique with these error rates by seed, on a hundred words."""
    counts = np.array([[[round(100 * rate), 100]] for rate in rates])
    return Errors({"wer": counts})


def test_what_a_seed_changes_for_all_techniques_alike_is_no_noise():
    alike = [rated([0.2, 0.3, 0.1]), rated([0.4, 0.6, 0.2])]
    assert seed_noise([alike], "wer").deviation == pytest.approx(0)
    assert seed_noise([alike], "wer").freedom == 2


def test_seed_noise_is_the_residual_of_technique_and_seed():
    """Two techniques, two seeds: relative rates ±0.5 and ∓0.5 leave four residuals of 0.5, one degree of freedom."""
    crossed = [rated([0.3, 0.1]), rated([0.1, 0.3])]
    assert seed_noise([crossed], "wer") == SeedNoise(pytest.approx(1.0), 1)
    assert seed_noise([crossed, crossed], "wer") == SeedNoise(pytest.approx(1.0), 2)
    assert seed_noise([], "wer") == seed_noise([[rated([0.3, 0.1])]], "wer") == SeedNoise(0.0, 0)


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_tests_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
