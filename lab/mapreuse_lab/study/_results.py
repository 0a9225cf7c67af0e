"""Results of the full study as one dictionary; docs/results_format.md documents its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mapreuse.console import command_line
from mapreuse.measure import machine
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._costs import REFERENCES
from mapreuse_lab.study._runs import Run, RunDirectory
from mapreuse_lab.study._statistics import SeedNoise, difference, seed_noise
from mapreuse_lab.study._tables import Results
from mapreuse_lab.techniques import Full, Reuse, Technique
from mapreuse_lab.training import Corpus, Errors

SCHEMA = 4
"""Version of the results' format."""

METRICS = ("wer", "cer")

_PooledErrors = tuple[list[int], Errors]  # seeds, and the errors of their runs


def study_results(
    config: FullConfig,
    techniques: Sequence[Technique],
    runs: Sequence[Run],
    longer: Sequence[Run],
    directory: RunDirectory,
    corpora: Mapping[str, Corpus],
    measured: Mapping[str, Any],
    *,
    searched: Technique | None = None,
) -> Results:
    """The results of finished runs and of measurements on this machine.

    Args:
        config: settings of the study.
        techniques: all techniques.
        runs: all runs with the standard recipe.
        longer: runs with the longer recipe, which are compared with each other.
        directory: where the results of the runs are.
        corpora: the corpora, by name.
        measured: costs and findings, by field. Findings that are missing are left out.
        searched: the technique whose plan was found by the search.
    """
    scores = _scores(runs, directory)
    fields = ("similarity", "maps", "phonemes", "breakdown")
    return {
        "schema": SCHEMA,
        "preset": "full",
        "command": command_line("mapreuse-lab"),
        "machine": machine(),
        "config": asdict(config),
        "corpora": {name: _corpus(corpus) for name, corpus in corpora.items()},
        "techniques": [
            _technique(technique, scores.get(technique.name, {}), config, measured, technique is searched)
            for technique in techniques
        ],
        "runs": [_run(run, directory) for run in runs],
        **({"longer": _longer(config, longer, techniques, directory)} if longer else {}),
        "references": {name: _costs(name, measured) for name in REFERENCES},
        **{name: measured[name] for name in fields if name in measured},
    }


def _longer(
    config: FullConfig, runs: Sequence[Run], techniques: Sequence[Technique], directory: RunDirectory
) -> dict[str, Any]:
    scores, names = _scores(runs, directory), {run.technique for run in runs}
    return {
        "description": config.longer_recipe.description,
        "techniques": [
            {"name": one.name, "title": one.title, "kind": _kind(one), "scores": scores.get(one.name, {})}
            for one in techniques
            if one.name in names
        ],
        "runs": [_run(run, directory) for run in runs],
    }


def _scores(runs: Sequence[Run], directory: RunDirectory) -> dict[str, dict[str, dict[str, Any]]]:
    """By technique and corpus: error rates over the seeds of finished runs, and differences to full attention."""
    finished = {run: result for run in runs if (result := directory.finished(run)) is not None}
    errors: dict[str, dict[str, _PooledErrors]] = {}
    for corpus in dict.fromkeys(run.corpus for run in finished):
        here = sorted((run for run in finished if run.corpus == corpus), key=lambda run: run.seed)
        for technique in dict.fromkeys(run.technique for run in here):
            own = [run for run in here if run.technique == technique]
            references = finished[own[0]]["test"]["references"]
            pooled = Errors.of(references, [finished[run]["test"]["hypotheses"] for run in own])
            errors.setdefault(corpus, {})[technique] = [run.seed for run in own], pooled
    noise = {metric: _noise(errors, metric) for metric in METRICS}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for corpus, of_corpus in errors.items():
        for technique, (seeds, pooled) in of_corpus.items():
            entry: dict[str, Any] = {"seeds": seeds}
            for metric in METRICS:
                entry[metric] = pooled.rate(metric)
                entry[f"{metric}_interval"] = pooled.interval(metric)
                entry[f"{metric}_by_seed"] = pooled.by_seed(metric).tolist()
            if technique != "full" and "full" in of_corpus:
                common, one, full = _same_seeds(of_corpus[technique], of_corpus["full"])
                if common:
                    compared = {metric: asdict(difference(one, full, metric, noise[metric])) for metric in METRICS}
                    entry["against_full"] = {"seeds": common} | compared
            scores.setdefault(technique, {})[corpus] = entry
    return scores


def _noise(errors: Mapping[str, Mapping[str, _PooledErrors]], metric: str) -> SeedNoise:
    """Seed noise of the techniques that have the same seeds as full attention, if it has several."""
    blocks = []
    for of_corpus in errors.values():
        seeds, _ = of_corpus.get("full", ([], None))
        if len(seeds) > 1:
            blocks.append([pooled for own, pooled in of_corpus.values() if own == seeds])
    return seed_noise(blocks, metric)


def _same_seeds(technique: _PooledErrors, full: _PooledErrors) -> tuple[list[int], Errors, Errors]:
    """The seeds that both have, and the errors of those runs."""
    common = [seed for seed in technique[0] if seed in full[0]]
    own, other = (errors.select([seeds.index(seed) for seed in common]) for seeds, errors in (technique, full))
    return common, own, other


def _technique(
    technique: Technique, scores: Mapping[str, Any], config: FullConfig, measured: Mapping[str, Any], searched: bool
) -> dict[str, Any]:
    model = config.recipe.create("en", technique.name, 0).model
    return {
        "name": technique.name,
        "title": technique.title + (", searched" if searched else ""),
        "source": technique.source,
        "positions": technique.positions,
        "kind": _kind(technique),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scores": dict(scores),
        **_costs(technique.name, measured),
    }


def _kind(technique: Technique) -> str:
    if isinstance(technique, Full):
        return "full"
    if isinstance(technique, Reuse):
        return "reuse"
    return "composed" if "+reuse-" in technique.name else "other"


def _costs(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of one contestant; without memory if that was not measured."""
    costs: dict[str, Any] = {
        "latency": {length: by_name[name] for length, by_name in measured["latency"].items()},
        "training_step": {batch: by_name[name] for batch, by_name in measured["training"].items()},
        "flops": measured["flops"][name],
    }
    return costs | ({"memory": measured["memory"][name]} if name in measured["memory"] else {})


def _corpus(corpus: Corpus) -> dict[str, Any]:
    test = list(corpus.test)
    return {
        "attribution": corpus.attribution,
        "language": corpus.language,
        "test_utterances": len(test),
        "test_words": sum(len(cut.supervisions[0].text.split()) for cut in test),
        "train_minutes": round(sum((cut.duration for cut in corpus.train), 0.0) / 60, 1),
    }


def _run(run: Run, directory: RunDirectory) -> dict[str, Any]:
    entry = {"key": run.key, "technique": run.technique, "corpus": run.corpus, "seed": run.seed}
    if result := directory.finished(run):
        here = {name: result["machine"][name] for name in ("commit", "processor", "instructions")}
        kept = {name: result[name] for name in ("steps", "seconds", "learning_curve", "finished")}
        return entry | {"state": "finished"} | here | kept
    if failure := directory.failed(run):
        return entry | {"state": "failed", "error": failure["error"]}
    return entry | {"state": "not run"}
