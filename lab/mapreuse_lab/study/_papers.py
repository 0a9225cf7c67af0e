"""Published claims beside our figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mapreuse_lab.study._page_tables import NOT_MEASURED, Results, lengths
from mapreuse_lab.study._verdict import by_name, main_corpus, speedup

_ICLR = "Shim, Choi & Sung, ICLR 2022"
_STUDY = "Shim, Choi & Sung, arXiv 2301.12444"


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what is found here.

    Attributes:
        claim: in a sentence.
        source: the paper.
        published: its figure, or the words of its finding.
        ours: ours, with where it comes from.
        differs: in what the two differ, and why.
    """

    claim: str
    source: str
    published: str
    ours: str
    differs: str


def papers(results: Results) -> list[dict[str, str]]:
    """Every claim that the study looks at; what it did not measure says so."""
    return [asdict(claim(results)) for claim in _CLAIMS]


def papers_page(results: Results) -> str:
    """docs/papers.md: the claims as a page in Markdown."""
    machine = results["machine"]
    lines = [
        "# Published claims beside our figures",
        "",
        f"From `{results['command']}` on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; the figures are those of [lab/results/study/full](../lab/results/study/full/report.md). Of the papers, "
        "only the abstracts were read for this page.",
        "",
    ]
    for claim in results["papers"]:
        lines += [
            f"## {claim['claim']}",
            "",
            f"- Where: {claim['source']}",
            f"- Published: {claim['published']}",
            f"- Ours: {claim['ours']}",
            f"- What differs, and why: {claim['differs']}",
            "",
        ]
    return "\n".join(lines)


def _grouping(results: Results) -> Claim:
    corpus = main_corpus(results)
    rows = [t for t in results["techniques"] if t["kind"] in ("full", "reuse") and corpus in t["scores"]]
    found = ", ".join(f"{t['title']} {t['scores'][corpus]['wer']:.1%}" for t in rows)
    return Claim(
        "Groups of layers can share one map without loss of accuracy.",
        _ICLR,
        '"noticeably improved" WER on LibriSpeech dev-other and test-other (abstract)',
        f"WER {found}" if len(rows) > 1 else NOT_MEASURED,
        "Minutes of training on a quarter of an hour of speech here, LibriSpeech there; see the intervals before "
        "reading an order into these numbers.",
    )


def _where(results: Results) -> Claim:
    corpus, techniques = main_corpus(results), by_name(results)
    depth = results["config"]["recipe"]["num_layers"]
    half = depth // 2
    # "1x3,3x1": three layers that compute, then one group of three.
    names = {"lower": f"reuse-{half}x1,1x{depth - half}", "upper": f"reuse-1x{half},{depth - half}x1"}
    cells = {}
    for where, name in names.items():
        scores = techniques.get(name, {}).get("scores", {})
        if corpus in scores:
            cells[where] = f"{where} half shares one map: CER {scores[corpus]['cer']:.1%}"
    return Claim(
        "Maps can be shared as long as what they localise is kept: phonemes in lower layers, language in upper ones.",
        _ICLR,
        "no figure in the abstract",
        "; ".join(cells.values()) if len(cells) == 2 else NOT_MEASURED,
        "Differences so small lie within what another seed makes.",
    )


def _inference(results: Results) -> Claim:
    techniques = by_name(results)
    found = [t for name, t in techniques.items() if name.startswith("reuse-2x") and "latency" in t]
    ours = ", ".join(f"{_faster(results, found[0], T)} at T = {T}" for T in lengths(results)) if found else ""
    return Claim(
        "Reuse makes inference faster.",
        _ICLR,
        "up to 1.96 times as fast, on GPUs (abstract)",
        f"the whole encoder with one map for 2 layers, against our own full core: {ours}" if found else NOT_MEASURED,
        "A CPU here. The baseline is an exact core that is itself several times as fast as the usual one "
        "(see lab/results/speed), and the whole encoder is timed, so that less is left to save.",
    )


