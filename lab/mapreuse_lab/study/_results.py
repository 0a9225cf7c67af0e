"""The full study's results in one dictionary, `results.json`: see docs/results_format.md for what its fields mean."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mapreuse.measure import machine
from mapreuse_lab.study._compare import Errors, SeedNoise, difference, seed_noise
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._costs import REFERENCE
from mapreuse_lab.study._markdown import markdown
from mapreuse_lab.study._page import page
from mapreuse_lab.study._page_tables import Results
from mapreuse_lab.study._papers import papers
from mapreuse_lab.study._runs import Recipe, Run, RunDirectory
from mapreuse_lab.study._verdict import fronts, verdict
from mapreuse_lab.techniques import Full, Reuse, Technique
from mapreuse_lab.training import Corpus, write_whole

MEASURES = ("wer", "cer")

_COMMAND = "mapreuse-lab study --preset full"


def study_results(
    config: FullConfig,
    techniques: Sequence[Technique],
    runs: Sequence[Run],
    directory: RunDirectory,
    corpora: Mapping[str, Corpus],
    measured: Mapping[str, Any],
    *,
    longer: Sequence[Run] = (),
    searched: Technique | None = None,
) -> Results:
    """All that is known, from the results of finished runs and from what was measured here; the rest is absent.

    `longer` are the runs by the longer recipe, which are compared with one another; `searched` is the one of the
    techniques that the search found, and its title says so.
    """
    scores = _scores(_finished(runs, directory))
    results: Results = {
        "schema": 2,
        "preset": "full",
        "command": _command(config),
        "commands": _commands(config),
        "machine": machine(),
        "config": asdict(config),
        "corpora": {name: _corpus(corpus) for name, corpus in corpora.items()},
        "techniques": [
            _technique(technique, scores.get(technique.name, {}), config, measured) for technique in techniques
        ],
        "runs": [_run(run, directory) for run in runs],
    }
    if longer:
        results["longer"] = _longer(longer, techniques, directory)
    for entry in results["techniques"]:
        if searched is not None and entry["name"] == searched.name:
            entry["title"] += ", searched"
    if "latency" in measured:
        results["reference"] = _costs(REFERENCE, measured)
    for name in ("similarity", "maps", "phonemes", "breakdown"):
        if name in measured:
            results[name] = measured[name]
    results["fronts"] = fronts(results)
    results["papers"] = papers(results)
    results["verdict"] = verdict(results)
    return results


def write_full(results: Results, out_dir: Path) -> None:
    """Write `results.json`, `report.md` and `report.html`, each whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {
        "results.json": json.dumps(results, ensure_ascii=False, indent=1) + "\n",
        "report.md": markdown(results),
        "report.html": page(results),
    }
    for name, text in files.items():
        write_whole(out_dir / name, partial(Path.write_text, data=text, encoding="utf-8"))


def _finished(runs: Sequence[Run], directory: RunDirectory) -> dict[Run, dict[str, Any]]:
    return {run: result for run in runs if (result := directory.finished(run)) is not None}


def _longer(runs: Sequence[Run], techniques: Sequence[Technique], directory: RunDirectory) -> dict[str, Any]:
    scores = _scores(_finished(runs, directory))
    named = {run.technique for run in runs}
    return {
        "techniques": [
            {"name": one.name, "title": one.title, "kind": _kind(one), "scores": scores.get(one.name, {})}
            for one in techniques
            if one.name in named
        ],
        "runs": [_run(run, directory) for run in runs],
    }


