"""Write the reports of the committed studies, and docs/papers.md, from their results.

With --check, write nothing, and fail if one of these files is outdated, or if the error rates of the full study
differ from those of its runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapreuse_lab.study import papers_page, read_results, report
from mapreuse_lab.training import Errors

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "lab/results/study"


def main() -> int:
    full = read_results(STUDY / "full")
    files = {STUDY / name / "report.md": report(read_results(STUDY / name)) for name in ("quick", "full")}
    files[ROOT / "docs/papers.md"] = papers_page(full)
    if differing := [*_differing_runs(full), *_differing_runs(full["longer"])]:
        print(f"lab/results/study/full/results.json differs from the error rates of its runs: {', '.join(differing)}")
        return 1
    stale = [file for file, text in files.items() if file.read_text() != text]
    for file in stale:
        if "--check" in sys.argv:
            print(f"{file.relative_to(ROOT)} is outdated; run make readme")
        else:
            file.write_text(files[file])
    return int(bool(stale) and "--check" in sys.argv)


def _differing_runs(part: dict[str, Any]) -> list[str]:
    """Finished runs whose recorded hypotheses are missing or have other error rates than the results."""
    scores = {technique["name"]: technique["scores"] for technique in part["techniques"]}
    differing = []
    for run in part["runs"]:
        if run["state"] == "finished":
            file = STUDY / "full/runs" / f"{run['key']}.json"
            own = scores[run["technique"]][run["corpus"]]
            place = own["seeds"].index(run["seed"])
            test = json.loads(file.read_text())["test"] if file.is_file() else None
            recorded = None if test is None else Errors.of(test["references"], [test["hypotheses"]])
            if recorded is None or any(
                abs(own[f"{metric}_by_seed"][place] - recorded.rate(metric)) > 1e-9 for metric in ("cer", "wer")
            ):
                differing.append(run["key"])
    return differing


if __name__ == "__main__":
    sys.exit(main())
