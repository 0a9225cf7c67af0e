"""The tables of the study's report, as cells that `page` and `markdown` show each in its own way.

`docs/results_format.md` documents the dictionary they are made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mapreuse.measure import PARTS
from mapreuse_lab.techniques import parse

Results = dict[str, Any]

NOT_MEASURED = "not measured"

GROUPING = (
    "How the error rate moves as fewer layers compute their own attention map. Plans are group size × number of "
    "groups; where a group would have more layers than there are, as groups of 8 in an encoder of 6, it is one map "
    "for all."
)
"""What the figures of `grouping` show."""

LONGER = (
    "Some techniques trained once more, in the same recogniser, for more steps and on more speech: sentences put "
    "together from pieces of the recordings, beside these. Settings under longer_recipe."
)
"""What a table of `longer_grid` shows."""

_LONGEST_NAME = 40
"""Characters of a technique's name that a table shows; a plan head by head would take hundreds."""

_MAP_PARTS = {"query", "key", "positions", "positional_scores", "scores", "softmax", "fused"}
_VALUE_PARTS = {"value", "context", "output"}


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, the small print below, and the number it is sorted by (None: last)."""

    text: str
    small: str = ""
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head.

    Attributes:
        title: what it says.
        small: the small print below.
        corpus: the corpus that an error rate was measured on.
        about: "accuracy", "cost", or neither.
        numeric: whether cells are numbers, set to the right.
    """

    title: str
    small: str = ""
    corpus: str = ""
    about: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Grid:
    """A table: one list of cells for each row, as long as the columns."""

    columns: list[Column]
    rows: list[list[Cell]]

    def about(self, about: str) -> Grid:
        """The columns that are about this, and those about nothing in particular."""
        kept = [index for index, column in enumerate(self.columns) if column.about in ("", about)]
        return Grid([self.columns[index] for index in kept], [[row[index] for index in kept] for row in self.rows])


def clean(value: Any) -> Any:
    """The value as JSON has it: keys are text, and numbers that are not finite, which it cannot say, are None."""
    if isinstance(value, dict):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings within settings one by one, under names such as "recipe.steps"."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(data: Any, *keys: str) -> float | None:
    """The number under these keys; None where one of them is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, int | float) else None


def full_technique(results: Results) -> dict[str, Any]:
    """The technique that ratios are taken to: the first of kind "full"; empty where there is none."""
    return next((one for one in results.get("techniques", []) if one.get("kind") == "full"), {})


def lengths(results: Results, field: str = "latency") -> list[str]:
    """The lengths at which anything has this field, in ascending order, as the keys they are."""
    measured = [*results.get("techniques", []), results.get("reference", {})]
    return sorted({length for one in measured for length in one.get(field, {}) if length.isdigit()}, key=int)


def corpora(results: Results) -> list[str]:
    """The corpora, the main one first: the one of the settings, then as in "corpora", then those only scores name."""
    scored = (name for one in results.get("techniques", []) for name in one.get("scores", {}))
    named = list(dict.fromkeys([*results.get("corpora", {}), *scored]))
    main = results.get("config", {}).get("corpus")
    return sorted(named, key=lambda name: name != main)


def latency_ratio(results: Results, measured: dict[str, Any], length: str) -> float | None:
    """The latency of a technique, or of the reference, as a ratio to full's at this length."""
    return _ratio(number(measured, "latency", length, "median"), _of_full(results, "latency", length, "median"))


def front(results: Results, length: str, corpus: str, metric: str) -> list[str]:
    """Names of the techniques that no other is as good as in one of error and latency and better than in the other.

    Errors are compared as `loss` has them. Fastest first. For CER on the main corpus it is the study's own list,
    where it has one.
    """
    points = []
    for one in results.get("techniques", []):
        seconds = number(one, "latency", length, "median")
        if seconds is not None and number(one, "scores", corpus, metric) is not None:
            points.append((seconds, loss(one, corpus, metric), one["name"]))
    given = results.get("fronts", {}).get(length)
    if given is not None and metric == "cer" and corpora(results)[:1] == [corpus]:
        return [name for _, _, name in sorted(points) if name in given]
    return [
        name
        for seconds, error, name in sorted(points)
        if not any(s <= seconds and e <= error and (s, e) != (seconds, error) for s, e, _ in points)
    ]


