"""Which technique wins, at which length and within which error budget, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapreuse_lab.study._page_tables import Results, all_runs, front, lengths, loss, points

BUDGETS = (0.01, 0.02, 0.05)
"""Losses of CER, as fractions, for which the fastest technique that excludes a greater one is named."""

ALLOWED = 0.01
"""How much worse than full attention one map for two layers may be, to be called no worse."""

_UNLEARNED = 0.6
"""CER above which a technique has hardly begun to transcribe by the end of training."""

_LONG = 1000
"""Encoder frames from which on the best reuse is set against the others."""


def fronts(results: Results) -> dict[str, list[str]]:
    """For every length: the techniques that none beats on both CER, on the main corpus, and latency."""
    return {length: front(results, length, main_corpus(results), "cer") for length in lengths(results)}


def verdict(results: Results) -> list[str]:
    """The verdict first, then what it rests on; what is not known yet is said."""
    runs = all_runs(results)
    done = sum(run["state"] == "finished" for run in runs)
    sentences = _winners(results) + _without_attention(results) + _against_reuse(results) + _no_worse(results)
    sentences += _longer(results) + _unlearned(results)
    if done < len(runs):
        sentences.append(
            f"{done} of {len(runs)} training runs are finished; what the others would say is not measured."
        )
    return sentences


def summary_table(results: Results) -> list[str]:
    """A row for every technique, by CER: what a README has room for."""
    corpus = main_corpus(results)
    timed = [length for length in lengths(results) if int(length) in (1000, 2000, 8000)]
    rows = [
        "| technique | positions | CER | against full | " + " | ".join(f"T = {length}" for length in timed) + " |",
        "|---|---|---|---|" + "---|" * len(timed),
    ]
    rated = [t for t in results["techniques"] if corpus in t["scores"]]
    for technique in sorted(rated, key=lambda t: t["scores"][corpus]["cer"]):
        scores = technique["scores"][corpus]
        low, high = scores["cer_interval"]
        against = ""
        if "against_full" in scores:
            found = scores["against_full"]["cer"]
            against = f"{100 * found['difference']:+.1f} points, {found['found']}"
        speed = [_speed(results, technique, length) for length in timed]
        seeds = f"{len(scores['seeds'])} seed{'s' * (len(scores['seeds']) > 1)}"
        rate = f"{scores['cer']:.1%} [{low:.1%}, {high:.1%}], {seeds}"
        cells = [technique["title"], technique["positions"], rate, against]
        rows.append(f"| {' | '.join(cells + speed)} |")
    return rows


def _speed(results: Results, technique: Mapping[str, Any], length: str) -> str:
    return f"{speedup(results, technique, length):.2f}× ± {technique['latency'][length]['spread']:.0%}"


def main_corpus(results: Results) -> str:
    """The corpus on which every technique trains."""
    return results["config"]["corpus"]


def speedup(results: Results, technique: Mapping[str, Any], length: str) -> float:
    """How many times as fast as full attention."""
    full = by_name(results)["full"]
    return full["latency"][length]["median"] / technique["latency"][length]["median"]


def by_name(results: Results) -> dict[str, Mapping[str, Any]]:
    """The techniques, by name."""
    return {technique["name"]: technique for technique in results["techniques"]}


def _winners(results: Results) -> list[str]:
    """The fastest technique whose CER is not found to be worse, and the fastest that keep within each budget."""
    judged = _judged(results)
    if not judged or not lengths(results):
        return ["No verdict yet: it needs trained techniques and their latencies."]
    full, others = ([t for t in judged if (t["name"] == "full") is whether] for whether in (True, False))
    against = {t["name"]: _against(results, t)["cer"] for t in others if "against_full" in _scores(results, t)}
    within = {"where no loss of CER is found": [n for n, found in against.items() if found["found"] != "worse"]} | {
        f"where a loss of more than {100 * budget:.0f} point{'s' * (budget > 0.01)} is excluded": [
            name for name, found in against.items() if found["interval"][1] <= budget
        ]
        for budget in BUDGETS
    }
    winners: dict[str, list[str]] = {}
    for words, names in within.items():
        allowed = full + [t for t in others if t["name"] in names]
        winners.setdefault("; ".join(_by_length(results, allowed)), []).append(words)
    return [f"Fastest {', and '.join(words)}: {names}." for names, words in winners.items()] + [
        "Times as fast: the whole encoder, against full attention by the same blocked core; techniques whose times "
        "are as near as their spreads are named together.",
        f"{len(against)} techniques are compared with full attention on {main_corpus(results)}, each by a 95% "
        "interval of its own: about one in twenty would be found to differ by chance.",
    ]


def _without_attention(results: Results) -> list[str]:
    """Where even maps that attend nothing else do no worse, accuracy cannot tell techniques apart."""
    corpus, diagonal = main_corpus(results), by_name(results).get("diagonal")
    if not _judged(results) or diagonal is None or "against_full" not in diagonal["scores"].get(corpus, {}):
        return []
    if _against(results, diagonal)["cer"]["found"] == "worse":
        return []
    return [
        "Attention itself is not found to matter at this size of model, data and training: diagonal maps, by which "
        f"no frame attends to another, have a {_lost(diagonal, corpus)} than full attention with the same seed. So "
        "accuracy here says little about techniques; their cost is what can be told apart."
        + _with_more_training(results)
    ]


def _with_more_training(results: Results) -> str:
    """Whether attention matters to the same recogniser, trained for longer."""
    trained = results.get("longer", {}).get("techniques", [])
    scores: dict[str, Any] = next(
        (t["scores"].get(main_corpus(results), {}) for t in trained if t["name"] == "diagonal"), {}
    )
    if scores.get("against_full", {}).get("cer", {}).get("found") != "worse":
        return ""
    return " Trained for longer and on more speech, the recogniser does lose by diagonal maps, as is said below."


def _by_length(results: Results, techniques: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fastest, with the lengths at which they are: "A at T = 1000 (2.0×), 2000 (2.5×)"."""
    wins: dict[str, list[str]] = {}
    for length in lengths(results):
        best = max(techniques, key=lambda t: speedup(results, t, length))
        equal = [t for t in techniques if t is best or _as_fast(t["latency"][length], best["latency"][length])]
        titles = " or ".join(t["title"] for t in sorted(equal, key=lambda t: -speedup(results, t, length)))
        wins.setdefault(titles, []).append(f"{length} ({speedup(results, best, length):.1f}×)")
    return [f"{titles} at T = {', '.join(at)}" for titles, at in wins.items()]


