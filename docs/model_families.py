"""Write docs/models.md: which model types of `transformers` reuse maps exactly, and why others are refused.

Every type is built tiny and random and measured against the definition (tests/sweep.py). With --check, fail when a
fresh run finds anything else than the page says. Arguments are types to look at alone: their results are printed.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from sweep import FULL_TOLERANCE, REUSE_TOLERANCE, Result, sweep  # noqa: E402  a module of the tests

PAGE = ROOT / "docs/models.md"

JUSTIFICATIONS = {
    "no list of layers with attention": "There is nothing to share: convolutions, state spaces or Fourier "
    "transforms mix the positions, attention stands in some layers only, between layers of another kind, or all "
    "layers are one and the same module, run again and again (ALBERT).",
    "does not go through transformers' attention interface": "The class computes its softmax itself, each in its own "
    "way; there is no place at which its map could be taken or given without rewriting its attention.",
    "calls attention_interface": "It attends in several places: images or windows packed into one sequence are cut "
    "apart and attended one by one, or two maps are subtracted. No single map belongs to the layer.",
    "may change the map": "Its attention function is given more than queries, keys and a mask (a cap on the scores, "
    "sinks, chosen keys); a map without them would be another map.",
    "values are computed as": "Its values are not one projection of the hidden states, split into heads: they come "
    "from a latent or from a projection shared with queries and keys, are normed, clamped, convolved or padded. A "
    "reusing layer makes values alone. (A projection shared by all three can be cut apart where an adapter says how "
    "it is laid out, as for GPT-2 and ModernBERT; these have no adapter.)",
    "projects queries or keys together with values": "A reusing layer makes values alone, and here they come with "
    "queries or keys.",
    "unexpected step": "The context is gated or normed, or reshaped in another order, by what the layer computes; a "
    "reusing layer would have to guess it.",
    "a step after attention is conditional": "What happens to the context depends on a setting that the reader does "
    "not follow.",
    "it returns": "The layer hands on more than its output and weights, or less (position biases made in the first "
    "layer): what later layers receive would be lost.",
    "one after the other, once each": "Layers are skipped, repeated or reordered, so a map might not be there.",
    "perhaps more than once": "The same layers run several times in a forward; a map belongs to one run.",
    "several stacks": "A plan speaks of one stack; these share one list or one module and cannot be told apart.",
    "self-attentions": "A layer attends itself twice or more; a plan has one map for each layer.",
    "dimensions": "Positions lie on a grid that the layer flattens itself, often in windows that differ by layer.",
    "cannot reuse the map": "No two layers are alike: their masks, windows or positions differ.",
    "do not make heads": "Queries and values have heads of different widths.",
    "no map can travel": "A module on the way calls its attention in several places and passes no arguments on.",
    "is not chosen by": "The attention function is looked up in a way that knows `transformers`' own names only.",
    "no query projection": "Queries are not made by a projection in the attention module.",
    "is tied": "Layers share parameters, so changing one would change another.",
    "not always call": "Under a setting, attention takes another path.",
    "is not a module": "Values are made by a method, not by a module whose outputs are heads.",
    "not a plain projection": "The projection is a class of the family's own (experts, low rank, a norm inside), "
    "which cannot be cut apart by heads.",
    "names no head dimension": "The width of a head is not written on the module.",
    "runs attention as": "The attention of the model is fixed to an implementation without a map.",
    "keeps no cache": "The stack is handed keys and values of another: a cache, or encoder states for its own "
    "attention.",
    "its forward": "Its forward takes another shape than a stack of layers.",
    "holds no": "Not every layer has attention, or none is found by name.",
}
"""Why a refusal is right, by a piece of its message; the first that fits counts."""


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    results = _swept(arguments or sorted(CONFIG_MAPPING_NAMES))
    if arguments:
        for model_type, found in results.items():
            for one in found:
                print(model_type, one)
        return 0
    wrong = [(name, one) for name, found in results.items() for one in found if one.status == "inexact"]
    for name, one in wrong:
        print(f"{name}: {one}")
    if wrong:
        print(f"{len(wrong)} stacks are neither exact nor refused")
        return 1
    text = page(results)
    if "--check" not in sys.argv:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        print("docs/models.md does not say what a fresh run finds; run scripts/models.py")
        return 1
    return 0


def _swept(model_types: list[str]) -> dict[str, list[Result]]:
    """Results by type, in order; one process for each core."""
    if len(model_types) == 1:
        return {model_types[0]: sweep(model_types[0])}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        found = pool.map(sweep, model_types)
        return dict(zip(model_types, tqdm(found, total=len(model_types), unit="type"), strict=True))


def page(results: dict[str, list[Result]]) -> str:
    """The whole page."""
    exact = {name: found for name, found in results.items() if _stacks(found, "exact")}
    refused = {n: found for n, found in results.items() if n not in exact and _stacks(found, "refused")}
    rest = {name: found for name, found in results.items() if name not in exact and name not in refused}
    stacks = [one for found in results.values() for one in _stacks(found, "exact")]
    lines = [
        "# Models",
        "",
        "Written by `python scripts/models.py`, which builds every model type that `transformers` "
        f"{transformers.__version__} knows, tiny and random, on the CPU, and measures every stack of layers in it; "
        "`--check` fails when a fresh run finds anything else.",
        "",
        f"- **{len(exact)} model types reuse maps exactly**, in {len(stacks)} stacks, with "
        f"{len({one.attention for one in stacks})} different attention classes.",
        f"- {len(refused)} types are refused, by a message that names the class and the reason.",
        f"- {len(rest)} of the {len(results)} types were not built, or no input could be made for them.",
        "",
        f"*Exact* means: a plan that reuses nothing agrees with the untouched model within {FULL_TOLERANCE:.0e}, and "
        f"a plan that reuses agrees within {REUSE_TOLERANCE:.0e} with the original model in which the softmax of "
        "every reusing layer was replaced by that of its source. Weights are scaled until maps are peaked; a dagger "
        "marks stacks whose output reuse still moves by less than a tenth. Text models get a batch with padding, "
        "decoders encoder states where they take them. Beside these, `torch.nn.TransformerEncoder` and attention in "
        "timm's style are served (tests/models/test_packed.py).",
        "",
        "## Exact",
        "",
        "Stacks are given by the path of the module to pass to `apply`; `(itself)` is the model.",
        "",
        "| type | stacks | refused or not run in it |",
        "|---|---|---|",
    ]
    for name, found in exact.items():
        good = ", ".join(_path(one) + ("†" if one.moved < 0.1 else "") for one in _stacks(found, "exact"))
        other = ", ".join(_path(one) for one in found if one.status != "exact")
        lines.append(f"| {name} | {good} | {other} |")
    lines += ["", "## Refused", "", "By reason; a type may stand in several places.", ""]
    lines += _by_reason({**exact, **refused})
    lines += ["", "## Not built", "", "| type | why |", "|---|---|"]
    lines += [
        f"| {name} | {_cell('; '.join(dict.fromkeys(o.reason for o in found)))} |" for name, found in rest.items()
    ]
    return "\n".join(lines) + "\n"


def _by_reason(results: dict[str, list[Result]]) -> list[str]:
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, found in results.items():
        for one in _stacks(found, "refused"):
            groups[_reason(one)].setdefault(name, one.reason)
    lines = []
    for reason, types in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        example = next(iter(types.values()))
        names = ", ".join(sorted(types))
        lines += [f"### {len(types)} × {reason}", "", JUSTIFICATIONS[reason], ""]
        lines += [f"{names}.", "", f"For example: `{_cell(example)}`.", ""]
    return lines[:-1]


def _reason(one: Result) -> str:
    for reason in JUSTIFICATIONS:
        if reason in one.reason:
            return reason
    raise ValueError(f"no justification in scripts/models.py for: {one.reason}")


def _stacks(found: list[Result], status: str) -> list[Result]:
    return [one for one in found if one.status == status]


def _path(one: Result) -> str:
    return f"`{one.stack}`" if one.stack else "(itself)"


def _cell(text: str) -> str:
    short = re.sub(r"\s+", " ", text).replace("|", "/").replace("`", "'")
    return short if len(short) <= 200 else f"{short[:197]}..."


if __name__ == "__main__":
    sys.exit(main())
