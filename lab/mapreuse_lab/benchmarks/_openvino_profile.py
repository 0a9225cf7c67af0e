"""Time, FLOPs and bytes of each part of an exported model, from the counters of OpenVINO's operators.

`mapreuse.export` puts the path of its module into the name of each operator. OpenVINO keeps the names of operators
that it fuses, so every operator that runs belongs to a part. Inside an attention module, products open phases, as in
`mapreuse.measure.breakdown`.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

Place: TypeAlias = tuple[int | None, str]
"""Layer (None outside the layers) and part."""

Costs: TypeAlias = dict[Place, dict[str, float]]
"""Seconds, FLOPs and bytes of each part."""

_NORM = "MVN"


@dataclass(frozen=True)
class Profile:
    """What the passes of a model cost.

    Attributes:
        seconds: latency of each pass.
        costs: cost of the parts; times are medians over the passes.
    """

    seconds: tuple[float, ...]
    costs: Costs


class OpenVinoModel:
    """An exported model, compiled for inputs of one shape, with counters.

    Args:
        directory: what `mapreuse.export` wrote with `runtime="openvino"`.
        batch: the inputs.
        parts: the layer and part of modules, by path; see `mapreuse.measure.part_of_modules`.
        threads: CPU threads.
    """

    def __init__(
        self, directory: Path, batch: Mapping[str, Tensor], parts: Mapping[str, Place], *, threads: int
    ) -> None:
        core: Any = importlib.import_module("openvino").Core()
        model = core.read_model(directory / "openvino_model.xml")
        model.reshape({name: list(tensor.shape) for name, tensor in batch.items()})
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
        compiled = core.compile_model(model, "CPU", options)
        self._inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        self._request = compiled.create_infer_request()
        self._operators = [_Operator(node) for node in compiled.get_runtime_model().get_ordered_ops()]
        self._operators.sort(key=lambda one: one.order)
        self._parts = parts

    @property
    def largest_operator(self) -> tuple[str, int]:
        """The operator with the largest inputs and outputs, and their bytes: memory that a pass needs at least."""
        largest = max(self._operators, key=lambda one: one.nbytes)
        return f"{largest.kind} {largest.name}", largest.nbytes

    def profile(self, *, warmup: int, repeats: int, length: int) -> Profile:
        """Run `warmup` + `repeats` passes.

        Args:
            warmup: passes that do not count.
            repeats: passes that count.
            length: number of positions of the hidden states.
        """
        seconds, times = [], list[dict[str, float]]()
        for _ in range(warmup + repeats):
            started = time.perf_counter()
            self._request.infer(self._inputs)
            seconds.append(time.perf_counter() - started)
            times.append({one.node_name: one.real_time.total_seconds() for one in self._request.profiling_info})
        costs: Costs = defaultdict(lambda: {"seconds": 0.0, "flops": 0, "bytes": 0})
        for operator, place in zip(self._operators, places(self._operators, self._parts, length), strict=True):
            found = statistics.median(one.get(operator.name, 0.0) for one in times[warmup:])
            costs[place]["seconds"] += found
            if found:  # the others are views, or fused into their neighbours
                costs[place]["flops"] += operator.flops(length)
                costs[place]["bytes"] += operator.nbytes
        return Profile(tuple(seconds[warmup:]), dict(costs))


class _Operator:
    """An operator of the graph that OpenVINO runs."""

    def __init__(self, node: Any) -> None:
        info = node.get_rt_info()

        def read(key: str) -> str:
            return info[key].astype(str) if key in info else ""

        self.name, self.kind, self.order = node.friendly_name, read("layerType"), int(read("execOrder") or 0)
        self.originals = [name for name in read("originalLayersNames").split(",") if "/" in name]
        self.paths = [name.rpartition("/")[0] for name in self.originals]
        self.producer = node.input_value(0).get_node().friendly_name if node.get_input_size() else ""
        self.consumers = [one.get_node().friendly_name for out in node.outputs() for one in out.get_target_inputs()]
        self.inputs = [_shape(one) for one in node.inputs()]
        self.outputs = [_shape(one) for one in node.outputs()]
        self.nbytes = 0
        if self.kind not in ("Input", "Output", "Const"):
            ports = [*node.inputs(), *node.outputs()]
            sizes = [math.prod(shape) for shape in (*self.inputs, *self.outputs)]
            self.nbytes = sum(size * one.get_element_type().size for size, one in zip(sizes, ports, strict=True))

    @property
    def is_fused_attention(self) -> bool:
        """Whether it computes scores, softmax and context at once."""
        is_subgraph = self.kind == "Subgraph" and any("softmax" in name.lower() for name in self.originals)
        return is_subgraph or self.kind == "ScaledDotProductAttention"

    def flops(self, length: int) -> int:
        """Two for each multiplication with its addition of a product or convolution."""
        if self.kind in ("MatMul", "FullyConnected"):
            return 2 * math.prod(self.outputs[0]) * self.inputs[0][-1]
        if self.kind == "Convolution":
            return 2 * math.prod(self.outputs[0]) * math.prod(self.inputs[1]) // self.outputs[0][1]
        if self.is_fused_attention:
            return 4 * math.prod(self.inputs[0]) * length
        return 0


def places(operators: list[_Operator], parts: Mapping[str, Place], length: int) -> list[Place]:
    """The layer and part of each operator, in the order of execution.

    - A path belongs to the innermost module in `parts` that contains it.
    - OpenVINO multiplies scalars into the weights of linear layers, which then have the name of the scaling outside
      the module: they belong to the part of their input.
    - Norms and changes of the memory format have no path. They belong to the layer of their neighbours.
    """
    found: dict[str, Place] = {}
    phases: dict[int | None, str] = {}
    layers = {one.name: _layer(one, parts) for one in operators}
    for one in operators:
        before = found.get(one.producer, (None, "rest"))
        innermost = max((_place(path, parts) for path in one.paths), key=lambda place: place[2], default=(*before, 0))
        layer, part, _ = innermost
        if one.kind == _NORM:
            layer, part = before[0], "norms"
            if layer is None or before[1] == "norms":
                layer = next((layers[name] for name in one.consumers if layers[name] is not None), layer)
        elif one.kind in ("FullyConnected", "Convolution") and part == "rest":
            layer, part = before
        elif part == "attention":
            # Until the first product, a computing layer prepares its queries, a reusing layer its values.
            first = "query" if (layer, "query") in parts.values() else "context"
            phases[layer] = part = _phase(one, phases.get(layer, first), length)
        found[one.name] = layer, part
    return [found[one.name] for one in operators]


def _phase(operator: _Operator, before: str, length: int) -> str:
    """The phase of attention that an operator belongs to: the last one that was opened, or its own."""
    if operator.kind == "Softmax":
        return "softmax"
    if operator.is_fused_attention:
        return "fused"
    if operator.kind != "MatMul":
        return before
    if operator.inputs[0][-1] == length:
        return "context"
    return "scores" if operator.outputs[0][-1] <= length else "positional_scores"


def _place(path: str, parts: Mapping[str, Place]) -> tuple[int | None, str, int]:
    """Layer, part, and length of the path of the innermost module in `parts` that contains a path."""
    while path:
        if path in parts:
            return *parts[path], len(path)
        path = path.rpartition(".")[0]
    return None, "rest", 0


def _layer(operator: _Operator, parts: Mapping[str, Place]) -> int | None:
    return next(
        (layer for layer, _, _ in (_place(path, parts) for path in operator.paths) if layer is not None), None
    )


def _shape(port: Any) -> tuple[int, ...]:
    return tuple(port.get_partial_shape().to_shape())
