"""Reports of both studies: Markdown with PNG plots, and one page of HTML with interactive figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure as Plot
from plotly.graph_objects import Figure

from mapreuse.console import Table
from mapreuse.measure import Image, Section, bench_tables, write_page
from mapreuse_lab.study._figures import (
    breakdown_bars,
    error_against_speed,
    heat_maps,
    learning_curves,
    map_viewer,
    phoneme_maps,
    speedup_by_length,
)
from mapreuse_lab.study._papers import papers_table
from mapreuse_lab.study._plots import plot_error_against_speed, plot_similarity, plot_speedup, plot_stages
from mapreuse_lab.study._results import SCHEMA
from mapreuse_lab.study._tables import (
    Results,
    corpora_table,
    cost_table,
    error_tables,
    latency_by_title,
    lengths,
    longer_table,
    pretrained_table,
    quick_error_table,
    runs_table,
    scored,
    settings_table,
    similarity_table,
    speedup_table,
    study_breakdown_tables,
    summary_table,
)
from mapreuse_lab.study._verdict import verdict
from mapreuse_lab.training import write_whole

_ENCODERS = {
    "recogniser": "Recogniser: speed-up over sdpa",
    "conformer-m": "Conformer-M (16 layers × 256 × 4 heads, random weights): speed-up over sdpa",
}
"""Titles of the latency tables of the quick study."""

_MEASURES = {"Diagonality": "diagonality", "Relative entropy": "entropy"}
"""Heat maps of heads in the full study, and their fields in the results."""

_TITLES = {
    "quick": "Quick study: attention map reuse in trained speech recognisers",
    "full": "Full study: attention map reuse against other techniques",
}


def read_results(directory: Path) -> Results:
    """The results of a study.

    Raises:
        ValueError: if the directory has no `results.json`, or an outdated one.
    """
    file = directory / "results.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: run mapreuse-lab study first")
    results = json.loads(file.read_text(encoding="utf-8"))
    if results.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} has schema {results.get('schema')}; this version reads schema {SCHEMA}. Run the study again"
        )
    return results


def write_results(results: Results, directory: Path) -> None:
    """Write `results.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, ensure_ascii=False, indent=1) + "\n"
    write_whole(directory / "results.json", lambda file: file.write_text(text, encoding="utf-8"))


def write_report(results: Results, directory: Path) -> None:
    """Write `report.md` with its PNG plots, and `report.html`."""
    write_whole(directory / "report.md", lambda file: file.write_text(report(results), encoding="utf-8"))
    for name, plot in _plots(results).items():
        write_whole(directory / name, partial(plot.savefig, dpi=110, format="png"))
    sections = [_for_page(section, directory) for section in report_sections(results)]
    write_whole(directory / "report.html", lambda file: write_page(file, _TITLES[results["preset"]], sections))


def _for_page(section: Section, directory: Path) -> Section:
    """The section without its images if it has interactive figures."""
    interactive = any(isinstance(block, Figure) for block in section.blocks)
    images = [Image(directory / one.path, one.description) for one in section.blocks if isinstance(one, Image)]
    others = [block for block in section.blocks if not isinstance(block, Image)]
    return Section(section.heading, others if interactive else [*others, *images])


def report(results: Results) -> str:
    """The report in Markdown: text, tables and plots, without sections that have nothing but interactive figures."""
    lines = [f"# {_TITLES[results['preset']]}", ""]
    for section in report_sections(results):
        blocks = [block for block in section.blocks if isinstance(block, str | Table | Image)]
        if len(blocks) < len(section.blocks) and all(isinstance(block, str) for block in blocks):
            continue
        lines += [f"## {section.heading}", ""] if section.heading else []
        tables = sum(isinstance(block, Table) for block in blocks)
        for block in blocks:
            if isinstance(block, Table):
                lines += [f"### {block.title}", ""] if tables > 1 else []
                lines += [block.markdown(), "", *(line for note in block.notes for line in (note, ""))]
            else:
                text = f"![{block.description}]({block.path})" if isinstance(block, Image) else block
                lines += [text if section.heading else f"- {text}", ""]
    return "\n".join(lines)


def summary_tables(results: Results) -> list[Table]:
    """The main tables of a report: error rates and speed-ups."""
    if results["preset"] == "full":
        return [summary_table(results)]
    latency = results["latency"]
    pretrained = [pretrained_table(results)] if "pretrained" in results else []
    speedups = [speedup_table(title, latency[name], "sdpa") for name, title in _ENCODERS.items()]
    return [quick_error_table(results), *speedups, *pretrained]


def report_sections(results: Results) -> list[Section]:
    """The report's sections: text, tables, plotly figures for the page, and images for Markdown."""
    return _quick_sections(results) if results["preset"] == "quick" else _full_sections(results)


def _quick_sections(results: Results) -> list[Section]:
    original, latency = results["baseline"], results["latency"]
    similarity, config = results["similarity"], results["config"]
    errors, *speedups = summary_tables(results)[:3]
    figures = [speedup_by_length(latency[n], "sdpa").update_layout(title=t) for n, t in _ENCODERS.items()]
    attention = speedup_table("One layer's attention in Conformer-M", results["attention"], "sdpa")
    return [
        Section("", verdict(results)),
        *([_pretrained(results)] if "pretrained" in results else []),
        Section(
            "Error rates",
            [
                f"Corpus {config['corpus']}: {original['num_utterances']} test utterances, {original['num_words']} "
                f"words. Greedy decoding; 95 % bootstrap intervals over utterances in brackets. By index: converted "
                "without training; each head applies the source head with its own number. Aligned: converted without "
                "training; heads are assigned by map similarity. Recovered: aligned, then "
                f"{config['recovery_seconds']:.0f} s of fine-tuning.",
                errors,
                Image("error.png", "Word error rate of every plan"),
            ],
        ),
        Section(
            "Latency",
            [
                "Speed-up of the encoder, including subsampling, over sdpa, the transformers encoder with fused "
                "attention. Batch 1, float32; medians of interleaved repeats. T counts encoder frames. Rows without "
                '"+optimize" differ from sdpa by the attention kernel and by reuse alone. mapreuse.optimize '
                "also switches convolutions to channels-last and linear layers to oneDNN when a quick benchmark "
                "favours it; it does not depend on reuse.",
                *speedups,
                *figures,
                Image("latency.png", "Speed-up by length"),
                "The attention of a computing and of a reusing layer, including projections, compared with the layer "
                "of transformers (sdpa):",
                attention,
            ],
        ),
        Section(
            "Similarity of attention maps",
            [
                "1 − total variation of two rows, each head compared with its most similar head, over "
                f"{similarity['num_queries']} frames of training utterances.",
                heat_maps({"": (similarity["layers"], "computing layer", "reusing layer")}),
                Image("similarity.png", "Similarity of layers"),
            ],
        ),
        Section("Limits", ["Not measured: GPU latency, peak memory, and error rates of Conformer-M."]),
        _reproduction(results, [results["attribution"]]),
    ]


def _pretrained(results: Results) -> Section:
    config, found = results["config"], results["pretrained"]
    note = (
        "A pretrained recogniser with plans of its encoder, or of its decoder's self-attention, on the same test "
        "utterances. By index, aligned and refitted: converted without training, on training utterances. Recovered: "
        f"refitted, then trained for {config['pretrained_recovery_seconds']:.0f} s to match the original's hidden "
        "states on training utterances with varied speed, level and noise. Choices were made on other utterances."
    )
    full, *others = found["transcription"].items()
    speedups = ", ".join(f"{full[1]['median'] / one['median']:.2f}× with {name}" for name, one in others)
    whole = (
        f"Speed-up of a whole transcription of ten seconds in PyTorch: {speedups}. The tables show the encoder "
        "alone; the decoder, token by token, takes most of the time of a short transcription."
    )
    tables = pretrained_table(results), *bench_tables(found["latency"])
    return Section(f"A pretrained recogniser: {found['model']}", [note, whole, *tables])


def _full_sections(results: Results) -> list[Section]:
    measured = latency_by_title(results)
    titles = [t["title"] for t in results["techniques"] if t["kind"] in ("full", "reuse")]
    speed_note = (
        "Speed-up of the whole encoder over full attention, whose row shows its latency. All techniques, including "
        "full attention, run with mapreuse.optimize. The row sdpa shows the transformers encoder with fused "
        "attention."
    )
    sections = [
        Section("", verdict(results)),
        Section(
            "Accuracy and speed",
            [
                "The recogniser is small, and was trained from scratch for a few minutes on a quarter of an hour of "
                "speech, so the 95 % intervals (in brackets) are wide. Differences compare runs with the same seeds; "
                'their intervals include seed noise. "better" and "worse" mark significant differences. A technique '
                "is on the Pareto front if no other one is at least as good in both CER and latency.",
                summary_table(results),
                *([error_against_speed(results)] if scored(results) else []),
                Image("front.png", "CER against speed-up of every technique"),
            ],
        ),
        Section("Error rates by corpus", error_tables(results)),
    ]
    if "longer" in results:
        blocks = [results["longer"]["description"], longer_table(results)]
        sections.append(Section("Trained longer", blocks))
    figure = speedup_by_length(measured, "full attention", [*titles, *results["references"]])
    table = speedup_table("Speed-up over full attention", measured, "full attention")
    sections.append(Section("Speed-up by length", [speed_note, table, figure]))
    sections.append(Section("Memory, FLOPs and training", [cost_table(results)]))
    if "breakdown" in results:
        bars = [breakdown_bars(entries) for entries in results["breakdown"].values()]
        sections.append(Section("Where the time goes", [*bars, *study_breakdown_tables(results)]))
    if "similarity" in results:
        sections.append(_similarity(results))
    if "phonemes" in results:
        note = (
            "Attention of frames of one phoneme (rows) to frames of another (columns), relative to uniform attention."
        )
        sections.append(Section("Attention between phonemes", [note, phoneme_maps(results["phonemes"])]))
    if "maps" in results:
        heard = [f'{name}: "{one["hypothesis"]}"' for name, one in results["maps"]["techniques"].items()]
        text = f'Utterance {results["maps"]["utterance"]}: "{results["maps"]["transcript"]}". {"; ".join(heard)}.'
        sections.append(Section("Attention maps of one utterance", [text, map_viewer(results["maps"])]))
    sections.append(Section("Learning curves", [learning_curves(results)]))
    sections.append(Section("Published claims", [papers_table(results)]))
    sections.append(_reproduction(results, []))
    sections.append(Section("Corpora and runs", [corpora_table(results), runs_table(results)]))
    return sections


def _similarity(results: Results) -> Section:
    found = results["similarity"]
    panels = {"Similarity": (found["layers"], "computing layer", "reusing layer")}
    for title, field in _MEASURES.items():
        panels[title] = (found[field], "layer", "head")
    note = (
        "Maps of full attention. Similarity of layers: 1 − total variation of two rows, each head compared with its "
        "most similar head. Diagonality: about 0.67 for uniform attention. Relative entropy: 1 for uniform "
        "attention."
    )
    blocks = [note, heat_maps(panels), similarity_table(found), Image("similarity.png", "Similarity")]
    return Section("Similarity of attention maps", blocks)


def _reproduction(results: Results, notes: Sequence[str]) -> Section:
    machine = results["machine"]
    text = (
        f"Made by `{results['command']}` on {machine['processor']} ({machine['instructions']}), {machine['threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}, commit {machine['commit']}."
    )
    tables = settings_table("Machine and versions", machine), settings_table("Settings", results["config"])
    return Section("How to reproduce", [text, *notes, *tables])


def _plots(results: Results) -> dict[str, Plot]:
    """PNG files, by name."""
    if results["preset"] == "quick":
        return {
            "error.png": plot_stages(results),
            "latency.png": plot_speedup(results["latency"]),
            "similarity.png": plot_similarity(results["similarity"]),
        }
    timed = lengths(results)
    plots = {"front.png": plot_error_against_speed(results, "1000" if "1000" in timed else timed[-1])}
    return plots | ({"similarity.png": plot_similarity(results["similarity"])} if "similarity" in results else {})