def loss(technique: Mapping[str, Any], corpus: str, metric: str) -> float:
    """Error rate above full attention's with the same seeds, 0 for full; the rate where it was not compared."""
    scores = technique["scores"][corpus]
    if "against_full" in scores:
        return scores["against_full"][metric]["difference"]
    return 0.0 if technique.get("kind") == "full" else scores[metric]


def technique_grid(results: Results) -> Grid:
    """The table of all techniques: ratios to full, the figures behind them in small print."""
    techniques = results.get("techniques", [])
    named = corpora(results)
    times, stored = lengths(results), lengths(results, "memory")
    counted = _flops_length(techniques)
    steps = list(dict.fromkeys(key for one in techniques for key in one.get("training_step", {})))
    steps.sort(key=lambda key: int(key) if key.isdigit() else -1)
    columns = [Column("technique", numeric=False), Column("positions", numeric=False)]
    columns += [_cost("parameters"), _cost("FLOPs", counted)]
    for corpus in named or [""]:
        titles = ("CER", "WER", "CER against full", "WER against full")
        columns += [Column(title, corpus, corpus, "accuracy") for title in titles]
    columns += [_cost("latency", length) for length in times or [""]]
    columns += [_cost("peak memory", length) for length in stored or [""]]
    columns += [_cost("training step", key) for key in steps or [""]]
    columns.append(Column("formula from", numeric=False))

    rows = []
    for one in techniques:
        cells = [_name(results, one), Cell(one.get("positions", NOT_MEASURED))]
        cells.append(_scaled(results, one, ("parameters",), lambda n: f"{n / 1e6:.2f} M"))
        cells.append(_scaled(results, one, ("flops", counted), lambda n: f"{n / 1e9:.3g} GFLOP"))
        for corpus in named or [""]:
            scores = one.get("scores", {}).get(corpus, {})
            cells += [_rate(scores, metric) for metric in ("cer", "wer")]
            cells += [_against(one, scores, metric) for metric in ("cer", "wer")]
        cells += [_timed(results, one, "latency", length) for length in times or [""]]
        cells += [_scaled(results, one, ("memory", length), _mebibytes) for length in stored or [""]]
        cells += [_timed(results, one, "training_step", key) for key in steps or [""]]
        cells.append(Cell(one.get("source", NOT_MEASURED)))
        rows.append(cells)
    if "reference" in results:
        reference = results["reference"]
        same = Cell("as full")
        cells = [Cell("transformers (sdpa)", "the library's full attention", mark="reference"), Cell("kept")]
        cells += [same, _scaled(results, reference, ("flops", counted), lambda n: f"{n / 1e9:.3g} GFLOP")]
        cells += [same] * (4 * len(named or [""]))
        cells += [_timed(results, reference, "latency", length) for length in times or [""]]
        cells += [_scaled(results, reference, ("memory", length), _mebibytes) for length in stored or [""]]
        cells += [_timed(results, reference, "training_step", key) for key in steps or [""]]
        rows.append([*cells, Cell("transformers")])
    return Grid(columns, rows)


def longer_grid(results: Results) -> Grid:
    """Techniques trained by the longer recipe, beside what the recipe of all made of them."""
    corpus = next(iter(corpora(results)), "")
    columns = [Column("technique", numeric=False)]
    columns += [Column(title, corpus) for title in ("CER", "WER", "CER against full", "WER against full")]
    columns.append(Column("CER", "by the recipe of all"))
    before: dict[str, dict[str, Any]] = {one["name"]: one for one in results.get("techniques", [])}
    rows = []
    for one in results.get("longer", {}).get("techniques", []):
        scores = one.get("scores", {}).get(corpus, {})
        cells = [Cell(one.get("title", one["name"]), one["name"], mark=one.get("kind", "other"))]
        cells += [_rate(scores, metric) for metric in ("cer", "wer")]
        cells += [_against(one, scores, metric) for metric in ("cer", "wer")]
        cells.append(_rate(before.get(one["name"], {}).get("scores", {}).get(corpus, {}), "cer"))
        rows.append(cells)
    return Grid(columns, rows)


