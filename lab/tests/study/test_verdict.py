"""What the verdict says of results that one can judge by eye."""

from mapreuse_lab.study._verdict import verdict


def technique(name, kind, cer, seconds, against=None):
    scores = {"cer": cer}
    if against is not None:
        low, high, found = against
        compared = {"difference": (low + high) / 2, "interval": (low, high), "over_utterances": (low, high)}
        scores["against_full"] = {"cer": compared | {"found": found}}
    return {
        "name": name,
        "title": f"the {name}",
        "kind": kind,
        "scores": {"prompts:en": scores},
        "latency": {T: {"median": time, "spread": 0.01} for T, time in zip(("250", "1000"), seconds, strict=True)},
    }


def results(*techniques):
    full = technique("full", "full", 0.30, (1.0, 1.0))
    return {"config": {"corpus": "prompts:en"}, "runs": [], "techniques": [full, *techniques]}


EQUAL, WORSE = "no difference found", "worse"


def test_the_fastest_is_named_at_every_length_and_with_what_is_excluded_of_it():
    said = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.005, 0.008, EQUAL)),
            technique("window", "other", 0.33, (0.9, 0.2), (-0.01, 0.07, EQUAL)),
            technique("pool", "other", 0.40, (0.1, 0.1), (0.05, 0.15, WORSE)),
        )
    )
    assert said[0] == (
        "Fastest where no loss of CER is found: the reuse-2x3 at T = 250 (1.2×); the window at T = 1000 (5.0×)."
    )
    assert said[1] == (
        "Fastest where a loss of more than 1 point is excluded, and where a loss of more than 2 points is excluded, "
        "and where a loss of more than 5 points is excluded: the reuse-2x3 at T = 250 (1.2×), 1000 (2.0×)."
    )
    assert any(sentence.startswith("3 techniques are compared") for sentence in said)


def test_times_within_their_spreads_share_the_place():
    said = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.505, 0.52), (-0.01, 0.01, EQUAL)),
            technique("window", "other", 0.30, (0.5, 0.5), (-0.01, 0.01, EQUAL)),
        )
    )
    assert "the window or the reuse-2x3 at T = 250 (2.0×); the window at T = 1000 (2.0×)" in said[0]


def test_the_best_reuse_is_set_against_whom_it_meets():
    beaten = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.01, EQUAL)),
            technique("diagonal", "other", 0.29, (0.4, 0.25), (-0.02, 0.01, EQUAL)),
        )
    )
    assert any(
        "the reuse-2x3 (CER 0.0 points lower than full), is beaten by the diagonal (CER 0.5 points lower): "
        "at T = 1000 (4.0× against 2.0×)" in one
        for one in beaten
    )
    assert any("Attention itself is not found to matter" in one for one in beaten)
    unbeaten = verdict(
        results(
            technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.01, EQUAL)),
            technique("diagonal", "other", 0.50, (0.4, 0.25), (0.1, 0.3, WORSE)),
        )
    )
    assert any("No other technique beats the most accurate reuse, the reuse-2x3" in one for one in unbeaten)
    assert not any("Attention itself" in one for one in unbeaten)


def test_no_worse_says_what_each_interval_excludes():
    pair = technique("reuse-2x3", "reuse", 0.30, (0.8, 0.5), (-0.01, 0.03, EQUAL))
    pair["scores"]["prompts:en"]["against_full"]["cer"]["over_utterances"] = (-0.005, 0.009)
    (sentence,) = (one for one in verdict(results(pair)) if one.startswith("One map for two layers"))
    assert "so that it is worse by no more than 1 point; [-1.0, +3.0]" in sentence
    assert sentence.endswith("so that more than 1 point worse is not excluded.")


def test_a_technique_that_has_not_learned_is_named():
    said = verdict(results(technique("slots", "other", 0.84, (0.8, 0.5), (0.4, 0.6, WORSE))))
    assert said[-1].startswith("the slots has hardly begun to transcribe when training ends (CER 84.0%)")


def test_what_longer_training_makes_of_it_is_told_with_its_intervals():
    longer = results(technique("diagonal", "other", 0.12, (0.5, 0.5), (0.005, 0.021, WORSE)))
    longer["techniques"][0]["scores"]["prompts:en"]["cer"] = 0.1
    found = results(technique("diagonal", "other", 0.30, (0.5, 0.5), (-0.01, 0.01, EQUAL))) | {"longer": longer}
    (sentence,) = (one for one in verdict(found) if one.startswith("Trained for longer"))
    assert sentence == (
        "Trained for longer and on more speech, full attention has a CER of 10.0%, and against it, in points: "
        "the diagonal +1.3 [+0.5, +2.1], worse."
    )
    (matters,) = (one for one in verdict(found) if one.startswith("Attention itself"))
    assert matters.endswith("the recogniser does lose by diagonal maps, as is said below.")
    found["longer"] = results(technique("diagonal", "other", 0.12, (0.5, 0.5), (-0.01, 0.01, EQUAL)))
    assert not any("does lose" in one for one in verdict(found))


def test_without_a_trained_or_timed_technique_there_is_no_verdict():
    empty = results()
    empty["techniques"][0]["latency"] = {}
    assert verdict(empty)[0].startswith("No verdict yet")
