"""Published claims beside the results of the full study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mapreuse.console import Table
from mapreuse_lab.study._statistics import significance
from mapreuse_lab.study._tables import Results, by_name, lengths, main_corpus, speedup

_ICLR = "Shim, Choi & Sung, ICLR 2022"
_STUDY = "Shim, Choi & Sung, arXiv 2301.12444"
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and the result of this study.

    Attributes:
        claim: the claim, in a sentence.
        source: the paper.
        published: figures or words of the paper.
        measured: result of this study; empty if it was not measured.
        differences: how the two settings differ.
    """

    claim: str
    source: str
    published: str
    measured: str
    differences: str


def claims(results: Results) -> list[Claim]:
    """Every claim that the study tests."""
    return [claim(results) for claim in _CLAIMS]


def papers_table(results: Results) -> Table:
    """The claims as a table."""
    header = ["claim", "source", "published", "measured here", "differences"]
    rows = [[c.claim, c.source, c.published, c.measured or _UNMEASURED, c.differences] for c in claims(results)]
    return Table("Published claims", header, rows)


def papers_page(results: Results) -> str:
    """docs/papers.md: the claims as a page in Markdown."""
    machine = results["machine"]
    lines = [
        "# Published claims and our results",
        "",
        f"Measured by `{results['command']}` on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; see the [full study](../lab/results/study/full/report.md). We read only the abstracts "
        "of the papers.",
        "",
    ]
    for claim in claims(results):
        lines += [
            f"## {claim.claim}",
            "",
            f"- Source: {claim.source}",
            f"- Published: {claim.published}",
            f"- Measured here: {claim.measured or _UNMEASURED}",
            f"- Differences: {claim.differences}",
            "",
        ]
    return "\n".join(lines)


def _grouping(results: Results) -> Claim:
    corpus = main_corpus(results)
    rows = [t for t in results["techniques"] if t["kind"] in ("full", "reuse") and corpus in t["scores"]]
    rates = ", ".join(f"{t['title']} {t['scores'][corpus]['wer']:.1%}" for t in rows)
    return Claim(
        "Groups of layers can share one map without loss of accuracy",
        _ICLR,
        '"noticeably improved" WER on LibriSpeech dev-other and test-other (abstract)',
        f"WER: {rates}" if len(rows) > 1 else "",
        "minutes of training on a quarter of an hour of speech here, LibriSpeech there. Consult the 95 % "
        "intervals of the full study before ranking these rates.",
    )


def _halves(results: Results) -> Claim:
    corpus, techniques = main_corpus(results), by_name(results)
    depth = results["config"]["recipe"]["num_layers"]
    half = depth // 2
    # "1x3,3x1": three layers that compute, then one group of three.
    names = {"lower": f"reuse-{half}x1,1x{depth - half}", "upper": f"reuse-1x{half},{depth - half}x1"}
    scores = {where: techniques.get(name, {}).get("scores", {}).get(corpus) for where, name in names.items()}
    rates = [f"{where} half shares one map: CER {one['cer']:.1%}" for where, one in scores.items() if one]
    return Claim(
        "Lower layers localise phonemes, upper layers language; maps can be shared within each",
        _ICLR,
        "no figure in the abstract",
        "; ".join(rates) if len(rates) == 2 else "",
        "seed noise can explain differences of this size.",
    )


def _inference(results: Results) -> Claim:
    pairs = next((t for t in results["techniques"] if t["name"].startswith("reuse-2x")), None)
    speeds = ", ".join(f"{_speedup(results, pairs, T)} at T = {T}" for T in lengths(results)) if pairs else ""
    return Claim(
        "Reuse makes inference faster",
        _ICLR,
        "speed-up of up to 1.96×, on GPUs (abstract)",
        f"whole encoder, one map for 2 layers, speed-up over full attention: {speeds}" if pairs else "",
        "CPU here. The baseline is an exact kernel that is already several times faster than the usual one (see "
        "lab/results/speed), and the whole encoder is timed.",
    )


