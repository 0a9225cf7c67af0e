"""Where time, FLOPs and bytes of a Conformer go, by length: one layer of each kind, and whole encoders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mapreuse as mr
from mapreuse.console import command_line, console, write_json
from mapreuse.measure import PARTS, Latency, cpu_threads, machine, part_of_modules
from mapreuse.measure import breakdown as torch_breakdown
from mapreuse_lab import models
from mapreuse_lab.benchmarks._openvino_profile import Costs, OpenVinoModel

LENGTHS = (250, 500, 1000, 2000, 4000, 8000, 16000, 30000)
LAYERS, GROUP = 16, 4
"""Layers of the encoder, and layers that share a map."""
MAX_WHOLE = 2000
"""Maximum length at which the whole encoder is measured. Longer ones are sums of layers."""
MAX_DENSE = 16000
"""Maximum length at which PyTorch stores shared maps as they are. Longer ones are stored in 8 bits."""
MAX_MEMORY = 0.6
"""Share of the machine's memory that the largest tensors of a pass may take."""

_SHORT = 16_000
"""Number of layers × positions up to which passes are repeated."""

_Parts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Encoder:
    """An encoder of the comparison.

    Attributes:
        build: makes the encoder with a number of layers.
        inputs: makes inputs of a length.
        argument: name of the inputs.
        has_positions: whether attention has relative positions.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[int], Tensor]
    argument: str
    has_positions: bool


ENCODERS = {
    "conformer-m": Encoder(
        lambda layers: models.conformer_m(num_layers=layers),
        lambda length: models.speech_like_features(length, 1),
        "input_features",
        True,
    ),
    "plain-conformer-m": Encoder(
        lambda layers: models.plain_conformer_m(num_layers=layers),
        lambda length: models.speech_like_states(length, 1),
        "hidden_states",
        False,
    ),
}

CONTESTANTS = ("sdpa", "mapreuse full+optimize", "mapreuse 4x4+optimize", "OpenVINO full", "OpenVINO 4x4")
"""transformers, and the two plans in PyTorch and in OpenVINO."""


@dataclass(frozen=True)
class Piece:
    """One measurement.

    Attributes:
        encoder: name of the encoder.
        contestant: one of `CONTESTANTS`.
        length: number of positions.
        whole: measure the encoder with all layers, instead of one layer of each kind.
    """

    encoder: str
    contestant: str
    length: int
    whole: bool

    @property
    def shares(self) -> bool:
        """Whether layers share maps."""
        return "4x4" in self.contestant

    @property
    def in_openvino(self) -> bool:
        """Whether it runs in OpenVINO."""
        return self.contestant.startswith("OpenVINO")

    @property
    def num_layers(self) -> int:
        """Number of layers of the model that is measured."""
        return LAYERS if self.whole else 1 + self.shares

    @property
    def storage(self) -> str:
        """Storage of the shared maps."""
        return "dense8" if self.shares and not self.in_openvino and self.length > MAX_DENSE else "dense"

    @property
    def repeats(self) -> dict[str, int]:
        """Number of passes."""
        short = self.num_layers * self.length <= _SHORT
        return {"repeats": 3 if short else 1, "warmup": int(short or self.in_openvino)}


def pieces(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Piece]:
    """All measurements, short ones first."""
    for length in lengths:
        for encoder in ENCODERS:
            for contestant in CONTESTANTS:
                if length <= MAX_WHOLE:
                    yield Piece(encoder, contestant, length, True)
                if length >= MAX_WHOLE:
                    yield Piece(encoder, contestant, length, False)


def breakdown_by_length(
    out: Path, work: Path, *, lengths: tuple[int, ...] = LENGTHS, seconds: float | None = None, threads: int = 1
) -> dict[str, Any]:
    """Measure every piece that `out/breakdown.json` does not contain yet, and write it after each one.

    Args:
        out: directory of the results.
        work: directory of exported models, which are kept.
        lengths: numbers of positions.
        seconds: begin no further piece after this time.
        threads: CPU threads.

    Returns:
        The contents of `breakdown.json`: `machine`, `parts`, and `pieces`. Each piece has its fields, `storage`,
        `seconds` and `spread` of the pass, `coverage` (sum of the parts ÷ pass), and costs by part: `outside` the
        layers, in a `computing` layer, and in a `reusing` layer; or `not_measured`, the reason.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "breakdown.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    measured: list[dict[str, Any]] = results.get("pieces", [])
    done = {_key(one) for one in measured}
    missing = [piece for piece in pieces(lengths) if _key(asdict(piece)) not in done]
    for piece in missing:
        if piece.in_openvino:
            _exported(piece, work)
    started = time.monotonic()
    with cpu_threads(threads):
        for piece in missing:
            if seconds is not None and time.monotonic() - started >= seconds:
                console.print("Time is up; run the same command again to continue", highlight=False)
                break
            began = time.monotonic()
            measured.append(asdict(piece) | {"storage": piece.storage} | _measured(piece, work, threads))
            results = {"schema": 1, "command": command_line("mapreuse-lab"), "machine": machine()}
            results |= {"parts": PARTS, "pieces": measured}
            write_json(file, results)
            console.print(f"{piece.encoder}, {piece.contestant}, T = {piece.length}: ", end="", highlight=False)
            console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    return results


