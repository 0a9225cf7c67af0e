"""all-MiniLM-L6-v2 with shared maps, against dropping attention or layers; results in lab/results/conversion/.

    python lab/experiments/minilm.py DIRECTORY    # measure what is missing, then write the page
    python lab/experiments/minilm.py              # write the page from minilm.json

DIRECTORY is the sentence-transformers model, or `minilm`, which downloads it (see `mapreuse-lab fetch`). Calibration
and distillation use sentences of Debian's fortunes, which are downloaded like the speech prompts; evaluation uses
sentences of Python's language reference.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.models import EmbeddingModel, calibration_sentences, evaluation_sentences
from torch import Tensor, nn

import mapreuse as mr
from mapreuse.console import Table
from mapreuse.conversion import (
    LoopConfig,
    PlanEvaluator,
    SearchHeuristic,
    TrainingLoop,
    hidden_state_error,
    relative_latencies,
)
from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "results/conversion/minilm.json"
NUM_CALIBRATION, NUM_LARGE, NUM_EVALUATION = 2048, 8192, 1024
BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
"""All distillation takes its products in the same type."""

_HELD_OUT = 8
_TIMINGS = 3

Batch = dict[str, Tensor]


def main() -> None:
    if len(sys.argv) > 1:
        _measure(sys.argv[1])
    results = json.loads(TARGET.read_text())
    (TARGET.parent / "README.md").write_text(_page(results))


def _measure(name: str) -> None:
    task = EmbeddingModel(name, num_evaluation=NUM_EVALUATION)
    original, texts = task.model, calibration_sentences()
    calibration = {n: task.batches(texts[:n]) for n in (NUM_CALIBRATION, NUM_LARGE)}
    distillation = task.batches(texts, 32)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"schema": 2, "rows": {}}
    rows, here = results["rows"], machine()
    commit = here.pop("commit")
    results |= {"command": "python lab/experiments/minilm.py DIRECTORY", "machine": here}
    results["sentences"] = {
        "calibration": NUM_CALIBRATION,
        "calibration_large": NUM_LARGE,
        "distillation": len(texts),
        "evaluation": NUM_EVALUATION,
    }
    models: dict[str, Callable[[], nn.Module]] = {}

    def row(name: str, make: Callable[[], nn.Module], timed: Callable[[], nn.Module] | None = None) -> None:
        models[name] = timed or make
        if name in rows:
            return
        model = make()
        (cosine, overlap), plan = task.evaluate(model), mr.plan_of(model)
        rows[name] = {
            "cosine": cosine.value,
            "top10_overlap": overlap.value,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "plan": None if plan is None else json.loads(plan.to_json())["layers"],
            "commit": commit,
        }
        TARGET.write_text(json.dumps(results, indent=1) + "\n")
        print(name, f"cosine {rows[name]['cosine']:.4f}", flush=True)

    error = hidden_state_error(original, calibration[NUM_CALIBRATION][::4])

    @functools.cache
    def heuristic() -> SearchHeuristic:
        batches = calibration[NUM_CALIBRATION]
        return SearchHeuristic(original, batches, PlanEvaluator(original, batches, error))

    @functools.cache
    def plan_of(words: str) -> mr.ReusePlan:
        """The plan of "3 layers" or "36 heads"."""
        if known := rows.get(f"{words}, aligned and refitted"):
            return _plan_of_row(known)
        number = int(words.split()[0])
        if words.endswith("heads"):
            return heuristic().plan(heuristic().grown(frozenset(), number))

        def plan(layers: tuple[int, ...]) -> mr.ReusePlan:
            return heuristic().plan(frozenset().union(*map(heuristic().heads, layers)))

        plans = [plan(layers) for layers in itertools.combinations(range(1, 6), number)]
        return min(plans, key=lambda one: error(mr.apply(copy.deepcopy(original), one)))

    def applied(words: str) -> nn.Module:
        return mr.apply(copy.deepcopy(original), plan_of(words))

    @functools.cache
    def refitted(words: str, sentences: int) -> nn.Module:
        model = applied(words)
        mr.refit(model, original, calibration[sentences])
        return model

    def distilled(words: str, minutes: int) -> nn.Module:
        model = copy.deepcopy(refitted(words, NUM_LARGE))
        config = mr.DistillConfig(seconds=60.0 * minutes, evaluate_every=200, patience=50, bfloat16=BFLOAT16)
        mr.distill(model, original, distillation[_HELD_OUT:], config, held_out=distillation[:_HELD_OUT])
        return model

    @functools.cache
    def least_missed(without: Callable[[nn.Module, tuple[int, ...]], nn.Module]) -> tuple[int]:
        return min(((layer,) for layer in range(1, 6)), key=lambda layers: error(without(original, layers)))

    def layers(number: int) -> tuple[int, ...]:
        plan = plan_of(f"{number} layers")
        return tuple(layer for layer in range(6) if plan.reuses(layer))

    row("no layer reuses", lambda: mr.apply(copy.deepcopy(original), mr.ReusePlan.full(6)))
    for words, without in (("1 layer's attention dropped", _without_attention), ("1 layer dropped", _without_layers)):
        row(words, lambda without=without: without(original, least_missed(without)))
    for n in (2, 3):
        words, heads = f"{n} layers", f"{12 * n} heads"
        row(f"{words}, heads by index", lambda n=n: mr.apply(copy.deepcopy(original), _by_index(layers(n))))
        row(f"{words}, aligned", lambda words=words: applied(words))
        row(f"{words}, aligned and refitted", lambda words=words: refitted(words, NUM_CALIBRATION))
        row(f"{words}' attention dropped", lambda n=n: _without_attention(original, layers(n)))
        row(f"{words} dropped", lambda n=n: _without_layers(original, layers(n)))
        row(f"{heads}, aligned and refitted", lambda heads=heads: refitted(heads, NUM_CALIBRATION))
    for words in ("2 layers", "24 heads", "3 layers", "36 heads"):
        row(f"{words}, aligned and refitted on {NUM_LARGE}", lambda words=words: refitted(words, NUM_LARGE))
    for words, minutes in (("36 heads", 10), ("24 heads", 10), ("3 layers", 10), ("36 heads", 40)):
        row(f"{words}, distilled {minutes} minutes", lambda words=words, minutes=minutes: distilled(words, minutes))
    for words, shape in (
        ("1 layer dropped", lambda: _without_layers(original, least_missed(_without_layers))),
        ("3 layers' attention dropped", lambda: _without_attention(original, layers(3))),
    ):
        make = functools.partial(_distilled_without_plan, shape, original, distillation, 10)
        row(f"{words}, distilled 10 minutes", make, shape)

    results["rows"] = rows = {name: rows[name] for name in models}
    if any("latency" not in one for one in rows.values()):
        long = [" ".join(evaluation_sentences()[start::4]) for start in range(4)]
        evaluation = task.batches(evaluation_sentences()[:NUM_EVALUATION])
        timed = {
            "short": sorted(evaluation, key=lambda batch: batch["input_ids"].numel())[len(evaluation) // 2],
            "512": dict(task.tokenizer(long, truncation=True, max_length=512, return_tensors="pt")),
        }
        _time(original, rows, models, timed)
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


def _time(
    original: nn.Module,
    rows: dict[str, Any],
    models: dict[str, Callable[[], nn.Module]],
    timed: dict[str, Batch],
) -> None:
    """Latencies relative to the original, of models with `mr.optimize`; refitted weights change no latency."""
    shapes = {
        name: mr.optimize(
            make() if rows[name]["plan"] is None else mr.apply(copy.deepcopy(original), _plan_of_row(rows[name]))
        )
        for name, make in models.items()
    }
    for tokens, batch in timed.items():
        found = [relative_latencies(original, shapes, [batch]) for _ in range(_TIMINGS)]
        for name in shapes:
            rows[name].setdefault("latency", {})[tokens] = statistics.median(one[name] for one in found)


def _plan_of_row(row: dict[str, Any]) -> mr.ReusePlan:
    return mr.ReusePlan.from_json(json.dumps(json.loads(mr.ReusePlan.full(6).to_json()) | {"layers": row["plan"]}))


def _page(results: dict[str, Any]) -> str:
    numbers, here, rows = results["sentences"], results["machine"], results["rows"]

    def cells(name: str) -> list[str]:
        row = rows[name]
        speed_up = [f"{1 / row['latency'][tokens]:.2f}×" if "latency" in row else "" for tokens in ("short", "512")]
        return [name, f"{row['cosine']:.4f}", f"{row['top10_overlap']:.3f}", *speed_up, f"{row['parameters']:,}"]

    header = ["model", "cosine", "top-10 overlap", "speed-up, sentences", "speed-up, 512 tokens", "parameters"]
    compared = ("1 layer dropped", "3 layers", "36 heads", "3 layers' attention dropped")
    distilled = [name for words in compared if (name := f"{words}, distilled 10 minutes") in rows]
    lines = [
        "# all-MiniLM-L6-v2 with shared maps",
        "",
        f"Command: `{results['command']}`. Machine: {here['processor']}, {here['instructions']}, {here['cores']}",
        f"cores, mapreuse {here['mapreuse']}, torch {here['torch']}, transformers {here['transformers']}.",
        *_VERSION_NOTE.get(here["mapreuse"], ()),
        "",
        f"- **Data**: {numbers['calibration']:,} sentences for alignment and refit ({numbers['calibration_large']:,}",
        f"  in the rows that say so), {numbers['distillation']:,} for distillation, {numbers['evaluation']:,} other",
        "  sentences, from Python's language reference, for evaluation.",
        "- **Cosine**: mean cosine between the embeddings of the original and of the converted model.",
        "- **Top-10 overlap**: fraction of each sentence's ten nearest sentences that stay among the ten nearest.",
        "- **Speed-up** over the `transformers` model: a batch of 16 sentences of median length, and four texts of",
        f"  512 tokens; median of {_TIMINGS} interleaved timings, good to about 10 %. Every row includes",
        "  `mapreuse.optimize`: compare with the row *no layer reuses* to see what sharing saves.",
        "- **Layers and heads**: the two or three layers that reuse are those with the least error on calibration",
        "  sentences, of all choices, before the refit. 24 and 36 heads, chosen in any layers by",
        "  `SearchHeuristic.grown`, are as many as two and three layers have. A single dropped layer, or attention,",
        "  is the one with the least error, too.",
        "",
        "## All results",
        "",
        Table("", header, [cells(name) for name in rows]).markdown(),
        "",
        "## Sharing or dropping?",
        "",
        "Ten minutes of distillation with the same loss:",
        "",
        Table("", header, [cells(name) for name in distilled]).markdown(),
        "",
        "For sentences, dropping one layer saves more time than sharing three maps, at similar quality; at 512",
        "tokens it saves about as much. Measure both before you choose sharing for short inputs.",
        "",
        "See also: [search against fixed groups](pareto.md), [speech recognisers](recovery.md), and [time and",
        "memory for a model of BERT-base's size](bert_base.md).",
    ]
    return "\n".join(lines) + "\n"


_VERSION_NOTE = {
    "0.1.0": (
        "Later versions weigh all channels of the hidden states equally in refit and distillation. The `apply` of",
        "0.1.0 also did what `mapreuse.optimize` does now. Half of the sentences for calibration and distillation",
        "came from docstrings of numpy, scipy and torch; the script now takes all of them from Debian's fortunes.",
    )
}


def _by_index(layers: tuple[int, ...]) -> mr.ReusePlan:
    """Each of these layers shares the nearest earlier computing layer's maps, head by head."""
    return mr.ReusePlan.from_sources([max(s for s in range(l + 1) if s not in layers) for l in range(6)])


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _without_attention(original: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """A copy in which the attention of these layers adds nothing."""
    model = copy.deepcopy(original)
    for layer in layers:
        model.encoder.layer[layer].attention.self = _NoAttention()
        model.encoder.layer[layer].attention.output.dense = nn.Identity()
    return model


def _without_layers(original: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    model = copy.deepcopy(original)
    model.kept_layers = [layer for layer in range(6) if layer not in layers]
    model.encoder.layer = nn.ModuleList(model.encoder.layer[layer] for layer in model.kept_layers)
    return model


def _distilled_without_plan(
    make: Callable[[], nn.Module], original: nn.Module, batches: list[Batch], minutes: int
) -> nn.Module:
    """Minimise the hidden-state loss of `mapreuse.distill` over the layers that a model without a plan has."""
    model = make()
    kept = getattr(model, "kept_layers", range(6))
    model.requires_grad_(False).encoder.layer.requires_grad_(True)

    def loss(batch: Batch, step: int) -> Tensor:
        rows = batch["attention_mask"].bool()
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            with torch.no_grad():
                targets = original(**batch, output_hidden_states=True).hidden_states[1:]
            states = model(**batch, output_hidden_states=True).hidden_states[1:]
        pairs = [(one[rows].float(), targets[layer][rows].float()) for one, layer in zip(states, kept, strict=True)]
        return torch.stack([(a - b).square().sum() / b.square().sum() for a, b in pairs]).mean()

    config = LoopConfig(seconds=60.0 * minutes)
    TrainingLoop(model, config, batches=lambda epoch, progress: batches[_HELD_OUT:], loss=loss).run()
    return model


if __name__ == "__main__":
    main()
