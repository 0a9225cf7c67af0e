"""`bench`: the latency of a model under every contestant, interleaved in one process and checked for agreement."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from mapreuse.console import check_number, tracked
from mapreuse.exporting import check_runtime
from mapreuse.maps import STORAGES, plain_operators
from mapreuse.measure._calls import (
    call_of,
    num_graph_breaks,
    num_graphs,
    storage_choices,
    training_step,
    valid_positions,
)
from mapreuse.measure._contestants import (
    ALL_KINDS,
    ATTENTIONS,
    SHARING,
    Attention,
    Batch,
    Contestant,
    Exports,
    contestants,
    named_batches,
    split_plans,
)
from mapreuse.measure._flops import flop_counter
from mapreuse.measure._latency import Latency, cpu_threads, fastest_threads, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._memory import Killed, peak_memory
from mapreuse.models import copy_with_same_weights, find_stack, plan_of

_MAX_DISAGREEMENT = 1e-4
"""Maximum of max |output − reference| / max |reference| for contestants in float32."""
_STORAGE_TOLERANCE = {"dense16": 1e-3, "dense8": 1e-2, "auto": 1e-2}
_MAX_REFERENCE_LENGTH = 2048
"""Maximum length compared with PyTorch operators. Contestants on longer inputs are compared with one another."""
_PRECISION_FACTOR = 40
"""In half precision, outputs may differ by this multiple of the type's precision."""


