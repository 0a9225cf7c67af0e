"""Write docs/models.md: which model types of `transformers` share maps exactly, and why others are refused.

Builds each type tiny and random, and compares it with the definition (tests/sweep.py). With --check, it fails if the
page differs from a new run. Given names of types, it prints their results only.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from sweep import FLOAT64_TOLERANCE, FULL_TOLERANCE, REUSE_TOLERANCE, Result, sweep  # noqa: E402  a module of the tests

from mapreuse.console import Table, tracked  # noqa: E402

PAGE = ROOT / "docs/models.md"

JUSTIFICATIONS = {
    "no list of layers with attention": "There is nothing to share. The positions are mixed by convolutions, state "
    "spaces or Fourier transforms; only some layers have attention; or all layers are one module that runs several "
    "times (ALBERT).",
    "does not go through transformers' attention interface": "The class computes its softmax itself, and not in "
    "the usual way: products of queries and keys, with factors and addends.",
    "calls attention_interface": "It attends in several places. It splits packed images or windows and "
    "attends to them "
    "one by one, or subtracts two maps. No single map belongs to the layer.",
    "may change the map": "Its attention function takes more than queries, keys and a mask, such as keys that are "
    "selected by other scores. Without them, the map would be different.",
    "values depend on": "Its values depend on more than the hidden states, such as another model's states, "
    "a codebook or a cache. A reusing layer cannot make them.",
    "output depends on": "What the layer makes of the context depends on its scores.",
    "not split into heads": "Its values are not (batch, heads, positions, width): blocks of positions are in the "
    "batch, say.",
    "made from one position": "Its values mix positions, or need more than one.",
    "makes values": "No plain projection of its hidden states makes its values.",
    "unexpected step": "The layer runs a loop or returns early before attention.",
    "returns nothing": "The layer returns nothing after attention.",
    "one after the other, once each": "Layers are skipped, repeated or reordered, so a map might be missing.",
    "perhaps more than once": "The same layers run several times in a forward pass. A map belongs to one run.",
    "several stacks": "A plan belongs to one stack. These stacks share one list or one module and cannot "
    "be separated.",
    "self-attentions": "A layer has several self-attentions. A plan has one map for each layer.",
    "dimensions": "The positions form a grid that the layer flattens itself, often into windows that "
    "differ by layer.",
    "cannot reuse the map": "No two layers are alike: their masks, windows or positions differ.",
    "do not make heads": "Heads of queries and values have different widths.",
    "no map can travel": "A module on the way calls its attention in several places and passes no arguments on.",
    "is not chosen by": "The class selects the attention function in a way that only knows those of `transformers`.",
    "no query projection": "The attention module has no projection that makes queries.",
    "is tied": "Layers share parameters, so a change of one would change the others.",
    "not always call": "Under some setting, attention is computed in another way.",
    "is not a module": "A method computes the values, not a module whose outputs are heads.",
    "not a plain projection": "The projection is a special class (experts, low rank, a norm inside) that cannot be "
    "split by heads.",
    "names no head dimension": "The module does not store the width of a head.",
    "runs attention as": "The model always uses an attention implementation without a map.",
    "keeps no cache": "The stack receives keys and values of another model: a cache, or encoder states for its own "
    "attention.",
    "its forward": "Its forward does not have the form of a stack of layers.",
    "holds no": "Some layers have no attention, or none is found by name.",
}
"""Why a refusal is right, by a part of its message. The first one that matches counts."""

WIDELY_USED = [
    *("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet", "modernbert"),
    *("t5", "bart", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3", "phi", "phi3", "falcon", "olmo", "olmo2", "bloom", "opt", "gpt_oss"),
    *("whisper", "wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "wav2vec2-conformer", "moonshine"),
    *("parakeet_encoder", "vit", "dinov2", "dinov3_vit", "clip", "siglip", "swin", "beit", "sam", "detr"),
]
"""Types of much used text, speech and vision models. The page must give a reason for each that is refused."""

WIDELY_USED_REFUSED = {
    "albert": "All of its layers are one module, which runs several times. A plan gives each layer a role of "
    "its own.",
    "sam": "Its image encoder cuts the image into windows in some layers and not in others, and adds relative "
    "positions of rows and columns to the scores, by weights of each layer. It has no adapter. Its mask decoder "
    "has two layers with three attentions each, between different inputs.",
}
"""Why those of `WIDELY_USED` that are not exact are refused."""


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
        print("docs/models.md differs from a new run; run python docs/model_families.py")
        return 1
    return 0


def _swept(model_types: list[str]) -> dict[str, list[Result]]:
    """Results by type, in order, with one process per core."""
    if len(model_types) == 1:
        return {model_types[0]: sweep(model_types[0])}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        found = pool.map(sweep, model_types)
        return {model_type: next(found) for model_type in tracked("Building models", model_types)}


def page(results: dict[str, list[Result]]) -> str:
    """The whole page."""
    exact = {name: found for name, found in results.items() if _stacks(found, "exact")}
    refused = {n: found for n, found in results.items() if n not in exact and _stacks(found, "refused")}
    rest = {name: found for name, found in results.items() if name not in exact and name not in refused}
    stacks = [one for found in results.values() for one in _stacks(found, "exact")]
    lines = [
        "# Models",
        "",
        "Written by `python docs/model_families.py`. It builds every model type of `transformers` "
        f"{transformers.__version__}, tiny and random, on the CPU, and tests every stack of layers in it. With "
        "`--check`, it fails if this page differs from a new run.",
        "",
        f"- **{len(exact)} model types share maps exactly**, in {len(stacks)} stacks, with "
        f"{len({one.attention for one in stacks})} different attention classes.",
        f"- {len(refused)} types are refused. The message names the class and the reason.",
        f"- {len(rest)} of the {len(results)} types could not be built, or have no input that the test can make.",
        "",
        f"*Exact* means: with a plan that reuses nothing, outputs differ from those of the original by at most "
        f"{FULL_TOLERANCE:.0e}. With a plan that reuses maps, they differ by at most {REUSE_TOLERANCE:.0e} "
        "from those "
        "of the original with the softmax of each reusing layer replaced by that of its source. If rounding in "
        f"float32 exceeds these limits, both differ by at most {FLOAT64_TOLERANCE:.0e} in float64. Weights are "
        "scaled until maps are peaked. A dagger marks stacks whose output changes by less than a tenth under reuse "
        "even so. "
        "Text models get a batch with padding, decoders get encoder states if they take them. "
        "`torch.nn.TransformerEncoder` and attention in timm's style are supported as well "
        "(tests/models/test_torch_encoder.py, tests/models/test_timm.py).",
        "",
        "## Exact",
        "",
        "Each stack is listed by the path of the module to pass to `apply`; `(itself)` is the model.",
        "",
        Table("", ["type", "stacks", "stacks refused or not run"], list(map(_exact_row, exact.items()))).markdown(),
    ]
    lines += ["", "## Widely used types that are refused", "", *_widely_used(exact.keys())]
    lines += ["", "## Refused", "", "By reason. A type can appear under several reasons.", ""]
    lines += _by_reason({**exact, **refused})
    reasons = [[name, _cell("; ".join(dict.fromkeys(one.reason for one in found)))] for name, found in rest.items()]
    lines += ["", "## Not built", "", Table("", ["type", "why"], reasons).markdown()]
    return "\n".join(lines) + "\n"


def _widely_used(exact: Collection[str]) -> list[str]:
    refused = [name for name in WIDELY_USED if name not in exact]
    if refused != list(WIDELY_USED_REFUSED):
        raise ValueError(f"expected {list(WIDELY_USED_REFUSED)} refused among WIDELY_USED, got {refused}")
    count = len(WIDELY_USED)
    intro = f"Of {count} types of widely used models ({', '.join(WIDELY_USED)}), {count - len(refused)} are exact."
    return [
        intro,
        "",
        Table("", ["type", "why it is refused"], list(map(list, WIDELY_USED_REFUSED.items()))).markdown(),
    ]


def _exact_row(entry: tuple[str, list[Result]]) -> list[str]:
    name, found = entry
    good = ", ".join(_path(one) + ("†" if one.moved < 0.1 else "") for one in _stacks(found, "exact"))
    return [name, good, ", ".join(_path(one) for one in found if one.status != "exact")]


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
    raise ValueError(f"no justification in docs/model_families.py for: {one.reason}")


def _stacks(found: list[Result], status: str) -> list[Result]:
    return [one for one in found if one.status == status]


def _path(one: Result) -> str:
    return f"`{one.stack}`" if one.stack else "(itself)"


def _cell(text: str) -> str:
    short = re.sub(r"\s+", " ", text).replace("|", "/").replace("`", "'")
    return short if len(short) <= 200 else f"{short[:197]}..."


if __name__ == "__main__":
    sys.exit(main())
