import jiwer
import pytest

from mapreuse.speech import evaluate, score
from mapreuse.speech._evaluation import batches_by_length

REFERENCES = ["press one now", "the number is not valid", "goodbye"]
HYPOTHESES = ["press one", "the number is now valid", "good bye"]


def test_rates_are_those_of_jiwer_over_the_whole_set():
    scores = score(REFERENCES, HYPOTHESES)
    assert scores.wer == pytest.approx(jiwer.wer(REFERENCES, HYPOTHESES))
    assert scores.cer == pytest.approx(jiwer.cer(REFERENCES, HYPOTHESES))
    assert (scores.num_utterances, scores.num_words) == (3, 9)


def test_the_interval_holds_the_rate_and_shrinks_with_more_utterances():
    few, many = score(REFERENCES, HYPOTHESES), score(REFERENCES * 30, HYPOTHESES * 30)
    for scores in (few, many):
        low, high = scores.wer_interval
        assert low <= scores.wer <= high
    assert many.wer_interval[1] - many.wer_interval[0] < 0.5 * (few.wer_interval[1] - few.wer_interval[0])
    assert score(REFERENCES, HYPOTHESES) == few


def test_a_perfect_recogniser_scores_zero_and_nothing_cannot_be_scored():
    assert score(REFERENCES, REFERENCES).wer_interval == (0.0, 0.0)
    with pytest.raises(ValueError, match="cannot score 0 hypotheses"):
        score([], [])


def test_batches_hold_every_utterance_once_within_their_budget():
    lengths = [5, 1, 9, 3, 3, 30, 2]
    batches = batches_by_length(lengths, 10)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10 for batch in batches)


def test_the_shipped_recogniser_reaches_the_error_rates_it_claims(baseline, prompts):
    greedy = evaluate(baseline, prompts.test)
    assert greedy.num_utterances == len(prompts.test)
    assert greedy.wer < 0.25
    assert greedy.cer < greedy.wer
    fused = evaluate(baseline, prompts.test, decoder="beam+lm")
    assert fused.wer < min(greedy.wer, 0.15)


def test_error_rates_do_not_depend_on_the_batches(baseline, prompts):
    cuts = list(prompts.dev)
    small, large = (evaluate(baseline, cuts, batch_seconds=seconds) for seconds in (1.0, 100.0))
    assert small.hypotheses == large.hypotheses


def test_an_unknown_decoder_is_refused(baseline, prompts):
    with pytest.raises(ValueError, match="no decoder 'viterbi'; choose one of greedy, beam, beam"):
        evaluate(baseline, prompts.dev, decoder="viterbi")