def all_runs(results: Results) -> list[dict[str, Any]]:
    """Every training run, those by the longer recipe last."""
    return [*results.get("runs", []), *results.get("longer", {}).get("runs", [])]


def corpus_grid(results: Results) -> Grid:
    """What each corpus holds and whose it is."""
    header = ["corpus", "language", "test utterances", "test words", "minutes of training speech", "attribution"]
    rows = [
        [
            Cell(name),
            Cell(str(one.get("language", NOT_MEASURED))),
            *(_count(one.get(key)) for key in ("test_utterances", "test_words", "train_minutes")),
            Cell(str(one.get("attribution", NOT_MEASURED))),
        ]
        for name, one in results.get("corpora", {}).items()
    ]
    return Grid(_columns(header, numeric=("test utterances", "test words", "minutes of training speech")), rows)


def run_grid(runs: Sequence[dict[str, Any]]) -> Grid:
    """Training runs, those that did not finish first."""
    order = {"failed": 0, "not run": 1}
    rows = []
    for run in sorted(runs, key=lambda run: order.get(str(run.get("state")), 2)):
        seconds = number(run, "seconds")
        rows.append(
            [
                Cell(str(run.get("technique", ""))),
                Cell(str(run.get("corpus", ""))),
                Cell(str(run.get("seed", "")), value=number(run, "seed")),
                Cell(str(run.get("state", "")), str(run.get("error", "")), mark=str(run.get("state", ""))),
                _count(run.get("steps")),
                Cell(NOT_MEASURED) if seconds is None else Cell(f"{seconds / 60:.1f}", value=seconds),
                Cell(str(run.get("commit", NOT_MEASURED))),
                Cell(", ".join(str(run[key]) for key in ("processor", "instructions") if key in run) or NOT_MEASURED),
            ]
        )
    header = ["technique", "corpus", "seed", "state", "steps", "minutes", "commit", "machine"]
    return Grid(_columns(header, numeric=("seed", "steps", "minutes")), rows)


def paper_grid(results: Results) -> Grid:
    """Published claims beside what was measured here."""
    keys = {"claim": "claim", "source": "source", "published": "published", "ours": "here", "differs": "what differs"}
    rows = [[Cell(str(paper.get(key, NOT_MEASURED))) for key in keys] for paper in results.get("papers", [])]
    return Grid(_columns(list(keys.values())), rows)


def speed_grid(results: Results) -> Grid:
    """How many times as fast as full every technique is at every length."""
    times = lengths(results)
    rows = []
    measured = [(one["name"], one) for one in results.get("techniques", [])]
    for name, one in [*measured, ("transformers (sdpa)", results.get("reference", {}))]:
        ratios = [latency_ratio(results, one, length) for length in times]
        if any(ratio is not None for ratio in ratios):
            rows.append([Cell(name), *(_faster(ratio) for ratio in ratios)])
    return Grid([Column("technique", numeric=False), *(Column(f"T = {length}") for length in times)], rows)


def breakdown_grid(measured: dict[str, dict[str, float | None]]) -> Grid:
    """Milliseconds of every part at every length, and its share of the sum."""
    times = sorted(measured, key=int)
    names = list(dict.fromkeys(part for length in times for part in measured[length]))
    sums = {length: sum(seconds or 0 for seconds in measured[length].values()) for length in times}
    rows = []
    for name in names:
        cells = [Cell(part_label(name))]
        for length in times:
            seconds = number(measured, length, name)
            share = f"{seconds / sums[length]:.0%}" if seconds is not None and sums[length] else ""
            cells.append(Cell(NOT_MEASURED) if seconds is None else Cell(share, f"{1000 * seconds:.2f} ms", seconds))
        rows.append(cells)
    total = [Cell("100%", f"{1000 * sums[length]:.2f} ms", sums[length]) for length in times]
    rows.append([Cell("all parts"), *total])
    return Grid([Column("part", numeric=False), *(Column(f"T = {length}") for length in times)], rows)


def part_label(part: str) -> str:
    """How a part of the breakdown is shown; names that are not of `PARTS` stay as they are."""
    return PARTS.get(part, part)


def part_family(part: str) -> str:
    """What a part belongs to: "map" is what a reusing layer leaves out, "values" what it still does."""
    keys = {label: key for key, label in PARTS.items()}
    key = keys.get(part, part)
    return "map" if key in _MAP_PARTS else "values" if key in _VALUE_PARTS else "other"