def _training(results: Results) -> Claim:
    techniques, saved = by_name(results), []
    full = techniques["full"]["training_step"]
    for name, technique in techniques.items():
        if technique["kind"] == "reuse" and "partial" not in name:
            shares = []
            for batch, base in full.items():
                step = technique["training_step"][batch]
                shares.append(f"{1 - step['median'] / base['median']:.0%} ± {step['spread'] + base['spread']:.0%}")
            saved.append(f"{technique['title']} {', '.join(shares)}")
    batches = " and ".join(f"T = {batch}" if batch.isdigit() else batch for batch in full)
    return Claim(
        "Reuse saves training time",
        _ICLR,
        "33 % of the training time (abstract)",
        f"reduction of the time of a training step ({batches}): {'; '.join(saved)}" if saved else "",
        "attention is a small part of a step on utterances of a few seconds.",
    )


def _against_others(results: Results) -> Claim:
    corpus, best = main_corpus(results), []
    last = lengths(results)[-1]
    for kind in ("reuse", "other"):
        lossless = [
            t for t in results["techniques"] if t["kind"] == kind and _is_lossless(t["scores"].get(corpus, {}))
        ]
        if lossless:
            fastest = max(lossless, key=lambda t: speedup(results, t, last))
            best.append(f"{fastest['title']} {_speedup(results, fastest, last)}")
    measured = (
        "fastest reuse technique and fastest other technique with no significant CER loss, speed-up over full "
        f"attention at T = {last}: {', '.join(best)}"
    )
    return Claim(
        "Reuse compares well with other ways to compress self-attention on long sequences, on CPU and GPU",
        _STUDY,
        "no figure in the abstract",
        measured if len(best) > 1 else "",
        "CPU only. A reusing layer still multiplies a T × T map; windows and fixed maps do not.",
    )


def _diagonality(results: Results) -> Claim:
    layers = results["similarity"]["diagonality"] if "similarity" in results else []
    return Claim(
        "Cumulative attention diagonality is higher in upper layers, which attend to nearby frames",
        _ICLR,
        "figures are in plots",
        f"mean over heads, layer by layer: {_means(layers)}" if layers else "",
        "uniform attention has a diagonality of about 0.67.",
    )


def _neighbours(results: Results) -> Claim:
    measured = ""
    if "similarity" in results:
        layers = results["similarity"]["layers"]
        near = [layers[index][index + 1] for index in range(len(layers) - 1)]
        far = [layers[i][j] for i in range(len(layers)) for j in range(i + 2, len(layers))]
        near_mean, far_mean = statistics.mean(near), statistics.mean(far)
        measured = f"neighbouring layers {near_mean:.2f}, other pairs {far_mean:.2f} (1 − total variation)"
    return Claim(
        "Neighbouring layers have more similar maps than distant ones",
        "Bhojanapalli et al., Reuse Transformer, arXiv 2110.06821",
        "similarity is highest between neighbours",
        measured,
        "each head is compared with the most similar head of the other layer.",
    )


def _phonemes(results: Results) -> Claim:
    layers = results["phonemes"]["same_phoneme"]["full"] if "phonemes" in results else []
    measured = f"attention to other frames of the same phoneme, relative to uniform attention: {_means(layers)}"
    return Claim(
        "Lower layers attend to frames of the same or similar phonemes",
        _ICLR,
        "shown in lower layers, not in upper ones; figures are in plots",
        f"{measured} (layer by layer)" if layers else "",
        "a frame's own run of frames is excluded; phoneme times are those of synthetic speech.",
    )


def _means(layers: Iterable[Iterable[float]]) -> str:
    return ", ".join(f"{statistics.mean(heads):.2f}" for heads in layers)


def _speedup(results: Results, technique: Mapping[str, Any], length: str) -> str:
    spread = technique["latency"][length]["spread"] + by_name(results)["full"]["latency"][length]["spread"]
    return f"{speedup(results, technique, length):.2f}× ± {spread:.0%}"


def _is_lossless(scores: Mapping[str, Any]) -> bool:
    return "against_full" in scores and significance(scores["against_full"]["cer"]["interval"]) != "worse"


_CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    _grouping,
    _halves,
    _inference,
    _training,
    _against_others,
    _diagonality,
    _neighbours,
    _phonemes,
)
