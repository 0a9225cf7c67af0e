"""Conclusions of the studies, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapreuse_lab.study._statistics import significance
from mapreuse_lab.study._tables import (
    Results,
    all_runs,
    by_name,
    cer_loss,
    interval,
    lengths,
    main_corpus,
    plural,
    points,
    rate,
    scored,
    speedup,
)

BUDGETS = (0.01, 0.02, 0.05)
"""Losses of CER, as fractions, for which the fastest technique is named."""

_MAX_LOSS = 0.01
"""Loss of CER, as a fraction, that sharing maps by pairs of layers is tested for."""

_MIN_UNTRAINED_CER = 0.6
"""CER above which a technique has barely started to learn."""

_MIN_LONG_LENGTH = 1000
"""Minimum encoder frames at which the best reuse is compared with the other techniques."""


def verdict(results: Results) -> list[str]:
    """Conclusions of a study; the main one first."""
    return _quick_verdict(results) if results["preset"] == "quick" else _full_verdict(results)


def _full_verdict(results: Results) -> list[str]:
    if not scored(results) or not lengths(results):
        return ["No verdict yet: it needs trained techniques and their latencies."]
    sentences = [
        *(*_without_attention(results), *_fastest(results), *_best_reuse(results), *_pairs(results)),
        *(*_longer(results), *_untrained(results)),
    ]
    runs = all_runs(results)
    finished = sum(run["state"] == "finished" for run in runs)
    if finished < len(runs):
        sentences.append(f"{finished} of {len(runs)} training runs are finished; results of the others are missing.")
    return sentences


def _quick_verdict(results: Results) -> list[str]:
    """Error rates of each plan, then speed-ups at the greatest length."""
    original, seconds = results["baseline"], results["config"]["recovery_seconds"]
    rates = [f"{rate(variant['recovered'], 'wer')} with {variant['name']}" for variant in results["variants"]]
    length, timed = list(results["latency"]["conformer-m"].items())[-1]
    base = timed["sdpa"]["median"]
    speeds = [f"{name} {base / one['median']:.1f}×" for name, one in timed.items() if name != "sdpa"]
    return [
        *(_pretrained(results) if "pretrained" in results else []),
        f"The small recogniser of the lab has a WER of {original['wer']:.1%}. After conversion and {seconds:.0f} s "
        f"of recovery: {'; '.join(rates)}.",
        f"Speed-up of Conformer-M over sdpa at T = {length}: {'; '.join(speeds)}.",
    ]


def _pretrained(results: Results) -> list[str]:
    """Error rates of the pretrained recogniser under the plan that was recovered."""
    found = results["pretrained"]
    plan, stages = next((plan, one) for plan, one in found["quality"].items() if "recovered" in one)
    wer = {stage: f"{metrics['WER']['value']:.1%}" for stage, metrics in stages.items()}
    (difference, ends), seconds = (
        stages["recovered"]["WER"]["against"],
        results["config"]["pretrained_recovery_seconds"],
    )
    return [
        f"{found['model']}, a pretrained recogniser, has a WER of {wer['original']}. With plan {plan} in its encoder "
        f"it has {wer['by index']} by index, {wer['refitted']} after alignment and refit, and {wer['recovered']} "
        f"after {seconds:.0f} s of recovery: {points(difference)} points {interval(ends, points)} against the "
        "original."
    ]


def _fastest(results: Results) -> list[str]:
    """The fastest technique without significant loss, and within each budget."""
    corpus, compared = main_corpus(results), _compared(results)
    full = [t for t in scored(results) if t["name"] == "full"]
    intervals = {t["name"]: t["scores"][corpus]["against_full"]["cer"]["interval"] for t in compared}
    allowed = {"no significant CER loss": [t for t in compared if significance(intervals[t["name"]]) != "worse"]}
    for budget in BUDGETS:
        within = [t for t in compared if intervals[t["name"]][1] <= budget]
        allowed[f"CER loss of at most {plural(round(100 * budget), 'point')}"] = within
    winners: dict[str, list[str]] = {}
    for condition, techniques in allowed.items():
        winners.setdefault("; ".join(_fastest_by_length(results, full + techniques)), []).append(condition)
    return [f"Fastest technique ({'; '.join(conditions)}): {names}." for names, conditions in winners.items()] + [
        "× is the speed-up of the whole encoder over full attention with the same exact kernel. Techniques within "
        "timing noise of each other share a rank. A loss is at most N points if the 95 % interval of the CER "
        "difference ends at or below N.",
        f"Each of {len(compared)} techniques is compared with full attention on {corpus} by its own 95 % interval. "
        "About one in twenty would differ by chance.",
    ]


def _fastest_by_length(results: Results, techniques: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fastest techniques, with the lengths at which they win: "A at T = 1000 (2.0×), 2000 (2.5×)"."""
    wins: dict[str, list[str]] = {}
    for length in lengths(results):
        best = min(techniques, key=lambda t: t["latency"][length]["median"])
        fastest = best["latency"][length]
        equal = []  # within timing noise of the fastest
        for technique in sorted(techniques, key=lambda t: t["latency"][length]["median"]):
            one = technique["latency"][length]
            if one["median"] <= fastest["median"] * (1 + one["spread"] + fastest["spread"]):
                equal.append(technique)
        titles = " or ".join(t["title"] for t in equal)
        wins.setdefault(titles, []).append(f"{length} ({speedup(results, best, length):.1f}×)")
    return [f"{titles} at T = {', '.join(at)}" for titles, at in wins.items()]