def bench(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Batch],
    *,
    plans: str = "",
    kinds: Sequence[str] | None = None,
    storages: Sequence[str] = ("dense",),
    attentions: Mapping[str, Attention] | None = None,
    repeats: int = 7,
    threads: int | None = None,
    training: bool = False,
    memory: Callable[[Contestant, str], int] | None = None,
    calibration: Sequence[Batch] | None = None,
    exports: str | Path | None = None,
    max_seconds: float = math.inf,
) -> dict[str, Any]:
    """Measure the latency of a model as it is, with shared maps, compiled, and in OpenVINO and ONNX Runtime.

    Contestants take turns in one process (`time_interleaved`). Before a contestant is timed on a batch, its output is
    compared with a reference that has the same plan and uses PyTorch operators only; above 2048 positions, with the
    same plan in PyTorch. In training, gradients are compared, without dropout. If a contestant fails or disagrees,
    the result holds the reason, and the other contestants are measured. Outputs of int8 models are not expected to
    agree; their error is reported.

    Args:
        model: a model that `apply` accepts. It is not changed. Its device and dtype are those of the benchmark.
        batches: keyword dictionaries for the model's forward. Each is timed by itself. A mapping gives them names.
        plans: notations for `ReusePlan.parse`, separated by commas, such as "full,4x4". By default: full, groups of 2
            and 4, and two groups.
        kinds: "eager" and "sdpa" (attention of `transformers`), a name in `attentions`, or "mapreuse"; each also with
            `+optimize` (see `optimize`), `+compile` (`torch.compile`), both, `+openvino`, `+onnx` (see `export`),
            `+openvino+int8` or `+onnx+int8`; "mapreuse" also `+openvino+kernels` and `+openvino+kernels+int8`. None:
            all of them for which packages are installed; in training, "sdpa" and "mapreuse".
        storages: storages of shared maps, as for `apply`.
        attentions: other attention implementations: functions that change the attention of a model in place.
        repeats: number of timed calls for each contestant and batch.
        threads: CPU threads of all contestants. None: the faster of one and all for this model, measured first.
        training: time forward and backward in training mode instead of a forward pass.
        memory: called with a contestant and the name of a batch to measure peak memory in bytes; see
            `memory_in_fresh_process` and `contestant_memory`.
        calibration: batches for int8; None: `batches`.
        exports: directory that keeps exported models. Models that are there are not exported again. None: a temporary
            directory.
        max_seconds: a contestant whose first run on a batch takes longer is not timed again. That run is its result,
            and it does not run on later batches.

    Returns:
        JSON-compatible results: `machine`, `model`, `config`, and for each name in `batches`:

        - `contestants`, for each one `median`, `spread` and `seconds`; `agreement`, its distance from the reference;
          `int8_error`, ‖int8 − float32‖ / ‖float32‖ for the same plan; `flops` of the reference; `memory_bytes`;
          `graph_breaks` if compiled; `chosen_storage` and `choice` for storage "auto"; or `not_measured`, the reason;
        - `ratios`: the speed-up of each contestant over those that share no maps, the median over repeats of the
          quotient of two times, with its spread;
        - `compiled_while_timed`: the number of graphs that were compiled too late. It should be 0.

        `config` has `threads`, and `thread_seconds`, the latency of the model with one thread and with all, if
        `threads` was None.

    Raises:
        ValueError: if an argument is invalid, or the model already shares maps.
        ModuleNotFoundError: if a kind was named whose packages are missing.
    """
    if plan_of(model) is not None:
        raise ValueError("the model already shares attention maps; pass the original model and the plan")
    check_number("repeats", repeats, 1, whole=True)
    if threads is not None:
        check_number("threads", threads, 1, whole=True)
    for storage in storages:
        if storage not in (*STORAGES, "auto"):
            raise ValueError(f"storages must be some of {', '.join(STORAGES)}, auto; got {storage!r}")
    notations = split_plans(plans, len(find_stack(model).layers))
    attentions = ATTENTIONS | dict(attentions or {})
    chosen = kinds if kinds is not None else ("sdpa", SHARING) if training else ALL_KINDS
    entries = contestants(chosen, notations, storages, attentions)
    named = named_batches(batches)
    if not named or not entries or not storages:
        raise ValueError("bench needs at least one batch, one contestant, one plan and one storage")
    if training and any(entry.runtime for entry in entries):
        raise ValueError("runtimes cannot train; leave +openvino and +onnx out, or do not time training steps")
    skipped = _without_packages(entries, must_run=kinds is not None)
    parameter = next(model.parameters())
    seconds: dict[str, float] = {}
    if threads is None and parameter.device.type == "cpu":
        median = sorted(named.values(), key=_size)[len(named) // 2]
        threads, seconds = fastest_threads(partial(call_of(copy_with_same_weights(model).eval(), False), median))
    settings = {
        "plans": notations,
        "kinds": tuple(chosen),
        "storages": tuple(storages),
        "repeats": repeats,
        "threads": threads,
        "thread_seconds": seconds,
        "max_seconds": None if math.isinf(max_seconds) else max_seconds,
        "training": training,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }
    # Each contestant compiles its own code. Beyond the default limit, PyTorch would run the next ones uncompiled.
    limits: dict[str, Any] = {
        "recompile_limit": 1024,
        "accumulated_recompile_limit": 16384,
        "fail_on_recompile_limit_hit": True,
    }
    with cpu_threads(threads), torch._dynamo.config.patch(limits), tempfile.TemporaryDirectory() as temporary:
        exported = exports_in(exports or temporary, named, calibration, threads)
        run = _Bench(model, entries, attentions, repeats, training, memory, exported, max_seconds, skipped)
        return {
            "schema": 3,
            "machine": machine(),
            "model": type(model).__name__,
            "config": settings,
            "batches": {name: run.on(name, batch) for name, batch in named.items()},
        }


def contestant_memory(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Batch],
    name: str,
    contestant: Contestant,
    *,
    attentions: Mapping[str, Attention] | None = None,
    threads: int | None = None,
    exports: str | Path | None = None,
) -> int:
    """Peak memory, in bytes, of a forward pass in addition to weights and inputs; call it in a fresh process.

    Args:
        model, batches, attentions, threads: as for `bench`.
        exports: the directory with the exported models of `bench`.
        name: name of the batch.
        contestant: the contestant that runs.
    """
    named = named_batches(batches)
    batch = named[name]
    with tempfile.TemporaryDirectory() as temporary:
        exported = exports_in(exports or temporary, named, None, threads)
        built = contestant.build(model, ATTENTIONS | dict(attentions or {}), exported).eval()
    call = call_of(built, contestant.compiled)
    with cpu_threads(threads), torch.inference_mode():
        if contestant.compiled or contestant.kind not in (*ATTENTIONS, SHARING):
            call(batch)  # compiles
        return peak_memory(partial(call, batch), next(model.parameters()).device.type)


