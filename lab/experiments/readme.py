"""Put the figures of lab/results/study/quick and lab/results/study/full into docs/papers.md and the reports.

With --check fail where one of them differs, or results have other error rates than the runs they come from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapreuse_lab.study import (
    Errors,
    markdown,
    page,
    page_results,
    papers_page,
    report,
    verdict,
)

ROOT = Path(__file__).parent.parent


def main() -> int:
    quick, full = _results("quick"), _results("full")
    files: dict[str, str] = {}
    if full["verdict"] != verdict(full):
        print(
            "lab/results/study/full/results.json has another verdict than its figures give; run mapreuse study --preset full"
        )
        return 1
    files["lab/results/study/quick/report.md"] = report(quick)
    files["lab/results/study/quick/report.html"] = page(page_results(quick))
    files["docs/papers.md"] = papers_page(full)
    files["lab/results/study/full/report.md"] = markdown(full)
    files["lab/results/study/full/report.html"] = page(full)
    if wrong := _differing_runs(full):
        print(f"lab/results/study/full/results.json does not have the error rates of its runs: {', '.join(wrong)}")
        return 1
    if "--check" not in sys.argv:
        for name, fresh in files.items():
            (ROOT / name).write_text(fresh)
        return 0
    stale = [name for name, fresh in files.items() if not _holds(ROOT / name, fresh)]
    for name in stale:
        print(f"{name} does not show the figures of results; run make readme")
    return 1 if stale else 0


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


def _results(preset: str) -> dict[str, Any]:
    file = ROOT / "results" / preset / "results.json"
    if not file.is_file():
        raise SystemExit(f"results/{preset}/results.json is missing")
    return json.loads(file.read_text())


def _differing_runs(full: dict[str, Any]) -> list[str]:
    """Finished runs whose recorded hypotheses have another CER or WER than the results say, or are not recorded."""
    return [*_wrong_runs(full), *_wrong_runs(full.get("longer", {"techniques": [], "runs": []}))]


def _wrong_runs(part: dict[str, Any]) -> list[str]:
    scores = {technique["name"]: technique["scores"] for technique in part["techniques"]}
    wrong = []
    for run in part["runs"]:
        file = ROOT / "lab/results/study/full/runs" / f"{run['key']}.json"
        if run["state"] != "finished":
            continue
        if not file.is_file():
            wrong.append(run["key"])
            continue
        test = json.loads(file.read_text())["test"]
        recorded = Errors.of(test["references"], [test["hypotheses"]])
        said = scores[run["technique"]][run["corpus"]]
        place = said["seeds"].index(run["seed"])
        if any(abs(said[f"{measure}_by_seed"][place] - recorded.rate(measure)) > 1e-9 for measure in ("cer", "wer")):
            wrong.append(run["key"])
    return wrong


if __name__ == "__main__":
    sys.exit(main())