def _without_attention(results: Results) -> list[str]:
    """If maps without any attention to other frames are no worse, accuracy cannot rank techniques."""
    corpus, diagonal = main_corpus(results), by_name(results).get("diagonal")
    if diagonal is None or _significance(diagonal, corpus) in (None, "worse"):
        return []
    sentence = (
        "At this size of model, data and training, attention does not improve accuracy: diagonal maps, in which no "
        f"frame attends to another, have a {_loss(diagonal, corpus)} than full attention with the same seed. Compare "
        "the techniques by their cost; their accuracy says little here."
    )
    trained = {t["name"]: t for t in results.get("longer", {}).get("techniques", [])}
    if "diagonal" in trained and _significance(trained["diagonal"], corpus) == "worse":
        sentence += " With longer training, diagonal maps are significantly worse (see below)."
    return [sentence]


def _best_reuse(results: Results) -> list[str]:
    """Whether another technique is at least as accurate and as fast as the most accurate reuse."""
    corpus, compared = main_corpus(results), _compared(results)
    reuse = [t for t in compared if t["kind"] in ("reuse", "composed")]
    others = [t for t in compared if t["kind"] == "other"]
    if not reuse or not others:
        return []
    found: dict[str, list[str]] = {}
    for length in (length for length in lengths(results) if int(length) >= _MIN_LONG_LENGTH):
        best = min(reuse, key=lambda t: (cer_loss(t, corpus), t["latency"][length]["median"]))
        loss, seconds = cer_loss(best, corpus), best["latency"][length]["median"]
        better = [t for t in others if cer_loss(t, corpus) <= loss and t["latency"][length]["median"] <= seconds]
        sentences = (
            f"The most accurate reuse technique is {best['title']} ({_loss(best, corpus)} than full attention). "
        )
        speeds = f"{speedup(results, best, length):.1f}× at T = {length}"
        if better:
            other = min(better, key=lambda t: t["latency"][length]["median"])
            sentences += (
                f"Another technique is at least as accurate and faster, {other['title']} ({_loss(other, corpus)})"
            )
            speeds = f"{speedup(results, other, length):.1f}× against {speeds}"
        else:
            sentences += "No other technique is as accurate and as fast"
        found.setdefault(sentences, []).append(speeds)
    return [f"{sentences}: {', '.join(speeds)}." for sentences, speeds in found.items()]


def _pairs(results: Results) -> list[str]:
    """Whether a CER loss above `_MAX_LOSS` is excluded when pairs of layers share a map, for each corpus."""
    pairs = next((t for t in results["techniques"] if t["name"].startswith("reuse-2x")), None)
    sentences = []
    for corpus, scores in ({} if pairs is None else pairs["scores"]).items():
        if "against_full" in scores:
            found = scores["against_full"]["cer"]
            narrow, wide = found["over_utterances"], found["interval"]
            sentences.append(
                f"One map for two layers changes the CER on {corpus} by {points(found['difference'])} points. The "
                f"95 % interval over utterances is {interval(narrow, points)}: {_excluded(narrow)}. With seed noise, "
                f"it is {interval(wide, points)}: {_excluded(wide)}."
            )
    return sentences


def _excluded(ends: Sequence[float]) -> str:
    loss = f"a loss above {plural(round(100 * _MAX_LOSS), 'point')} is"
    return (
        f"{loss} excluded" if ends[1] <= _MAX_LOSS else f"{loss} {'certain' if ends[0] > _MAX_LOSS else 'possible'}"
    )


def _longer(results: Results) -> list[str]:
    """Differences after longer training."""
    corpus = main_corpus(results)
    trained = {t["name"]: t for t in results.get("longer", {}).get("techniques", []) if corpus in t["scores"]}
    differences = []
    for technique in trained.values():
        outcome = _significance(technique, corpus)
        if outcome is not None:
            found = technique["scores"][corpus]["against_full"]["cer"]
            text = f"{technique['title']} {points(found['difference'])} {interval(found['interval'], points)}"
            differences.append(f"{text}, significantly {outcome}" if outcome else text)
    if not differences:
        return []
    cer = trained["full"]["scores"][corpus]["cer"]
    return [
        f"After longer training on more speech, full attention has a CER of {cer:.1%}. Differences from it, in "
        f"points: {'; '.join(differences)}."
    ]


def _untrained(results: Results) -> list[str]:
    """Techniques for which training ended too early."""
    corpus = main_corpus(results)
    return [
        f"{t['title']}: CER {t['scores'][corpus]['cer']:.1%} at the end of training. It has barely started to learn; "
        "its final accuracy is unknown."
        for t in scored(results)
        if t["scores"][corpus]["cer"] > _MIN_UNTRAINED_CER
    ]


def _compared(results: Results) -> list[dict[str, Any]]:
    """Techniques with a difference to full attention on the main corpus."""
    corpus = main_corpus(results)
    return [t for t in scored(results) if "against_full" in t["scores"][corpus]]


def _significance(technique: Mapping[str, Any], corpus: str) -> str | None:
    """ "better", "worse" or "" (no significant difference) in CER; None if it is not compared with full attention."""
    found = technique["scores"].get(corpus, {}).get("against_full")
    return None if found is None else significance(found["cer"]["interval"])


def _loss(technique: Mapping[str, Any], corpus: str) -> str:
    loss = 100 * cer_loss(technique, corpus)
    return f"CER {abs(loss):.1f} points {'higher' if loss > 0 else 'lower'}"
