"""Share mode "keys" on SmolLM2-135M: quality, prefill and decoding; results in lab/results/language/.

    python lab/experiments/language.py quality 512
    python lab/experiments/language.py quality 2048
    python lab/experiments/language.py prefill 4096
    python lab/experiments/language.py decoding 8192
    python lab/experiments/language.py             # write the page from keys.json

Every plan has the same keys, window and block. Beside it stands a plan whose reusing layers attend to as many recent
keys instead. Rows in keys.json are not measured again. Speed is that of one thread; run these alone on the machine.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import LanguageModel, essays, text_windows
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.measure import machine, time_interleaved

FILE = Path(__file__).parent.parent / "results/language/keys.json"
SETTINGS = {"keys": 128, "window": 64, "block": 16}
GROUPS = ("1x10,2x10", "1x2,2x14")
NO_ATTENTION = "attention that costs nothing"
RECENT = {"keys": 1, "window": SETTINGS["keys"] + SETTINGS["window"] - 1, "block": SETTINGS["block"]}
"""A window of as many keys; one more key is published, because a plan needs one."""


def plans() -> dict[str, mr.ReusePlan]:
    """The plans by their names."""
    found = {groups: mr.ReusePlan.parse(groups, share="keys", **SETTINGS) for groups in GROUPS}
    return found | {f"{groups}, recent keys": mr.ReusePlan.parse(groups, share="keys", **RECENT) for groups in GROUPS}


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        {"quality": _quality, "prefill": _prefill, "decoding": _decoding}[sys.argv[1]](int(sys.argv[2]))
    FILE.with_suffix(".md").write_text(_page(json.loads(FILE.read_text())))


def _quality(length: int) -> None:
    """Perplexity, copying and recall of the original and of each plan, at one length of text."""
    windows = max(1, 2048 // length)
    original = LanguageModel(length=length, num_windows=windows, num_calibration=1)
    reference = None
    for name, plan in {"original": None, **plans()}.items():
        if name != "original" and name in _known("quality", length):
            continue
        model = original.model if plan is None else mr.apply(copy.deepcopy(original.model), plan)
        metrics = original.evaluate(model)
        row = {metric.name: {"value": metric.value, "interval": metric.interval} for metric in metrics}
        if reference is None:
            reference = metrics
        for metric, of_original in zip(metrics, reference, strict=True):
            row[metric.name]["against"] = metric.against(of_original)
        _keep("quality", length, name, row)


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
    results["machine"] = machine()
    results.setdefault(kind, {}).setdefault(str(length), {})[name] = row
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(results, indent=1) + "\n")


def _page(results: dict[str, Any]) -> str:
    here, settings = results["machine"], results["settings"]
    lines = [
        "# Share mode `keys` on SmolLM2-135M",
        "",
        "Command: `python lab/experiments/language.py quality 512`, and the others at the top of that file. Machine:",
        f"{here['processor']}, {here['instructions']}, one thread, torch {here['torch']}, transformers "
        f"{here['transformers']}.",
        "",
        f"One configuration for all rows: {settings['keys']} keys for each block of {settings['block']} queries, a "
        f"window of {settings['window']}, the first key.",
        "Nothing was trained or refitted. *Recent keys*: reusing layers attend to as many recent keys instead.",
        "",
    ]
    for length, rows in results.get("quality", {}).items():
        names = list(rows["original"])
        cells = [[name, *(_quality_cell(name, row[metric]) for metric in names)] for name, row in rows.items()]
        title = f"## Quality, windows of {length} tokens"
        note = "Original: the value. Plans: the ratio to it (recall: the difference), with 95 % intervals."
        lines += [title, "", note, "", Table("", ["plan", *names], cells).markdown(), ""]
    for kind in ("prefill", "decoding"):
        for length, rows in results.get(kind, {}).items():
            lines += [f"## {kind.capitalize()}, {length} tokens", ""]
            lines += [_speed_table(rows).markdown(), ""]
    return "\n".join(lines)


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