def _scores(finished: Mapping[Run, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By technique and corpus: error rates, pooled over seeds, and their difference to full attention's."""
    errors: dict[str, dict[str, tuple[list[int], Errors]]] = {}
    for corpus in dict.fromkeys(run.corpus for run in finished):
        here = sorted((run for run in finished if run.corpus == corpus), key=lambda run: run.seed)
        for technique in dict.fromkeys(run.technique for run in here):
            own = [run for run in here if run.technique == technique]
            references = finished[own[0]]["test"]["references"]
            said = [finished[run]["test"]["hypotheses"] for run in own]
            errors.setdefault(corpus, {})[technique] = [run.seed for run in own], Errors.of(references, said)
    noise = {measure: _noise(errors, measure) for measure in MEASURES}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for corpus, of_corpus in errors.items():
        for technique, (seeds, pooled) in of_corpus.items():
            entry: dict[str, Any] = {"seeds": seeds}
            for measure in MEASURES:
                entry[measure] = pooled.rate(measure)
                entry[f"{measure}_interval"] = pooled.interval(measure)
                entry[f"{measure}_by_seed"] = pooled.by_seed(measure).tolist()
            if technique != "full" and "full" in of_corpus:
                common, one, full = _same_seeds(of_corpus[technique], of_corpus["full"])
                if common:
                    against: dict[str, Any] = {"seeds": common}
                    for measure in MEASURES:
                        found = difference(one, full, measure, noise[measure])
                        against[measure] = asdict(found) | {"found": found.found}
                    entry["against_full"] = against
            scores.setdefault(technique, {})[corpus] = entry
    return scores


def _noise(errors: Mapping[str, Mapping[str, tuple[list[int], Errors]]], measure: str) -> SeedNoise:
    """From the techniques that have the same several seeds as full attention has."""
    blocks = []
    for of_corpus in errors.values():
        seeds, _ = of_corpus.get("full", ([], None))
        if len(seeds) > 1:
            blocks.append([pooled for own, pooled in of_corpus.values() if own == seeds])
    return seed_noise(blocks, measure)


def _same_seeds(
    technique: tuple[list[int], Errors], full: tuple[list[int], Errors]
) -> tuple[list[int], Errors, Errors]:
    """The seeds that both were trained with, and the errors of those alone."""
    common = [seed for seed in technique[0] if seed in full[0]]
    own, other = (errors.some([seeds.index(seed) for seed in common]) for seeds, errors in (technique, full))
    return common, own, other


def _technique(
    technique: Technique, scores: Mapping[str, Any], config: FullConfig, measured: Mapping[str, Any]
) -> dict[str, Any]:
    entry = {
        "name": technique.name,
        "title": technique.title,
        "source": technique.source,
        "positions": technique.positions,
        "kind": _kind(technique),
        "parameters": _parameters(technique, config),
        "scores": dict(scores),
    }
    return entry | (_costs(technique.name, measured) if "latency" in measured else {})


def _kind(technique: Technique) -> str:
    if isinstance(technique, Full):
        return "full"
    if isinstance(technique, Reuse):
        return "reuse"
    return "composed" if "+reuse-" in technique.name else "other"


def _parameters(technique: Technique, config: FullConfig) -> int:
    model = config.recipe.create("en", technique.name, 0).model
    return sum(parameter.numel() for parameter in model.parameters())


def _costs(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What one contestant costs; `training_step` by what the step is of."""
    costs: dict[str, Any] = {
        "latency": {frames: by_name[name] for frames, by_name in measured["latency"].items()},
        "training_step": {batch: by_name[name] for batch, by_name in measured["training"].items()},
        "flops": {measured["flops_length"]: measured["flops"][name]},
    }
    if name in measured["memory"]:
        costs["memory"] = {measured["memory_length"]: measured["memory"][name]}
    return costs


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
        kept = {name: result[name] for name in ("steps", "seconds", "learning_curve", "finished")}
        where = {name: result["machine"][name] for name in ("commit", "processor", "instructions")}
        return entry | {"state": "finished"} | where | kept
    if failure := directory.failed(run):
        return entry | {"state": "failed", "error": failure["error"]}
    return entry | {"state": "not run"}


def _command(config: FullConfig) -> str:
    """The command line of this study, options that differ from their defaults included."""
    options = {
        "--corpus": (config.corpus, FullConfig.corpus),
        "--other-corpus": (config.other_corpus, FullConfig.other_corpus),
        "--steps": (str(config.recipe.steps), str(Recipe.steps)),
        "--device": (config.device, FullConfig.device),
    }
    words = [word for name, (value, usual) in options.items() if value != usual for word in (name, value)]
    return shlex.join([*_COMMAND.split(), *words])


def _commands(config: FullConfig) -> list[str]:
    command = _command(config)
    commands = [
        f"{command} --workers 2   # the same, where it is set up; stops and goes on at any time",
        f"{command} --training-only   # a further worker, here or where lab/results/study/full is shared",
    ]
    if config.device != "cuda":
        commands += [f"{command} --device cuda --out lab/results/study/full-cuda   # with a GPU"]
    if command != _COMMAND:
        return commands
    librispeech = f"{command} --corpus librispeech:DIR --steps 100000 --out lab/results/study/full-librispeech"
    return ["make full-study", *commands, librispeech]