def grouping(technique: dict[str, Any]) -> tuple[int, int] | None:
    """How many layers compute all heads of their map, and how many layers there are; None for an unknown name."""
    try:
        plan = getattr(parse(technique["name"]), "plan", None)
    except ValueError:
        return None
    return None if plan is None else (sum(plan.computes(layer) for layer in range(plan.num_layers)), plan.num_layers)


def percent(rate: float | None) -> str:
    """A rate in per cent."""
    return NOT_MEASURED if rate is None else f"{rate:.1%}"


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _of_full(results: Results, *keys: str) -> float | None:
    return number(full_technique(results), *keys)


def _scaled(results: Results, one: dict[str, Any], keys: tuple[str, ...], show: Any) -> Cell:
    """A figure as a ratio to full's; by itself where full has none."""
    found = number(one, *keys)
    if found is None:
        return Cell(NOT_MEASURED)
    ratio = _ratio(found, _of_full(results, *keys))
    return (
        Cell(show(found), "full not measured", found) if ratio is None else Cell(f"{ratio:.2f}", show(found), ratio)
    )


def _timed(results: Results, one: dict[str, Any], field: str, key: str) -> Cell:
    spread = number(one, field, key, "spread")

    def show(seconds: float) -> str:
        return time(seconds) + ("" if spread is None else f" ± {spread:.0%}")

    return _scaled(results, one, (field, key, "median"), show)


def time(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _mebibytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:.3g} MiB" if nbytes < 1000 * 2**20 else f"{nbytes / 2**20:,.0f} MiB"


def _cost(title: str, at: str = "") -> Column:
    where = f"T = {at}" if at.isdigit() else at
    return Column(title, ", ".join(filter(None, ("÷ full's", where))), about="cost")


def _flops_length(techniques: list[dict[str, Any]]) -> str:
    counted = {length for one in techniques for length in one.get("flops", {})}
    return "1000" if "1000" in counted else max(counted, key=int, default="")


def _name(results: Results, one: dict[str, Any]) -> Cell:
    fronts = [length for length, names in results.get("fronts", {}).items() if one["name"] in names]
    at = "every T" if len(fronts) > 1 and len(fronts) == len(results["fronts"]) else f"T = {', '.join(fronts)}"
    name = one["name"] if len(one["name"]) <= _LONGEST_NAME else f"{one['name'][: _LONGEST_NAME - 1]}…"
    small = name + (f" · front at {at}" if fronts else "")
    return Cell(one.get("title", one["name"]), small, mark=one.get("kind", "other"))


def _rate(scores: dict[str, Any], metric: str) -> Cell:
    rate = number(scores, metric)
    if rate is None:
        return Cell(NOT_MEASURED)
    seeds = scores.get("seeds") or []
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}" if seeds else ""
    small = " · ".join(filter(None, (_interval(scores.get(f"{metric}_interval"), percent), counted)))
    return Cell(percent(rate), small, rate)


def _against(one: dict[str, Any], scores: dict[str, Any], metric: str) -> Cell:
    if one.get("kind") == "full":
        return Cell("–", value=0.0)
    found = scores.get("against_full", {}).get(metric, {})
    difference = number(found, "difference")
    if difference is None:
        return Cell(NOT_MEASURED)
    judged = str(found.get("found", ""))
    small = f"{points(difference)} {_interval(found.get('interval'), points)} points".replace("  ", " ")
    return Cell(judged, small, difference, mark=judged)


def _interval(ends: Any, show: Any) -> str:
    if not ends or None in ends:
        return ""
    return f"[{show(ends[0])}, {show(ends[1])}]"


def _faster(ratio: float | None) -> Cell:
    return Cell(NOT_MEASURED) if not ratio else Cell(f"{1 / ratio:.2f}×", value=1 / ratio)


def _count(found: Any) -> Cell:
    if not isinstance(found, int | float):
        return Cell(NOT_MEASURED)
    return Cell(f"{found:,.1f}" if isinstance(found, float) else f"{found:,}", value=found)


def _columns(titles: list[str], numeric: tuple[str, ...] = ()) -> list[Column]:
    return [Column(title, numeric=title in numeric) for title in titles]