def _key(piece: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(piece[name] for name in ("encoder", "contestant", "length", "whole"))


def _measured(piece: Piece, work: Path, threads: int) -> dict[str, Any]:
    encoder = ENCODERS[piece.encoder]
    memory = machine()["memory_gib"]
    limit = MAX_MEMORY * float(memory) * 2**30
    # transformers multiplies all queries by all distances, and copies the products to shift them.
    copies = 2 * 4 * 4 * piece.length * (2 * piece.length - 1)
    if piece.contestant == "sdpa" and encoder.has_positions and copies > limit:
        return _does_not_fit("scores by distance and their copy", copies)
    batch = {encoder.argument: encoder.inputs(piece.length)}
    model = _model(piece)
    if not piece.in_openvino:
        options: dict[str, Any] = {"kinds": ("sdpa",), **piece.repeats}  # ignored if the model has a plan
        (found,) = torch_breakdown(model, {"": batch}, **options)["breakdowns"]
        return _of_pytorch(found)
    parts = part_of_modules(model)
    compiled = OpenVinoModel(_exported(piece, work), batch, parts, threads=threads)
    operator, size = compiled.largest_operator
    if size > limit:
        return _does_not_fit(f"inputs and outputs of {operator}", size)
    profile = compiled.profile(**piece.repeats, length=piece.length)
    return _of_openvino(profile.costs, Latency(profile.seconds), piece)


def _does_not_fit(what: str, size: int) -> dict[str, Any]:
    return {"not_measured": f"{what} take {size / 1e9:.1f} GB", "needed_bytes": size}


def _model(piece: Piece) -> nn.Module:
    """The encoder with its plan; for "sdpa", that of transformers."""
    model = ENCODERS[piece.encoder].build(piece.num_layers)
    if piece.contestant == "sdpa":
        return model
    size = min(GROUP, piece.num_layers) if piece.shares else 1
    mr.apply(model, mr.ReusePlan.parse(f"{size}x{piece.num_layers // size}"), storage=piece.storage)
    return model if piece.in_openvino else mr.optimize(model)


def _exported(piece: Piece, work: Path) -> Path:
    """The directory of the model for OpenVINO, which serves all lengths."""
    encoder = ENCODERS[piece.encoder]
    directory = work / f"{piece.encoder}-{piece.num_layers}-{'shared' if piece.shares else 'full'}"
    if not directory.exists():
        mr.export(_model(piece), directory, {encoder.argument: encoder.inputs(64)}, runtime="openvino")
    return directory


def _of_pytorch(found: dict[str, Any]) -> dict[str, Any]:
    layers = {layer["kind"]: layer for layer in found["layers"]}
    outside = {
        part: {
            count: max(
                0, cost[count] - sum(layer["count"] * layer["parts"][part][count] for layer in layers.values())
            )
            for count in cost
        }
        for part, cost in found["parts"].items()
    }
    whole = found["whole"]
    measured = {"seconds": whole["seconds"], "spread": whole["spread"], "coverage": found["coverage"]}
    return measured | _costs(outside, {kind: layer["parts"] for kind, layer in layers.items()})


def _of_openvino(costs: Costs, whole: Latency, piece: Piece) -> dict[str, Any]:
    group = min(GROUP, piece.num_layers) if piece.shares else 1
    outside: _Parts = {}
    layers: dict[str, _Parts] = {}
    for (layer, part), cost in costs.items():
        into = outside if layer is None else layers.setdefault("reusing" if layer % group else "computing", {})
        total = into.setdefault(part, dict.fromkeys(cost, 0.0))
        reusing = piece.num_layers - piece.num_layers // group
        count = 1 if layer is None else reusing if layer % group else piece.num_layers - reusing
        for name, value in cost.items():
            total[name] += value / count
    attributed = sum(cost["seconds"] for cost in costs.values())
    measured = {"seconds": whole.median, "spread": whole.spread, "coverage": attributed / whole.median}
    return measured | _costs(outside, layers)


def _costs(outside: _Parts, layers: dict[str, _Parts]) -> dict[str, Any]:
    """Costs without the parts that cost nothing."""
    return {
        kind: {part: cost for part, cost in parts.items() if any(cost.values())}
        for kind, parts in {"outside": outside, **layers}.items()
    }


def encoder_costs(piece: Mapping[str, Any]) -> _Parts:
    """Costs of all parts of the encoder with 16 layers: measured, or the sum of its layers."""
    reusing = LAYERS - LAYERS // GROUP if "reusing" in piece else 0
    counts = {"outside": 1, "computing": LAYERS - reusing, "reusing": reusing}
    total: _Parts = {}
    for kind, count in counts.items():
        for part, cost in piece.get(kind, {}).items():
            into = total.setdefault(part, {"seconds": 0.0, "flops": 0.0, "bytes": 0.0})
            for name, value in cost.items():
                into[name] += count * value
    return total