def _training(results: Results) -> Claim:
    techniques = by_name(results)
    steps = {name: t["training_step"] for name, t in techniques.items() if "training_step" in t}
    found = []
    for name, title in ((n, techniques[n]["title"]) for n in steps if n.startswith("reuse-") and "partial" not in n):
        saved = [1 - steps[name][batch]["median"] / steps["full"][batch]["median"] for batch in steps["full"]]
        noise = [sum(steps[one][batch]["spread"] for one in (name, "full")) for batch in steps["full"]]
        shown = (f"{share:.0%} ± {spread:.0%}" for share, spread in zip(saved, noise, strict=True))
        found.append(f"{title} {', '.join(shown)}")
    batches = " and ".join(f"T = {b}" if b.isdigit() else b for b in steps["full"]) if "full" in steps else ""
    return Claim(
        "Reuse saves training time.",
        _ICLR,
        "33 % of the training time (abstract)",
        f"time of a step saved ({batches}): {'; '.join(found)}" if found else NOT_MEASURED,
        "Utterances of a few seconds spend little of a step in attention, whatever its kind.",
    )


def _against_others(results: Results) -> Claim:
    corpus, timed = main_corpus(results), lengths(results)
    rows = [t for t in results["techniques"] if t["kind"] in ("reuse", "other") and {"latency"} <= t.keys()]
    equal = [t for t in rows if _no_loss_found(t["scores"].get(corpus, {}))]
    ours = []
    for kind in ("reuse", "other"):
        own = [t for t in equal if t["kind"] == kind]
        if own and timed:
            best = max(own, key=lambda t: speedup(results, t, timed[-1]))
            ours.append(f"{best['title']} {_faster(results, best, timed[-1])}")
    return Claim(
        "On long sequences reuse compares well with other ways to compress self-attention, on CPU and GPU.",
        _STUDY,
        "no figure in the abstract",
        f"the fastest reuse and the fastest other technique whose CER is not found to be worse, at T = {timed[-1]}, "
        f"against our own full core: {', '.join(ours)}"
        if len(ours) > 1
        else NOT_MEASURED,
        "A reusing layer still multiplies a T × T map; windows and fixed maps do not. On a CPU alone.",
    )


def _faster(results: Results, technique: Mapping[str, Any], length: str) -> str:
    """How many times as fast as full, with the spread of both times."""
    spread = technique["latency"][length]["spread"] + by_name(results)["full"]["latency"][length]["spread"]
    return f"{speedup(results, technique, length):.2f}× ± {spread:.0%}"


def _no_loss_found(scores: Mapping[str, Any]) -> bool:
    return "against_full" in scores and scores["against_full"]["cer"]["found"] != "worse"


def _diagonality(results: Results) -> Claim:
    found = results.get("similarity")
    layers = [statistics.mean(heads) for heads in found["diagonality"]] if found else []
    return Claim(
        "Cumulative attention diagonality is higher in upper layers, which look near by.",
        _ICLR,
        "the figures are in plots",
        "mean of the heads, layer by layer: " + ", ".join(f"{value:.2f}" for value in layers)
        if found
        else NOT_MEASURED,
        "About 0.67 is what an even spread gives.",
    )


def _neighbours(results: Results) -> Claim:
    found = results.get("similarity")
    ours = NOT_MEASURED
    if found:
        layers = found["layers"]
        near = [layers[index][index + 1] for index in range(len(layers) - 1)]
        far = [layers[i][j] for i in range(len(layers)) for j in range(i + 2, len(layers))]
        ours = f"neighbours {statistics.mean(near):.2f}, others {statistics.mean(far):.2f} (1 − total variation)"
    return Claim(
        "Neighbouring layers have more similar maps than distant ones.",
        "Bhojanapalli et al., Reuse Transformer, arXiv 2110.06821",
        "similarity is highest between neighbours",
        ours,
        "Each head is compared with the most similar head of the other layer.",
    )


def _phonemes(results: Results) -> Claim:
    found = results.get("phonemes")
    layers = [statistics.mean(heads) for heads in found["same_phoneme"]["full"]] if found else []
    return Claim(
        "Lower layers attend frames of the same or similar phonemes (phoneme attention relationship).",
        _ICLR,
        "shown in lower layers, not in upper ones; the figures are in plots",
        "attention to other frames of the same phoneme, as a multiple of even attention, layer by layer: "
        + ", ".join(f"{value:.2f}" for value in layers)
        if found
        else NOT_MEASURED,
        "The run of frames around the attending one is left out; phoneme times are those of synthetic speech.",
    )


_CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    _grouping,
    _where,
    _inference,
    _training,
    _against_others,
    _diagonality,
    _neighbours,
    _phonemes,
)