def _as_fast(one: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether two times are as near as their spreads."""
    return one["median"] <= best["median"] * (1 + one["spread"] + best["spread"])


def _against_reuse(results: Results) -> list[str]:
    """Does the best reuse plan lie on the front, and if it is beaten, by which technique, and by how much?"""
    corpus, sentences = main_corpus(results), []
    judged = [t for t in _judged(results) if "latency" in t]
    reuse = [t for t in judged if t["kind"] in ("reuse", "composed")]
    others = [t for t in judged if t["kind"] == "other"]
    if not reuse or not others or not lengths(results):
        return []
    found: dict[tuple[str, str], list[str]] = {}
    for length in (length for length in lengths(results) if int(length) >= _LONG):
        best = min(reuse, key=lambda t: (loss(t, corpus, "cer"), t["latency"][length]["median"]))
        lost, time = loss(best, corpus, "cer"), best["latency"][length]["median"]
        beating = [t for t in others if loss(t, corpus, "cer") <= lost and t["latency"][length]["median"] <= time]
        winner = max(beating, key=lambda t: speedup(results, t, length)) if beating else None
        ours = f"{best['title']} ({_lost(best, corpus)} than full)"
        theirs = "" if winner is None else f"{winner['title']} ({_lost(winner, corpus)})"
        speeds = "" if winner is None else f"{speedup(results, winner, length):.1f}× against "
        told = f"{length} ({speeds}{speedup(results, best, length):.1f}×)"
        found.setdefault((ours, theirs), []).append(told)
    for (ours, theirs), at in found.items():
        if theirs:
            sentences.append(f"The most accurate reuse, {ours}, is beaten by {theirs}: at T = {', '.join(at)}.")
        else:
            sentences.append(f"No other technique beats the most accurate reuse, {ours}: at T = {', '.join(at)}.")
    return sentences


def _no_worse(results: Results) -> list[str]:
    """Is one map for two layers no worse than full attention by more than a point of CER, in every language?"""
    pairs = next((t for t in results["techniques"] if t["name"].startswith("reuse-2x")), None)
    if pairs is None:
        return []
    sentences = []
    for corpus, scores in pairs["scores"].items():
        if "against_full" not in scores:
            continue
        found = scores["against_full"]["cer"]
        (low, high), (lowest, highest) = found["over_utterances"], found["interval"]
        sentences.append(
            f"One map for two layers on {corpus}: CER {100 * found['difference']:+.1f} points against full, "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] by the paired bootstrap over utterances, so that "
            f"{_within(low, high)}; [{100 * lowest:+.1f}, {100 * highest:+.1f}] with the chance that lies in a seed, "
            f"so that {_within(lowest, highest)}."
        )
    return sentences


def _lost(technique: Mapping[str, Any], corpus: str) -> str:
    lost = 100 * loss(technique, corpus, "cer")
    return f"CER {abs(lost):.1f} points {'higher' if lost > 0 else 'lower'}"


def _longer(results: Results) -> list[str]:
    """What the same techniques come to with more training and more speech."""
    corpus = main_corpus(results)
    trained = [t for t in results.get("longer", {}).get("techniques", []) if corpus in t["scores"]]
    full = next((t for t in trained if t["name"] == "full"), None)
    others = [t for t in trained if "against_full" in t["scores"][corpus]]
    if full is None or not others:
        return []
    told = []
    for one in others:
        found = one["scores"][corpus]["against_full"]["cer"]
        low, high = (points(end) for end in found["interval"])
        told.append(f"{one['title']} {points(found['difference'])} [{low}, {high}], {found['found']}")
    return [
        "Trained for longer and on more speech, full attention has a CER of "
        f"{full['scores'][corpus]['cer']:.1%}, and against it, in points: {'; '.join(told)}."
    ]


def _unlearned(results: Results) -> list[str]:
    """Techniques that training ended too early for, of which error rates say little."""
    corpus = main_corpus(results)
    early = [t for t in _judged(results) if t["scores"][corpus]["cer"] > _UNLEARNED]
    return [
        f"{t['title']} has hardly begun to transcribe when training ends (CER {t['scores'][corpus]['cer']:.1%}): "
        "what it could do with more is not known."
        for t in early
    ]


def _within(low: float, high: float) -> str:
    """What an interval of the difference says of being no worse by more than `ALLOWED`."""
    point = f"{100 * ALLOWED:.0f} point"
    if high <= ALLOWED:
        return f"it is worse by no more than {point}"
    return f"it is worse by more than {point}" if low > ALLOWED else f"more than {point} worse is not excluded"


def _judged(results: Results) -> list[Mapping[str, Any]]:
    """The techniques whose CER is known, beside that of full attention."""
    corpus = main_corpus(results)
    judged = [t for t in results["techniques"] if corpus in t["scores"]]
    return judged if any(t["name"] == "full" for t in judged) else []


def _scores(results: Results, technique: Mapping[str, Any]) -> Mapping[str, Any]:
    return technique["scores"][main_corpus(results)]


def _against(results: Results, technique: Mapping[str, Any]) -> Mapping[str, Any]:
    return _scores(results, technique)["against_full"]
