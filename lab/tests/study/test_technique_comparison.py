"""Comparison of techniques on a pretrained model: tests, ranking and verdict."""

import numpy as np
import pytest
from mapreuse_lab.models import Metric
from mapreuse_lab.study._technique_comparison import Comparison, amounts_text, verdict_sentence

SAMPLES = 60
FULL = np.full(SAMPLES, 1.0)


def errors(every):
    """Two errors in every n-th sample; the others have one."""
    return np.where(np.arange(SAMPLES) % every == 0, 2.0, 1.0)


def results(speed_ups, **amounts):
    """Results with a WER of 10 % for full attention, by technique; speed-ups at one length."""
    units = np.full(SAMPLES, 10.0)
    rows = {}
    for name, some in {"full": FULL, **amounts}.items():
        name = name.replace("_", "-")
        metric = Metric("WER", "rate", np.stack([some, units], 1))
        stage = {"metrics": {"WER": {"amounts": amounts_text(metric)}}}
        rows[name] = {"title": name, "why not": "", "no training": stage}
    timed = {name: {"median": 1 / speed, "speed-up": {"median": speed}} for name, speed in speed_ups.items()}
    baseline = [{"name": "WER", "kind": "rate", "sums": np.stack([FULL, units], 1).tolist()}]
    return {"techniques": rows, "baseline": baseline, "latency": {"10": {"techniques": timed}}}


def test_the_p_value_of_a_permutation_test_is_the_share_of_sign_patterns_that_reach_the_difference():
    units = np.ones(4)
    one, other = (
        Metric("x", "similarity", np.stack([np.array(a), units], 1)) for a in ([1, 2, 3, 4.0], [0, 0, 0, 0])
    )
    # Of 16 patterns of ±1 ±2 ±3 ±4, only all plus and all minus reach 10.
    assert one.p_value(other) == pytest.approx(2 / 16, abs=0.02)
    assert one.p_value(one) == 1.0


def test_p_values_against_full_attention_and_reuse_are_corrected_for_all_comparisons_of_a_stage():
    speeds = {"full": 1.0, "reuse-2x3": 1.2, "heads-8": 1.3}
    found = Comparison.of(results(speeds, **{"reuse-2x3": errors(7), "heads-8": errors(20)}))
    full, reuse, heads = found.techniques
    assert found.comparisons == {"no training": 3}
    assert (full.p_full, full.p_reuse, reuse.p_reuse) == (None, None, None)
    raw = [reuse.metric.p_value(full.metric), heads.metric.p_value(reuse.metric), heads.metric.p_value(full.metric)]
    assert 0 < raw[0] < raw[1] < raw[2]
    expected = [3 * raw[0], max(3 * raw[0], 2 * raw[1]), max(2 * raw[1], raw[2])]
    assert [reuse.p_full, heads.p_reuse, heads.p_full] == pytest.approx(expected)


def test_the_fastest_technique_with_a_small_loss_is_ranked_first():
    speeds = {"full": 1.0, "reuse-2x3": 1.5, "heads-8": 1.3, "linear": 3.0, "int8": 1.2}
    amounts = {"reuse-2x3": errors(6), "heads-8": errors(10), "linear": errors(1), "int8": FULL}
    ranked = [one.name for one in Comparison.of(results(speeds, **amounts)).ranked()]
    assert ranked == ["reuse-2x3", "heads-8", "int8", "linear"]


def test_the_verdict_names_something_simpler_first():
    speeds = {"full": 1.0, "reuse-2x3": 1.2, "layers-5": 1.3}
    found = verdict_sentence("tiny", results(speeds, **{"reuse-2x3": errors(6), "layers-5": errors(10)}))
    assert found.startswith("**tiny**: something simpler than sharing maps is the best choice: layers-5")
    assert "1.30× at 10 s of speech, with WER 11.0% instead of 10.0%" in found
    assert "sharing maps comes to reuse-2x3" in found


def test_the_verdict_keeps_full_attention_if_nothing_is_faster_and_good():
    speeds = {"full": 1.0, "reuse-2x3": 1.2, "layers-5": 1.01}
    found = verdict_sentence("tiny", results(speeds, **{"reuse-2x3": errors(1), "layers-5": errors(10)}))
    assert "keep full attention, because no faster technique loses 2.0 points of WER or less" in found


def test_there_is_no_verdict_without_quality_or_latency():
    assert "because the quality of each sample was not measured" in verdict_sentence("tiny", results({"full": 1.0}))
    untimed = results({}, **{"heads-8": errors(10)})
    del untimed["latency"]
    assert "because latency was not measured" in verdict_sentence("tiny", untimed)


def test_the_smallest_difference_that_can_be_detected_shrinks_with_more_samples():
    speeds = {"full": 1.0, "heads-8": 1.3}
    small = results(speeds, **{"heads-8": errors(10)})
    large = results(speeds, **{"heads-8": errors(10)})
    units = large["baseline"][0]["sums"] = large["baseline"][0]["sums"] * 4
    stage = large["techniques"]["heads-8"]["no training"]["metrics"]["WER"]
    stage["amounts"] = " ".join([stage["amounts"]] * 4)
    full = large["techniques"]["full"]["no training"]["metrics"]["WER"]
    full["amounts"] = " ".join([full["amounts"]] * 4)
    assert len(units) == 4 * SAMPLES
    one, other = (Comparison.of(some) for some in (small, large))
    ratio = one.detectable(one.ranked()) / other.detectable(other.ranked())
    assert ratio == pytest.approx(2, rel=0.1)