def disagreement(output: Tensor, reference: Tensor) -> float:
    """max |output − reference| / max |reference|; infinite if the output is not finite."""
    difference = ((output.float() - reference.float()).abs().max() / reference.float().abs().max()).item()
    return math.inf if math.isnan(difference) else difference


@dataclass
class _Bench:
    model: nn.Module
    entries: list[Contestant]
    attentions: Mapping[str, Attention]
    repeats: int
    training: bool
    memory: Callable[[Contestant, str], int] | None
    exports: Exports
    max_seconds: float
    skipped: Mapping[Contestant, str]
    models: dict[Contestant, nn.Module] = field(default_factory=dict)
    slow: dict[Contestant, str] = field(default_factory=dict)

    def on(self, name: str, batch: Batch) -> dict[str, Any]:
        """Results on one batch."""
        torch.compiler.reset()
        cells = {entry: asdict(entry) for entry in self.entries}
        for entry, reason in (*self.skipped.items(), *self.slow.items()):
            cells[entry]["not_measured"] = reason
        if self.memory is not None:
            for entry in tracked(
                f"Memory, {name}", [one for one in self.entries if "not_measured" not in cells[one]]
            ):
                cells[entry] |= self._memory(entry, name)
        singles = dict[str, Latency]()
        calls = self._checked(name, batch, cells, singles)
        graphs = num_graphs()
        measured = time_interleaved(
            {entry.name: call for entry, call in calls.items()},
            repeats=self.repeats,
            single_from=1.0,
            device=next(self.model.parameters()).device.type,
            title=f"Timing, {name}",
        )
        measured |= singles
        timed = [entry for entry in self.entries if entry.name in measured]
        for entry in timed:
            cells[entry] |= measured[entry.name].data()
        return {
            "contestants": {entry.name: cell for entry, cell in cells.items()},
            "ratios": _ratios(timed, measured),
            "compiled_while_timed": num_graphs() - graphs,
        }

    def _memory(self, entry: Contestant, name: str) -> dict[str, Any]:
        assert self.memory is not None
        try:
            if entry.runtime:
                self._built(entry)  # exported here, not in the process that measures
            return {"memory_bytes": self.memory(entry, name)}
        except Killed as error:
            return {"not_measured": str(error), "memory_not_measured": str(error)}
        except (RuntimeError, ValueError) as error:
            return {"memory_not_measured": str(error)}

    def _checked(
        self, name: str, batch: Batch, cells: dict[Contestant, dict[str, Any]], singles: dict[str, Latency]
    ) -> dict[Contestant, Callable]:
        """Run each contestant once, compile it, and compare it with the reference of its plan.

        The times of runs that took longer than `max_seconds` are added to `singles`.
        """
        calls: dict[Contestant, Callable[[], object]] = {}
        references: dict[str, tuple[Contestant, Tensor, int | None]] = {}
        valid: Tensor | None = None
        for entry in tracked(f"First runs, {name}", self.entries):
            cell = cells[entry]
            if "not_measured" in cell:
                continue
            try:
                model = self._built(entry)
                if valid is None:
                    valid = valid_positions(self.model, batch)
                breaks = num_graph_breaks()
                call = call_of(model, entry.compiled)
                start = time.perf_counter()
                with storage_choices() as choices:
                    output = self._probe(model, call, batch, valid)
                taken = time.perf_counter() - start
                if entry.plan not in references:
                    references[entry.plan] = (entry, *self._reference(entry, batch, valid, output))
                first, reference, cell["flops"] = references[entry.plan]
                cell["agreement"] = disagreement(output, reference)
                if entry.int8:
                    cell["int8_error"] = ((output - reference).norm() / reference.norm()).item()
                if choices:
                    cell |= {"chosen_storage": choices[-1].storage, "choice": str(choices[-1])}
                if entry.compiled:
                    cell["graph_breaks"] = num_graph_breaks() - breaks
                tolerance = self._tolerance(entry, first)
                if cell["agreement"] > tolerance and not (entry.int8 and math.isfinite(cell["agreement"])):
                    raise ValueError(
                        f"differs from {first.name} by {cell['agreement']:.1e}, more than {tolerance:.1e}"
                    )
                if taken > self.max_seconds and not entry.compiled:
                    singles[entry.name] = Latency((taken,))
                    self.slow[entry] = f"one run on {name} took {taken:.0f} s, more than {self.max_seconds:g} s"
                    continue
                run = partial(training_step, model, call) if self.training else call
                calls[entry] = partial(run, batch)
                if self.training:
                    calls[entry]()  # compiles the backward pass in training mode
            except (RuntimeError, ValueError, ImportError) as error:  # the compiler raises all of them
                line = (str(error).strip().splitlines() or [""])[0]
                cell["not_measured"] = f"{type(error).__name__}: {line}"[:200]
        return calls

    def _reference(self, entry: Contestant, batch: Batch, valid: Tensor, output: Tensor) -> tuple[Tensor, int | None]:
        """The output of the same plan computed with PyTorch operators only, and their FLOPs.

        For very long inputs, it is the output in PyTorch with any operators.
        """
        model = self._built(entry.in_pytorch)
        if valid.shape[1] > _MAX_REFERENCE_LENGTH:
            return self._probe(model, call_of(model, False), batch, valid) if entry.runtime else output, None
        with plain_operators(), flop_counter(model) as counter:
            reference = self._probe(model, call_of(model, compiled=False), batch, valid)
        return reference, counter.get_total_flops()

    def _built(self, entry: Contestant) -> nn.Module:
        uncompiled = replace(entry, compiled=False)
        if uncompiled not in self.models:
            self.models[uncompiled] = self._build(uncompiled)
        return self.models[uncompiled]

    def _build(self, entry: Contestant) -> nn.Module:
        built = entry.build(self.model, self.attentions, self.exports)
        for module in built.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0  # the statistics of all contestants stay equal during training steps
        return built.train(self.training)

    def _tolerance(self, entry: Contestant, reference: Contestant) -> float:
        precision = torch.finfo(next(self.model.parameters()).dtype).eps
        storages = (_STORAGE_TOLERANCE.get(one.storage, 0.0) for one in (entry, reference))
        return max(_MAX_DISAGREEMENT, _PRECISION_FACTOR * precision, *storages)

    def _probe(self, model: nn.Module, call: Callable[[Batch], Tensor], batch: Batch, valid: Tensor) -> Tensor:
        """The output without padding; in training, gradients without dropout."""
        if not self.training:
            with torch.inference_mode():
                output = call(batch)
            return output[valid] if output.shape[:2] == valid.shape else output
        model.eval()
        try:
            return training_step(model, call, batch, keep=True)
        finally:
            model.train()


def exports_in(
    directory: str | Path, named: Mapping[str, Batch], calibration: Sequence[Batch] | None, threads: int | None
) -> Exports:
    """Exports made from the smallest batch: checks at other shapes then cost little."""
    batches = list(named.values())
    return Exports(Path(directory), min(batches, key=_size), calibration or batches, threads)


def _size(batch: Batch) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


def _without_packages(entries: list[Contestant], *, must_run: bool) -> dict[Contestant, str]:
    """The contestants whose packages, or C++ compiler, are missing, with the reason."""
    skipped = {}
    for entry in entries:
        try:
            if entry.runtime:
                check_runtime(entry.runtime, int8=entry.int8, kernels=entry.kernels)
        except (ModuleNotFoundError, ValueError) as error:
            if must_run:
                raise
            skipped[entry] = str(error)
    return skipped


def _ratios(timed: list[Contestant], measured: dict[str, Latency]) -> dict[str, dict[str, dict[str, float]]]:
    others = [entry.name for entry in timed if entry.plan == "full"]
    return {
        entry.name: {
            other: measured[entry.name].speed_up_over(measured[other]) for other in others if other != entry.name
        }
        for entry in timed
    }
