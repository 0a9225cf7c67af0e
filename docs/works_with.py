"""Write docs/works_with.md: which tools give the right numbers with a model under a plan, and which are refused.

Tries every watcher of tests/watchers.py on every family, plan and length; it takes long. After a stop, the same
command continues, unless the code has changed. Fails, and writes nothing, if a model gives wrong numbers or is
refused without a listed way out. With --sample, it tries what `make test` tries. Given names of watchers, it prints
their results only.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from measured import Case  # noqa: E402
from verdicts import (  # noqa: E402  a module of the tests
    REACHES,
    STORAGES,
    Result,
    is_accepted,
    result,
    results,
    sample,
)
from watched import FAMILIES, LENGTHS, PLANS  # noqa: E402
from watchers import REFUSED, WATCHERS  # noqa: E402

from mapreuse.console import progress_bar  # noqa: E402

PAGE = ROOT / "docs/works_with.md"
KEPT = ROOT / "docs/_build/works_with"
"""Directory of the results of a run, in one file for each version of the code."""
Found = list[tuple[Case, Result]]


def main() -> int:
    named = [argument for argument in sys.argv[1:] if argument != "--sample"]
    found = _sampled() if "--sample" in sys.argv else _tried(named or list(WATCHERS))
    for case, one in ((case, one) for tried in found.values() for case, one in tried):
        if named or not is_accepted(case, one):
            print(f"{case}: {one.status}, {one.reach}: {one.reason[:300]}", flush=True)
    defects = sum(not is_accepted(*pair) for tried in found.values() for pair in tried)
    if defects:
        print(f"{defects} cases are wrong, or refused without a way out")
        return 1
    if not named:
        PAGE.write_text(page(found))
    return 0


def _sampled() -> dict[str, Found]:
    """Results of the sample by watcher."""
    found: dict[str, Found] = {}
    for case in sample():
        found.setdefault(case.watcher, []).append((case, result(case)))
    return found


def _tried(watchers: list[str]) -> dict[str, Found]:
    """Results by watcher, with one process per core."""
    pairs = [(watcher, family) for family in FAMILIES for watcher in watchers]  # a definition serves many watchers
    KEPT.mkdir(parents=True, exist_ok=True)
    file = KEPT / _version_of_the_code()
    kept = (
        dict(pickle.loads(base64.b64decode(line)) for line in file.read_bytes().splitlines()) if file.exists() else {}
    )
    with progress_bar("Trying tools") as progress, file.open("ab") as lines:
        for family in FAMILIES:  # each with new processes: compiled models stay in memory
            left = [pair for pair in pairs if pair[1] == family and pair not in kept]
            with ProcessPoolExecutor(
                os.cpu_count(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                started = {pool.submit(results, *pair): pair for pair in left}
                for done in as_completed(started):
                    pair = started[done]
                    kept[pair] = done.result()
                    lines.write(base64.b64encode(pickle.dumps((pair, kept[pair]))) + b"\n")
                    lines.flush()
                    progress(f"{pair[1]}: {pair[0]}", len(kept), len(pairs))
    return {watcher: [one for family in FAMILIES for one in kept[watcher, family]] for watcher in watchers}


def _version_of_the_code() -> str:
    """A name that changes with the library, the tests, PyTorch and transformers."""
    files = sorted(file for room in ("src", "tests") for file in (ROOT / room).rglob("*.py"))
    code = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(code + f"{torch.__version__} {transformers.__version__}".encode()).hexdigest()[:16]


def page(found: dict[str, Found]) -> str:
    """The whole page."""
    every = [one.status for tried in found.values() for _, one in tried]
    counts = Counter(every)
    lines = [
        "# Works with",
        "",
        f"Written by `make works-with`, which tries {len(found)} tools on {len(FAMILIES)} families of tiny random "
        f"models: {', '.join(FAMILIES)}; with PyTorch {torch.__version__.split('+')[0]} and `transformers` "
        f"{transformers.__version__}, on the CPU.",
        "",
        f"Models are converted with {len(PLANS)} plans: nothing shared; two groups of two layers, with heads "
        "reassigned; single heads. Slow tools are tried with one plan for each family. Maps are stored as "
        f"{', '.join(f'`{one}`' for one in STORAGES)} in turn. Tools that record a model record it at one batch "
        "size, length and padding, and run it at others. Lengths are "
        f"{', '.join(map(str, LENGTHS))} positions. Outputs and gradients are compared with the definition: the "
        "original model, in which reusing heads apply the maps of their sources.",
        "",
        f"{'This page is of the sample that `make test` tries. ' if len(every) < 1000 else ''}"
        f"Of {len(every)} comparisons, **{counts['wrong']} are wrong**, "
        f"{counts['right']} are right, "
        f"{counts['refused']} are refused, and in {counts['as the original']} the tool fails with the original model "
        "as well.",
        "",
        "| tool | result | how it was tried |",
        "|---|---|---|",
    ]
    for watcher, tried in found.items():
        lines.append(f"| `{watcher}` | {_summary(watcher, tried)} | {WATCHERS[watcher].tried} |")
    return "\n".join(lines) + "\n"


def _summary(watcher: str, tried: Found) -> str:
    """What became of one tool, by family."""
    parts = []
    refused = {case.family: one.reason for case, one in tried if one.status == "refused"}
    for reach in REACHES:
        families = _families(tried, lambda one, reach=reach: (one.status, one.reach) == ("right", reach))
        if families:
            limit = {
                REACHES[0]: "works",
                REACHES[1]: "works at the recorded length",
                REACHES[2]: "works at the recorded batch size and length",
            }[reach]
            parts.append(f"{limit}{_of(families)}")
    if refused:
        message = _cell(next(iter(refused.values())).partition(": ")[2])
        parts.append(f'refused{_of(list(refused))}: "{message}"; {REFUSED[watcher][1]}')
    failing = _families(tried, lambda one: one.status == "as the original")
    if failing:
        parts.append(f"fails as with the original model{_of(failing)}")
    return "; ".join(parts)


def _families(tried: Found, is_meant) -> list[str]:
    return list(dict.fromkeys(case.family for case, one in tried if is_meant(one)))


def _of(families: list[str]) -> str:
    return "" if len(families) == len(FAMILIES) else f" ({', '.join(families)})"


def _cell(text: str) -> str:
    short = re.sub(r"\s+", " ", text).replace("|", "/").replace("`", "'")
    return short if len(short) <= 200 else f"{short[:197]}..."


if __name__ == "__main__":
    sys.exit(main())
