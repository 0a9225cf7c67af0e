"""Share modes on SmolLM2-135M: quality, prefill and decoding; results in lab/results/language/.

    python lab/experiments/language.py search 1024
    python lab/experiments/language.py quality 512
    python lab/experiments/language.py quality 2048
    python lab/experiments/language.py corrected 512
    python lab/experiments/language.py prefill 4096
    python lab/experiments/language.py decoding 8192
    python lab/experiments/language.py             # write the page from keys.json

Every plan of keys has the same keys, window and block. Beside it stands a plan whose reusing layers attend to as many
recent keys instead. `search` chooses 15 layers that read keys, on calibration texts alone, and writes search.json;
the other commands then have its plan too. `corrected` compares share modes "corrected" and "map" after a refit. Rows
in keys.json are not measured again. Speed is that of one thread; run these alone on the machine.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import LanguageModel, essays, text_windows, token_losses
from mapreuse_lab.training import cache_dir
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.conversion import PlanEvaluator, ShareModeHeuristic
from mapreuse.measure import machine, time_interleaved

FILE = Path(__file__).parent.parent / "results/language/keys.json"
SETTINGS = {"keys": 128, "window": 64, "block": 16}
GROUPS = ("1x10,2x10", "1x2,2x14")
FOUND, SEARCHED = FILE.with_name("search.json"), "15 readers by search"
NUM_READERS, BREADTH = 15, 2
NUM_COMPARED, NUM_EVALUATED = 4, 1
"""Windows of calibration text on which a search compares keys, and on which it evaluates plans."""
GOALS = {"perplexity": 0.02, "copying": 0.05}
CALIBRATION_TOKENS = 12 * 512
SPEED = ("prefill", "decoding")
NO_ATTENTION = "attention that costs nothing"
RECENT = {"keys": 1, "window": SETTINGS["keys"] + SETTINGS["window"] - 1, "block": SETTINGS["block"]}
"""A window of as many keys; one more key is published, because a plan needs one."""


def plans() -> dict[str, mr.ReusePlan]:
    """The plans by their names."""
    found = {groups: mr.ReusePlan.parse(groups, share="keys", **SETTINGS) for groups in GROUPS}
    if FOUND.exists():
        found[SEARCHED] = mr.ReusePlan.from_json(json.dumps(json.loads(FOUND.read_text())["plan"]))
    return found | {f"{groups}, recent keys": mr.ReusePlan.parse(groups, share="keys", **RECENT) for groups in GROUPS}


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        commands = {"search": _search, "quality": _quality, "corrected": _corrected}
        commands |= {"prefill": _prefill, "decoding": _decoding}
        commands[sys.argv[1]](int(sys.argv[2]))
    FILE.with_suffix(".md").write_text(_page(json.loads(FILE.read_text())))


def _search(length: int) -> None:
    """Let one layer after another read keys: of the best predicted extensions, the one with the least error.

    The error is the sum of the growths of perplexity and copying, in units of `GOALS`, on held-out calibration text:
    a passage of half the length, and its copy after it.
    """
    original = LanguageModel(length=length, num_calibration=NUM_COMPARED + NUM_EVALUATED)
    windows = original.calibration()
    compared, evaluated = windows[:NUM_COMPARED], windows[NUM_COMPARED:]
    passages = [window["input_ids"][:, : length // 2] for window in evaluated]

    def losses(model: nn.Module) -> dict[str, float]:
        found = torch.cat([token_losses(model, passage.repeat(1, 2)) for passage in passages])
        half = length // 2
        return {"perplexity": float(found[:, : half - 1].mean()), "copying": float(found[:, half:].mean())}

    reference = losses(original.model)

    def error(model: nn.Module) -> float:
        found = {name: math.exp(loss - reference[name]) - 1 for name, loss in losses(model).items()}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return sum(found[name] / GOALS[name] for name in GOALS)

    cache = cache_dir() / f"language-search-{length}"
    evaluate = PlanEvaluator(original.model, compared, error, cache)
    heuristic = ShareModeHeuristic(original.model, compared, evaluate, cache, share=("keys",), **SETTINGS)
    reusing, steps = frozenset[tuple[int, str]](), []
    while len(reusing) < NUM_READERS:
        extensions = sorted(heuristic.extensions(reusing), key=heuristic.predicted)[:BREADTH]
        reusing = min(extensions, key=lambda one: evaluate(heuristic.plan(one)))
        plan = heuristic.plan(reusing)
        steps.append({"readers": sorted(layer for layer, _ in reusing), "error": evaluate(plan)})
        print(f"{len(reusing)} readers: {steps[-1]}", flush=True)
    written = {"schema": 1, "command": f"python lab/experiments/language.py search {length}", "length": length}
    written |= {"machine": machine(), "steps": steps, "plan": json.loads(plan.to_json())}
    FOUND.write_text(json.dumps(written, indent=1) + "\n")


def _quality(length: int) -> None:
    """Perplexity, copying and recall of the original and of each plan, at one length of text."""
    original = LanguageModel(length=length, num_windows=max(1, 2048 // length), num_calibration=1)
    makers = {
        name: functools.partial(mr.apply, copy.deepcopy(original.model), plan) for name, plan in plans().items()
    }
    _evaluate("quality", length, original, makers)


def _corrected(length: int) -> None:
    """The quality of corrected scores and of maps, heads aligned and refitted on the same windows."""
    original = LanguageModel(
        length=length, num_windows=max(1, 2048 // length), num_calibration=CALIBRATION_TOKENS // length
    )
    batches = original.calibration()
    by_maps = mr.align(original.model, mr.ReusePlan.parse(GROUPS[0]), batches)
    named = {"map, refitted": by_maps, "corrected, rank 16": dataclasses.replace(by_maps, share="corrected", rank=16)}

    def refitted(plan: mr.ReusePlan) -> Any:
        model = mr.apply(copy.deepcopy(original.model), plan)
        mr.refit(model, original.model, batches)
        return model

    makers = {f"{GROUPS[0]}, {name}": functools.partial(refitted, plan) for name, plan in named.items()}
    _evaluate("corrected", length, original, makers)


def _evaluate(kind: str, length: int, original: LanguageModel, makers: dict[str, Callable[[], Any]]) -> None:
    """Keep the metrics of the original and of each model that is not known yet."""
    reference = None
    for name, make in {"original": lambda: original.model, **makers}.items():
        if name != "original" and name in _known(kind, length):
            continue
        model = make()
        metrics = original.evaluate(model)
        row = {metric.name: {"value": metric.value, "interval": metric.interval} for metric in metrics}
        if reference is None:
            reference = metrics
        for metric, of_original in zip(metrics, reference, strict=True):
            row[metric.name]["against"] = metric.against(of_original)
        _keep(kind, length, name, row)


def _prefill(length: int) -> None:
    """Latency of a pass over a prompt up to the logits of its last token."""
    original = LanguageModel(num_calibration=1)
    prompt = _prompt(original, length)

    def call(model: Any) -> Callable[[], object]:
        return lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1)

    _time("prefill", length, {name: call(model) for name, model in _contestants(original.model).items()})


def _decoding(length: int) -> None:
    """Latency of one step with a cache, after a prompt of this length."""
    original = LanguageModel(num_calibration=1)
    prompt = _prompt(original, length)
    filled = DynamicCache(config=original.model.config)
    with torch.inference_mode():
        original.model(input_ids=prompt[:, :-1], past_key_values=filled, logits_to_keep=1)

    def call(model: Any) -> Callable[[], object]:
        cache = copy.deepcopy(filled)

        def step() -> None:
            model(input_ids=prompt[:, -1:], past_key_values=cache)
            cache.crop(length - 1)

        return step

    _time("decoding", length, {name: call(model) for name, model in _contestants(original.model).items()})


def _contestants(original: Any) -> dict[str, Any]:
    found = {"transformers sdpa": original, NO_ATTENTION: copy.deepcopy(original)}
    found[NO_ATTENTION].set_attn_implementation(NO_ATTENTION)
    timed = {"full": mr.ReusePlan.full(original.config.num_hidden_layers)}
    timed |= {name: plan for name, plan in plans().items() if plan.keys == SETTINGS["keys"]}
    return found | {name: mr.apply(copy.deepcopy(original), plan) for name, plan in timed.items()}


def _nothing(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


AttentionInterface.register(NO_ATTENTION, _nothing)
AttentionMaskInterface.register(NO_ATTENTION, sdpa_mask)


def _prompt(original: LanguageModel, length: int) -> Tensor:
    (window,) = text_windows(original.tokenizer, essays(), length, 1)
    return window


def _time(kind: str, length: int, calls: dict[str, Callable[[], object]]) -> None:
    repeats = 1 if kind == "prefill" else 5
    found = time_interleaved(calls, repeats=repeats, warmup=int(kind == "decoding"), single_from=5.0, title=kind)
    for name, latency in found.items():
        _keep(kind, length, name, latency.data())


def _known(kind: str, length: int) -> dict[str, Any]:
    return json.loads(FILE.read_text()).get(kind, {}).get(str(length), {}) if FILE.exists() else {}


def _keep(kind: str, length: int, name: str, row: dict[str, Any]) -> None:
    """Add a row to the file."""
    results = json.loads(FILE.read_text()) if FILE.exists() else {"schema": 1, "settings": SETTINGS}
    if kind in SPEED:
        results["machine"] = machine()
    results.setdefault(kind, {}).setdefault(str(length), {})[name] = row
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(results, indent=1) + "\n")


def _page(results: dict[str, Any]) -> str:
    here, settings = results["machine"], results["settings"]
    lines = [
        "# Share modes on SmolLM2-135M",
        "",
        "Command: `python lab/experiments/language.py quality 512`, and the others at the top of that file. Speed:",
        f"one thread of {here['processor']}, {here['instructions']}, torch {here['torch']}, transformers "
        f"{here['transformers']}.",
        "",
        f"One configuration for all rows: {settings['keys']} keys for each block of {settings['block']} queries, a "
        f"window of {settings['window']}, the first key.",
        "In share mode `keys`, nothing was trained or refitted. *Recent keys*: reusing layers attend to as many",
        "recent keys instead. From 2048 tokens on, there is one window of each kind of text; an interval over one",
        "window has no width.",
        "",
    ]
    note = "Original: the value. Plans: the ratio to it (recall: the difference), with 95 % intervals."
    for kind, modes in {"quality": "keys", "corrected": "maps and corrected scores, refitted"}.items():
        for length, rows in results.get(kind, {}).items():
            names = list(rows["original"])
            cells = [[name, *(_quality_cell(name, row[metric]) for metric in names)] for name, row in rows.items()]
            lines += [f"## Quality, {modes}, windows of {length} tokens", "", note]
            if kind == "corrected":
                lines[-1] += f" Calibration: {CALIBRATION_TOKENS:,} tokens of fortunes."
            lines += ["", Table("", ["plan", *names], cells).markdown(), ""]
    for kind in SPEED:
        for length, rows in results.get(kind, {}).items():
            lines += [f"## {kind.capitalize()}, {length} tokens", ""]
            lines += [_speed_table(rows).markdown(), ""]
    if FOUND.exists():
        lines += _found_plan(json.loads(FOUND.read_text()))
    return "\n".join(lines)


def _found_plan(found: dict[str, Any]) -> list[str]:
    """How the plan of the search was found, and what it is."""
    cells = [
        [str(len(step["readers"])), f"{step['error']:.3f}", ", ".join(map(str, step["readers"]))]
        for step in found["steps"]
    ]
    return [
        f"## {SEARCHED}",
        "",
        f"Command: `{found['command']}`. One layer after another starts to read keys. Of the {BREADTH} extensions",
        "with the best predicted error, the one with the least error is taken. It is the growth of the perplexity",
        f"divided by {GOALS['perplexity']}, plus that of copying divided by {GOALS['copying']}, on "
        f"{found['length'] // 2} tokens of fortunes and",
        f"their copy. Keys were compared on {NUM_COMPARED} other windows of {found['length']} tokens.",
        "",
        Table("", ["readers", "error", "layers"], cells).markdown(),
        "",
        "```",
        str(mr.ReusePlan.from_json(json.dumps(found["plan"]))),
        "```",
        "",
    ]


def _quality_cell(name: str, metric: dict[str, Any]) -> str:
    if name == "original":
        return f"{metric['value']:.3f}"
    ratio, (low, high) = metric["against"]
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def _speed_table(rows: dict[str, Any]) -> Table:
    original, nothing = rows["transformers sdpa"]["median"], rows[NO_ATTENTION]["median"]
    cells = []
    for name, row in rows.items():
        part = row["median"] - nothing
        speed_up = "—" if name == NO_ATTENTION else f"{(original - nothing) / part:.2f}×"
        cells.append([name, f"{row['median'] * 1000:.1f} ms", f"{original / row['median']:.2f}×", speed_up])
    return Table("", ["model", "latency", "speed-up", "speed-up of the attention part"], cells)


if __name__ == "__main__":
    main()
