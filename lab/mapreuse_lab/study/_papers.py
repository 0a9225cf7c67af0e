"""Published claims beside the results of the full study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mapreuse.console import Table
from mapreuse_lab.study._statistics import significance
from mapreuse_lab.study._tables import Results, by_name, lengths, main_corpus, speedup

_ICLR = "Shim, Choi & Sung, ICLR 2022"
_REUSE_STUDY = "Shim, Choi & Sung, arXiv 2301.12444"


class _Claim(NamedTuple):
    """A claim of a paper.

    Attributes:
        claim: the claim, in a sentence.
        source: the paper.
        published: figures or words of the paper.
        measured: formats the result of this study; empty if it was not measured.
        differences: how the two settings differ.
    """

    claim: str
    source: str
    published: str
    measured: Callable[[Results], str]
    differences: str


def papers_table(results: Results) -> Table:
    """The claims as a table."""
    return Table("Published claims", [name.lower() for name in ("Claim", *_FIELDS)], _rows(results))


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
        "Models trained from scratch in minutes gave these results. For strong models, see",
        "[Techniques on pretrained models](../lab/results/techniques/README.md).",
        "",
    ]
    for claim, *cells in _rows(results):
        items = (f"- {name}: {cell}" for name, cell in zip(_FIELDS, cells, strict=True))
        lines += [f"## {claim}", "", *items, ""]
    return "\n".join(lines)


def _rows(results: Results) -> list[list[str]]:
    return [
        [one.claim, one.source, one.published, one.measured(results) or "not measured", one.differences]
        for one in _CLAIMS
    ]


def _rates(results: Results) -> str:
    corpus = main_corpus(results)
    rows = [t for t in results["techniques"] if t["kind"] in ("full", "reuse") and corpus in t["scores"]]
    rates = ", ".join(f"{t['title']} {t['scores'][corpus]['wer']:.1%}" for t in rows)
    return f"WER: {rates}" if len(rows) > 1 else ""


def _halves(results: Results) -> str:
    corpus, techniques = main_corpus(results), by_name(results)
    depth = results["config"]["recipe"]["num_layers"]
    half = depth // 2
    # "1x3,3x1": three layers that compute, then one group of three.
    names = {"lower": f"reuse-{half}x1,1x{depth - half}", "upper": f"reuse-1x{half},{depth - half}x1"}
    scores = {where: techniques.get(name, {}).get("scores", {}).get(corpus) for where, name in names.items()}
    rates = [f"{where} half shares one map: CER {one['cer']:.1%}" for where, one in scores.items() if one]
    return "; ".join(rates) if len(rates) == 2 else ""


def _inference(results: Results) -> str:
    pairs = next((t for t in results["techniques"] if t["name"].startswith("reuse-2x")), None)
    if pairs is None:
        return ""
    speeds = ", ".join(f"{_speedup(results, pairs, T)} at T = {T}" for T in lengths(results))
    return f"whole encoder, one map for 2 layers, speed-up over full attention: {speeds}"


def _training(results: Results) -> str:
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
    return f"reduction of the time of a training step ({batches}): {'; '.join(saved)}" if saved else ""


def _against_others(results: Results) -> str:
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
    return measured if len(best) > 1 else ""


def _diagonality(results: Results) -> str:
    if "similarity" not in results:
        return ""
    return f"mean over heads, layer by layer: {_means(results['similarity']['diagonality'])}"


def _neighbours(results: Results) -> str:
    if "similarity" not in results:
        return ""
    layers = results["similarity"]["layers"]
    near = statistics.mean(layers[index][index + 1] for index in range(len(layers) - 1))
    far = statistics.mean(layers[i][j] for i in range(len(layers)) for j in range(i + 2, len(layers)))
    return f"neighbouring layers {near:.2f}, other pairs {far:.2f} (1 − total variation)"


def _phonemes(results: Results) -> str:
    if "phonemes" not in results:
        return ""
    means = _means(results["phonemes"]["same_phoneme"]["full"])
    return f"attention to other frames of the same phoneme, relative to uniform attention: {means} (layer by layer)"


def _means(layers: Iterable[Iterable[float]]) -> str:
    return ", ".join(f"{statistics.mean(heads):.2f}" for heads in layers)


def _speedup(results: Results, technique: Mapping[str, Any], length: str) -> str:
    spread = technique["latency"][length]["spread"] + by_name(results)["full"]["latency"][length]["spread"]
    return f"{speedup(results, technique, length):.2f}× ± {spread:.0%}"


def _is_lossless(scores: Mapping[str, Any]) -> bool:
    return "against_full" in scores and significance(scores["against_full"]["cer"]["interval"]) != "worse"


_FIELDS = ("Source", "Published", "Measured here", "Differences")

_CLAIMS = (
    _Claim(
        "Groups of layers can share one map without loss of accuracy",
        _ICLR,
        '"noticeably improved" WER on LibriSpeech dev-other and test-other (abstract)',
        _rates,
        "minutes of training on a quarter of an hour of speech here, LibriSpeech there. Consult the 95 % "
        "intervals of the full study before ranking these rates.",
    ),
    _Claim(
        "Lower layers localise phonemes, upper layers language; maps can be shared within each",
        _ICLR,
        "no figure in the abstract",
        _halves,
        "seed noise can explain differences of this size.",
    ),
    _Claim(
        "Reuse makes inference faster",
        _ICLR,
        "speed-up of up to 1.96×, on GPUs (abstract)",
        _inference,
        "CPU here. The baseline is an exact kernel that is already several times faster than the usual one (see "
        "lab/results/speed), and the whole encoder is timed.",
    ),
    _Claim(
        "Reuse saves training time",
        _ICLR,
        "33 % of the training time (abstract)",
        _training,
        "attention is a small part of a step on utterances of a few seconds.",
    ),
    _Claim(
        "Reuse compares well with other ways to compress self-attention on long sequences, on CPU and GPU",
        _REUSE_STUDY,
        "no figure in the abstract",
        _against_others,
        "CPU only. A reusing layer still multiplies a T × T map; windows and fixed maps do not.",
    ),
    _Claim(
        "Cumulative attention diagonality is higher in upper layers, which attend to nearby frames",
        _ICLR,
        "figures are in plots",
        _diagonality,
        "uniform attention has a diagonality of about 0.67.",
    ),
    _Claim(
        "Neighbouring layers have more similar maps than distant ones",
        "Bhojanapalli et al., Reuse Transformer, arXiv 2110.06821",
        "similarity is highest between neighbours",
        _neighbours,
        "each head is compared with the most similar head of the other layer.",
    ),
    _Claim(
        "Lower layers attend to frames of the same or similar phonemes",
        _ICLR,
        "shown in lower layers, not in upper ones; figures are in plots",
        _phonemes,
        "a frame's own run of frames is excluded; phoneme times are those of synthetic speech.",
    ),
)
