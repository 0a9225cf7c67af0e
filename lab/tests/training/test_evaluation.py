import re

import jiwer
import pytest
from mapreuse_lab.training import BASELINE, evaluate
from mapreuse_lab.training._evaluation import error_rates

PAGE = BASELINE / "README.md"
REFERENCES = ["press one now", "the number is not valid", "goodbye"]
HYPOTHESES = ["press one", "the number is now valid", "good bye"]


def test_error_rates_equal_those_of_jiwer():
    scores = error_rates(REFERENCES, HYPOTHESES)
    assert scores.wer == pytest.approx(jiwer.wer(REFERENCES, HYPOTHESES))
    assert scores.cer == pytest.approx(jiwer.cer(REFERENCES, HYPOTHESES))
    assert (scores.num_utterances, scores.num_words) == (3, 9)


def test_the_interval_contains_the_rate_and_shrinks_with_more_utterances():
    few, many = error_rates(REFERENCES, HYPOTHESES), error_rates(REFERENCES * 30, HYPOTHESES * 30)
    for scores in (few, many):
        low, high = scores.wer_interval
        assert low <= scores.wer <= high
    assert many.wer_interval[1] - many.wer_interval[0] < 0.5 * (few.wer_interval[1] - few.wer_interval[0])
    assert error_rates(REFERENCES, HYPOTHESES) == few


def test_perfect_hypotheses_have_no_errors_and_an_empty_set_is_refused():
    assert error_rates(REFERENCES, REFERENCES).wer_interval == (0.0, 0.0)
    with pytest.raises(ValueError, match="cannot score 0 hypotheses"):
        error_rates([], [])


def test_the_shipped_recogniser_has_the_error_rates_of_its_page(baseline, prompts):
    scores = evaluate(baseline, prompts.test)
    assert scores.num_utterances == len(prompts.test)
    assert stated(r"test \| 54 \| 752", 2) == pytest.approx((scores.wer, scores.cer), abs=0.01)
    trained = [f" {cut.supervisions[0].text} " for cut in prompts.train]
    pairs = zip(scores.references, scores.hypotheses, strict=True)
    others = [pair for pair in pairs if not any(f" {pair[0]} " in text for text in trained)]
    assert len(others) == 47
    assert stated("training transcript .* 714", 1) == pytest.approx(
        (error_rates(*zip(*others, strict=True)).wer,), abs=0.01
    )


def stated(row, count):
    """The first error rates of a row of the page's table, as fractions."""
    (line,) = re.findall(rf"\| .*{row} \|(.*)", PAGE.read_text())
    return tuple(float(rate) / 100 for rate in re.findall(r"([\d.]+) %", line)[:count])


def test_an_empty_split_is_refused_with_a_way_out(baseline):
    with pytest.raises(ValueError, match=r"this split of the corpus is empty; .* \(--split all\)"):
        evaluate(baseline, [])
