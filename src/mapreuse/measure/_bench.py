"""`bench`: the latency of a model under every contestant, interleaved in one process and checked for agreement."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from mapreuse.console import check_number, tracked
from mapreuse.maps import STORAGES, StorageChoice, plain_operators
from mapreuse.measure._contestants import (
    ATTENTIONS,
    SHARING,
    Attention,
    Batch,
    Contestant,
    contestants,
    named_batches,
    split_plans,
)
from mapreuse.measure._flops import flop_counter
from mapreuse.measure._latency import Latency, cpu_threads, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._memory import Killed, peak_memory
from mapreuse.models import find_stack, not_padding, plan_of, recorded_states

_MAX_DISAGREEMENT = 1e-4
"""Maximum of max |output − reference| / max |reference| for contestants in float32."""
_STORAGE_TOLERANCE = {"dense16": 1e-3, "dense8": 1e-2, "auto": 1e-2}
_MAX_REFERENCE_LENGTH = 4096
"""Maximum length compared with the reference. Contestants on longer inputs are compared with one another."""
_PRECISION_FACTOR = 40
"""In half precision, outputs may differ by this multiple of the type's precision."""


def bench(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Batch],
    *,
    plans: str = "",
    kinds: Sequence[str] = ("sdpa", "sdpa+optimize", "mapreuse", "mapreuse+optimize"),
    storages: Sequence[str] = ("dense",),
    attentions: Mapping[str, Attention] | None = None,
    repeats: int = 7,
    threads: int | None = None,
    training: bool = False,
    memory: Callable[[Contestant, str], int] | None = None,
) -> dict[str, Any]:
    """Measure the latency of a model as it is, with shared maps, and with other attention implementations.

    Contestants take turns in one process (`time_interleaved`). Before a contestant is timed on a batch, its output is
    compared with a reference that has the same plan and uses PyTorch operators only; above 4096 positions, with the
    first contestant of the same plan. In training, gradients are compared, without dropout. If a contestant fails or
    disagrees, the result holds the reason, and the other contestants are measured.

    Args:
        model: a model that `apply` accepts. It is not changed. Its device and dtype are those of the benchmark.
        batches: keyword dictionaries for the model's forward. Each is timed by itself. A mapping gives them names.
        plans: notations for `ReusePlan.parse`, separated by commas, such as "full,4x4". By default: full, groups of 2
            and 4, and two groups.
        kinds: "eager" and "sdpa" (attention of `transformers`), a name in `attentions`, or "mapreuse"; each also with
            `+optimize` (see `optimize`), `+compile` (`torch.compile`), or both.
        storages: storages of shared maps, as for `apply`.
        attentions: other attention implementations: functions that change the attention of a model in place.
        repeats: number of timed calls for each contestant and batch.
        threads: CPU threads; None for PyTorch's default.
        training: time forward and backward in training mode instead of a forward pass.
        memory: called with a contestant and the name of a batch to measure peak memory in bytes; see
            `memory_in_fresh_process` and `contestant_memory`.

    Returns:
        JSON-compatible results: `machine`, `model`, `config`, and for each name in `batches`:

        - `contestants`, for each one `median`, `spread` and `seconds`; `agreement`, its distance from the reference;
          `flops` of the reference; `memory_bytes`; `graph_breaks` if compiled; `chosen_storage` and `choice` for
          storage "auto"; or `not_measured`, the reason;
        - `ratios`: the speed-up of each contestant over those that share no maps, the median over repeats of the
          quotient of two times, with its spread;
        - `compiled_while_timed`: the number of graphs that were compiled too late. It should be 0.

    Raises:
        ValueError: if an argument is invalid, or the model already shares maps.
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
    entries = contestants(kinds, notations, storages, attentions)
    named = named_batches(batches)
    if not named or not entries or not storages:
        raise ValueError("bench needs at least one batch, one contestant, one plan and one storage")
    parameter = next(model.parameters())
    settings = {
        "plans": notations,
        "kinds": tuple(kinds),
        "storages": tuple(storages),
        "repeats": repeats,
        "threads": threads,
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
    with cpu_threads(threads), torch._dynamo.config.patch(limits):
        run = _Bench(model, entries, attentions, repeats, training, memory)
        return {
            "schema": 2,
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
) -> int:
    """Peak memory, in bytes, of a forward pass in addition to weights and inputs; call it in a fresh process.

    Args:
        model, batches, attentions, threads: as for `bench`.
        name: name of the batch.
        contestant: the contestant that runs.
    """
    batch = named_batches(batches)[name]
    call = _call(contestant.build(model, ATTENTIONS | dict(attentions or {})).eval(), contestant.compiled)
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
    models: dict[Contestant, nn.Module] = field(default_factory=dict)

    def on(self, name: str, batch: Batch) -> dict[str, Any]:
        """Results on one batch."""
        torch.compiler.reset()
        cells = {entry: asdict(entry) for entry in self.entries}
        if self.memory is not None:
            for entry in tracked(f"Memory, {name}", self.entries):
                cells[entry] |= self._memory(entry, name)
        calls = self._checked(name, batch, cells)
        graphs = _num_graphs()
        measured = time_interleaved(
            {entry.name: call for entry, call in calls.items()},
            repeats=self.repeats,
            device=next(self.model.parameters()).device.type,
            title=f"Timing, {name}",
        )
        for entry in calls:
            cells[entry] |= measured[entry.name].data()
        return {
            "contestants": {entry.name: cell for entry, cell in cells.items()},
            "ratios": _ratios(list(calls), measured),
            "compiled_while_timed": _num_graphs() - graphs,
        }

    def _memory(self, entry: Contestant, name: str) -> dict[str, Any]:
        assert self.memory is not None
        try:
            return {"memory_bytes": self.memory(entry, name)}
        except Killed as error:
            return {"not_measured": str(error), "memory_not_measured": str(error)}
        except RuntimeError as error:
            return {"memory_not_measured": str(error)}

    def _checked(
        self, name: str, batch: Batch, cells: dict[Contestant, dict[str, Any]]
    ) -> dict[Contestant, Callable]:
        """Run each contestant once, compile it, and compare it with the reference of its plan."""
        calls: dict[Contestant, Callable[[], object]] = {}
        references: dict[str, tuple[Contestant, Tensor, int | None]] = {}
        valid: Tensor | None = None
        for entry in tracked(f"First runs, {name}", self.entries):
            cell = cells[entry]
            if "not_measured" in cell:
                continue
            try:
                uncompiled = replace(entry, compiled=False)
                if uncompiled not in self.models:
                    self.models[uncompiled] = self._build(entry)
                model = self.models[uncompiled]
                if valid is None:
                    valid = _valid(self.model, batch)
                breaks = _num_graph_breaks()
                call = _call(model, entry.compiled)
                with _storage_choices() as choices:
                    output = self._probe(model, call, batch, valid)
                if entry.plan not in references:
                    references[entry.plan] = (entry, *self._reference(model, batch, valid, output))
                first, reference, cell["flops"] = references[entry.plan]
                cell["agreement"] = disagreement(output, reference)
                if choices:
                    cell |= {"chosen_storage": choices[-1].storage, "choice": str(choices[-1])}
                if entry.compiled:
                    cell["graph_breaks"] = _num_graph_breaks() - breaks
                tolerance = self._tolerance(entry, first)
                if cell["agreement"] > tolerance:
                    raise ValueError(
                        f"differs from {first.name} by {cell['agreement']:.1e}, more than {tolerance:.1e}"
                    )
                run = partial(_training_step, model, call) if self.training else call
                calls[entry] = partial(run, batch)
                if self.training:
                    calls[entry]()  # compiles the backward pass in training mode
            except (RuntimeError, ValueError, ImportError) as error:  # the compiler raises all of them
                line = (str(error).strip().splitlines() or [""])[0]
                cell["not_measured"] = f"{type(error).__name__}: {line}"[:200]
        return calls

    def _reference(self, model: nn.Module, batch: Batch, valid: Tensor, output: Tensor) -> tuple[Tensor, int | None]:
        """The output computed with PyTorch operators only, and their FLOPs; for very long inputs, `output` itself."""
        if valid.shape[1] > _MAX_REFERENCE_LENGTH:
            return output, None
        with plain_operators(), flop_counter(model) as counter:
            reference = self._probe(model, _call(model, compiled=False), batch, valid)
        return reference, counter.get_total_flops()

    def _build(self, entry: Contestant) -> nn.Module:
        built = entry.build(self.model, self.attentions)
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
            return _training_step(model, call, batch, keep=True)
        finally:
            model.train()


def _call(model: nn.Module, compiled: bool) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        output = model(**batch)
        return output if isinstance(output, Tensor) else output[0]

    if not compiled:
        return call
    # The compiler caches by code object. With its own, no contestant suffers from the graph breaks of another.
    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, dynamic=False)


def _training_step(model: nn.Module, call: Callable[[Batch], Tensor], batch: Batch, keep: bool = False) -> Tensor:
    """Forward and backward of the loss `mean(output · direction)`, for a fixed random direction.

    The norm of the output would be a useless loss: a final layer norm keeps it constant.
    """
    with torch.inference_mode(False), torch.enable_grad():
        output = call(batch)
        (output * _direction(output.shape, output.dtype, output.device)).mean().backward()
    # Norms are in every contestant, in the same order; projections may be permuted, fused or absent.
    gradients = [
        weights.grad.flatten()
        for name, weights in model.named_parameters()
        if keep and weights.grad is not None and "norm" in name.lower()
    ]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients) if gradients else output.detach()


@functools.cache
def _direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _valid(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad(), recorded_states(model) as (states, masks):
        model(**batch)
    return not_padding(masks[0], states[-1])


@contextlib.contextmanager
def _storage_choices() -> Iterator[list[StorageChoice]]:
    """The choices of storage "auto", from the log."""
    choices: list[StorageChoice] = []

    def collect(record: logging.LogRecord) -> bool:
        choices.extend(argument for argument in record.args or () if isinstance(argument, StorageChoice))
        return True

    logger = logging.getLogger("mapreuse")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.INFO)
    try:
        yield choices
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def _num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _num_graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _ratios(timed: list[Contestant], measured: dict[str, Latency]) -> dict[str, dict[str, dict[str, float]]]:
    others = [entry.name for entry in timed if entry.plan == "full"]
    return {
        entry.name: {
            other: measured[entry.name].speed_up_over(measured[other]) for other in others if other != entry.name
        }
        for entry in timed
    }
