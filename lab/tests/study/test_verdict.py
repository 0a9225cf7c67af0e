"""Conclusions from small made-up results."""

from mapreuse_lab.study import verdict


def technique(name, kind, cer, seconds, against=None):
    scores = {"cer": cer}
    if against is not None:
        difference = sum(against) / 2
        scores["against_full"] = {"cer": {"difference": difference, "interval": against, "over_utterances": against}}
    return {
        "name": name,
        "title": f"the {name}",
        "kind": kind,
        "scores": {"prompts:en": scores},
        "latency": {T: {"median": time, "spread": 0.01} for T, time in zip(("250", "1000"), seconds, strict=True)},
    }


def results(*techniques):
    full = technique("full", "full", 0.30, (1.0, 1.0))
    return {"preset": "full", "config": {"corpus": "prompts:en"}, "runs": [], "techniques": [full, *techniques]}


def test_the_fastest_technique_is_named_for_each_length_and_maximum_loss():
    sentences = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.005, 0.008)),
            technique("window", "other", 0.33, (0.9, 0.2), (-0.01, 0.07)),
            technique("pool", "other", 0.40, (0.1, 0.1), (0.05, 0.15)),
        )
    )
    assert sentences[0] == (
        "Fastest technique (no significant CER loss): the reuse-2x3 at T = 250 (1.2×); the window at T = 1000 (5.0×)."
    )
    assert sentences[1] == (
        "Fastest technique (CER loss of at most 1 point; CER loss of at most 2 points; CER loss of at most 5 "
        "points): the reuse-2x3 at T = 250 (1.2×), 1000 (2.0×)."
    )
    assert any(sentence.startswith("Each of 3 techniques is compared") for sentence in sentences)


def test_techniques_within_timing_noise_share_a_rank():
    sentences = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.505, 0.52), (-0.01, 0.01)),
            technique("window", "other", 0.30, (0.5, 0.5), (-0.01, 0.01)),
        )
    )
    assert "the window or the reuse-2x3 at T = 250 (2.0×); the window at T = 1000 (2.0×)" in sentences[0]


def test_the_most_accurate_reuse_is_compared_with_techniques_that_dominate_it():
    beaten = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.01)),
            technique("diagonal", "other", 0.29, (0.4, 0.25), (-0.02, 0.01)),
        )
    )
    assert any(
        "the reuse-2x3 (CER 0.0 points lower than full attention). Another technique is at least as accurate and "
        "faster, the diagonal (CER 0.5 points lower): 4.0× against 2.0× at T = 1000." in one
        for one in beaten
    )
    assert any("attention does not improve accuracy" in one for one in beaten)
    unbeaten = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.01)),
            technique("diagonal", "other", 0.50, (0.4, 0.25), (0.1, 0.3)),
        )
    )
    assert any("No other technique is as accurate and as fast: 2.0× at T = 1000." in one for one in unbeaten)
    assert not any("does not improve" in one for one in unbeaten)


def test_pairs_of_layers_have_a_sentence_for_each_interval():
    pair = technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.03))
    pair["scores"]["prompts:en"]["against_full"]["cer"]["over_utterances"] = (-0.005, 0.009)
    (sentence,) = (one for one in verdict(results(pair)) if one.startswith("One map for two layers"))
    assert "over utterances is [−0.5, +0.9]: a loss above 1 point is excluded." in sentence
    assert sentence.endswith("With seed noise, it is [−1.0, +3.0]: a loss above 1 point is possible.")


def test_a_technique_that_has_not_learned_is_named():
    sentences = verdict(results(technique("slots", "other", 0.84, (0.8, 0.5), (0.4, 0.6))))
    assert sentences[-1].startswith("the slots: CER 84.0% at the end of training. It has barely started to learn")


def test_longer_training_has_a_sentence_with_intervals():
    longer = results(technique("diagonal", "other", 0.12, (0.5, 0.5), (0.005, 0.021)))
    longer["techniques"][0]["scores"]["prompts:en"]["cer"] = 0.1
    found = results(technique("diagonal", "other", 0.30, (0.5, 0.5), (-0.01, 0.01))) | {"longer": longer}
    (sentence,) = (one for one in verdict(found) if one.startswith("After longer"))
    assert sentence == (
        "After longer training on more speech, full attention has a CER of 10.0%. Differences from it, in points: "
        "the diagonal +1.3 [+0.5, +2.1], significantly worse."
    )
    (matters,) = (one for one in verdict(found) if "does not improve" in one)
    assert matters.endswith("With longer training, diagonal maps are significantly worse (see below).")
    found["longer"] = results(technique("diagonal", "other", 0.12, (0.5, 0.5), (-0.01, 0.01)))
    assert not any("(see below)" in one for one in verdict(found))


def test_there_is_no_verdict_without_trained_and_timed_techniques():
    empty = results()
    empty["techniques"][0]["latency"] = {}
    assert verdict(empty) == ["No verdict yet: it needs trained techniques and their latencies."]
