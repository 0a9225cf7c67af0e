"""`bench`: one encoder under every contestant, interleaved in one process, checked before it is timed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from mapreuse.maps import StorageChoice
from mapreuse.measure._config import DTYPES, BenchConfig, Progress, threads_set
from mapreuse.measure._contestants import (
    Contestant,
    build,
    build_definition,
    contestants,
    runner,
    training_step,
)
from mapreuse.measure._encoders import ENCODERS, Encoder
from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._memory import Killed, memory_in_fresh_process, peak_memory

TOLERANCE = 1e-4
"""Greatest max |output − definition| / max |definition| of a contestant that is timed in float32."""
_ROUNDED = {"dense16": 1e-3, "dense8": 1e-2, "auto": 1e-2}
"""What maps that are carried in few bits may differ by."""

_CHECKED_LENGTH = 1000
_WARM_LENGTH = 64


def bench(config: BenchConfig, progress: Progress = lambda doing, done, total: None) -> dict[str, Any]:
    """Time an encoder under every contestant, at every length; contestants take turns in one process, each turn a
    call that settles the process's memory and one that is timed (`time_interleaved`).

    Before it is timed, every contestant is compared with the definition (`transformers`' eager attention, maps shared
    as the plan says) at 1000 frames or the greatest length, and at every length with the first contestant that has
    its plan. In half precision it may be four times as far off as the definition is in that precision. In training,
    gradients are compared, dropout off. A contestant that disagrees or fails is reported with the reason, and the
    others go on.

    Returns:
        What JSON can hold: `machine`, `config`, `command`, `signal` (what the inputs are) and, in `lengths`, for each
        length the `contestants` (`median`, `spread` and all `seconds`, `agreement`, `memory_bytes`, `graph_breaks`
        of compiled ones, `carried` and `choice` where storage "auto" chose, and why; or `not_measured` with the
        reason), the `front` end by itself, and `ratios`: how many times
        as fast each of ours is as others, the median over rounds of the quotient of two times of the same round, with
        its spread. `compiled_while_timed`, graphs compiled after the first runs, should be 0.
    """
    # Every contestant compiles code of its own; past the default limit PyTorch would run the next ones uncompiled.
    limits: dict[str, Any] = {
        "recompile_limit": 1024,
        "accumulated_recompile_limit": 16384,
        "fail_on_recompile_limit_hit": True,
    }
    with threads_set(config.threads), torch._dynamo.config.patch(limits):
        return _Bench(config, progress).run()


def memory_of(config: dict[str, Any], contestant: dict[str, Any], length: int) -> int:
    """Peak memory, in bytes, of one contestant over its weights and inputs; to be called in a fresh process.

    The first call at this length counts; where it compiles code the second, since the first is spent on that.
    """
    entry = Contestant(**contestant)
    arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
    settings = BenchConfig(**arguments)
    with threads_set(settings.threads), torch.inference_mode():
        measured = _Bench(settings)
        call, inputs = measured.call(entry, length)
        warm, small = measured.call(entry.uncompiled, _WARM_LENGTH)
        warm(small)
        if entry.compiles:
            call(inputs)
        return peak_memory(partial(call, inputs), settings.device)


def paired_ratio(slower: Latency, faster: Latency) -> dict[str, float]:
    """Median and relative spread, over rounds, of the quotient of two contestants' times in the same round."""
    quotients = Latency(tuple(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)))
    return {"median": quotients.median, "spread": quotients.spread}


def described(latency: Latency) -> dict[str, Any]:
    """A latency as JSON can hold it."""
    return {"median": latency.median, "spread": latency.spread, "seconds": list(latency.seconds)}


def disagreement(output: Tensor, reference: Tensor) -> float:
    """max |output − reference| / max |reference|; infinite where the output is not finite."""
    difference = ((output.float() - reference.float()).abs().max() / reference.float().abs().max()).item()
    return math.inf if math.isnan(difference) else difference


class _Bench:
    def __init__(self, config: BenchConfig, progress: Progress = lambda doing, done, total: None) -> None:
        self.config = config
        self.spec = ENCODERS[config.encoder]
        self.dtype = DTYPES[config.dtype]
        self.longest = max(*config.lengths, _WARM_LENGTH)
        self.entries = contestants(config.contestants, config.plans, config.storages)
        self.encoders: dict[Contestant, Encoder] = {}
        self.failures: dict[Contestant, str] = {}
        self.agreement: dict[Contestant, float] = {}
        self.graph_breaks: dict[Contestant, int] = {}
        self.choices: dict[Contestant, StorageChoice] = {}
        self.references: dict[str, Tensor] = {}
        self.tolerance = TOLERANCE
        self._progress = progress
        self._done = 0.0

    def run(self) -> dict[str, Any]:
        self._check(min(_CHECKED_LENGTH, max(self.config.lengths)))
        lengths = {str(length): self._length(length) for length in self.config.lengths}
        return {
            "schema": 1,
            "command": self.config.command,
            "machine": machine(),
            "config": asdict(self.config),
            "signal": self.spec.signal,
            "unit": self.spec.unit,
            "lengths": lengths,
        }

    def call(self, entry: Contestant, length: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The call that is timed, and its inputs."""
        encoder, part = self._encoder(entry), self.config.part
        run = runner(encoder, part, compiled=entry.compiled)
        if self.config.training:
            run = training_step(encoder, run)
        return run, self._inputs(length, self.config.batch, part)

    def _encoder(self, entry: Contestant) -> Encoder:
        entry = entry.uncompiled
        if entry not in self.encoders:
            encoder = build(entry, self.spec, self.longest).to(self.config.device, self.dtype)
            for module in encoder.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.momentum = 0.0  # training steps must not drive the contestants' statistics apart
            self.encoders[entry] = encoder.train(self.config.training)
        return self.encoders[entry]

    @cached_property
    def _front(self) -> nn.Module:
        return self.spec.build("sdpa", 1, self.longest).to(self.config.device, self.dtype).front

    def _inputs(self, length: int, batch: int, part: str) -> Tensor:
        """Inputs of one part; for the layers, what the front end makes of its own."""
        with torch.inference_mode(False), torch.no_grad():
            inputs = self.spec.inputs(length, batch).to(self.config.device)
            inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
            return inputs if part == "whole" else self._front(inputs)

    @contextlib.contextmanager
    def _reported(self, entry: Contestant) -> Iterator[None]:
        """Whatever goes wrong with one contestant is kept, as the line that its cell shows; the others go on."""
        try:
            yield
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            self.failures[entry] = f"{type(error).__name__}: {line}"[:200]

    def _running(self) -> list[Contestant]:
        return [entry for entry in self.entries if entry not in self.failures]

    def _check(self, length: int) -> None:
        """Compare every uncompiled contestant with the definition."""
        hidden = self._inputs(length, 1, "layers")
        entries = dict.fromkeys(entry.uncompiled for entry in self.entries)
        for plan in dict.fromkeys(entry.plan for entry in entries):
            definition = build_definition(plan, self.spec, self.longest).to(self.config.device)
            self.references[plan] = reference = self._probe(definition, definition.layers, hidden.float())
            if self.dtype != torch.float32:
                definition.to(self.dtype)
                rounded = disagreement(self._probe(definition, definition.layers, hidden), reference)
                self.tolerance = max(self.tolerance, 4 * rounded)
            for entry in entries:
                if entry.plan == plan:
                    self._advance(f"checking {entry.name}", _rough_seconds(length))
                    with self._reported(entry):
                        encoder = self._encoder(entry)
                        output = self._probe(encoder, encoder.layers, hidden)
                        self._compare(entry, output, reference, f"the definition at length {length}")
        for entry in self.entries:
            if entry.uncompiled in self.failures:
                self.failures[entry] = self.failures[entry.uncompiled]

    def _probe(self, encoder: Encoder, layers: Callable[..., Any], hidden: Tensor) -> Tensor:
        """What is compared: the layers' output, or in training the gradient of their input; dropout off."""
        encoder.eval()
        try:
            if not self.config.training:
                with torch.inference_mode():
                    return _hidden_states(layers(hidden))
            with torch.inference_mode(False), torch.enable_grad():
                hidden = hidden.clone().requires_grad_()
                training_step(encoder, lambda inputs: _hidden_states(layers(inputs)))(hidden)
            assert hidden.grad is not None
            return hidden.grad
        finally:
            encoder.train(self.config.training)

    def _compare(self, entry: Contestant, output: Tensor, reference: Tensor, name: str) -> None:
        difference = disagreement(output, reference)
        self.agreement[entry] = max(difference, self.agreement.get(entry, 0.0))
        tolerance = max(self.tolerance, _ROUNDED.get(entry.storage, 0.0))
        if difference > tolerance:
            raise ValueError(f"it is {difference:.1e} away from {name}, more than {tolerance:.1e}")

    def _length(self, length: int) -> dict[str, Any]:
        torch.compiler.reset()
        failures = dict(self.failures)
        memory = self._memory(length) if self.config.memory else {}
        calls = self._first_calls(length)
        timed: dict[str, Callable[[], object]] = {entry.name: call for entry, call in calls.items()}
        if timed and not self.config.training:
            timed[self.spec.front] = partial(self._front, self._inputs(length, self.config.batch, "whole"))
        advance = partial(self._advance, f"timing, length {length}", _rough_seconds(length))
        graphs = _graphs()
        device, repeats = self.config.device, self.config.repeats
        measured = time_interleaved(timed, repeats=repeats, device=device, advance=advance)
        cells = {entry.name: self._cell(entry, measured) | memory.get(entry, {}) for entry in self.entries}
        result: dict[str, Any] = {"contestants": cells, "ratios": _ratios(list(calls), measured)}
        result["compiled_while_timed"] = _graphs() - graphs
        if self.spec.front in measured:
            result["front"] = {"name": self.spec.front} | described(measured[self.spec.front])
        self.failures = failures
        return result

    def _memory(self, length: int) -> dict[Contestant, dict[str, Any]]:
        """Peak memory of every contestant. One whose process was killed is not run in this one."""
        measured: dict[Contestant, dict[str, Any]] = {}
        for entry in self._running():
            self._advance(f"memory of {entry.name}, length {length}", _memory_seconds(entry, length))
            request = {"config": asdict(self.config), "contestant": asdict(entry), "length": length}
            try:
                measured[entry] = {"memory_bytes": memory_in_fresh_process(memory_of, request)}
            except RuntimeError as error:
                measured[entry] = {"memory_not_measured": str(error)}
                if isinstance(error, Killed):
                    self.failures[entry] = str(error)
        return measured

    def _first_calls(self, length: int) -> dict[Contestant, Callable[[], object]]:
        """Run, and compile, every contestant once at this length; those of one plan must agree with the first."""
        calls: dict[Contestant, Callable[[], object]] = {}
        first: dict[str, tuple[Contestant, Tensor]] = {}
        for entry in self._running():
            self._advance(f"first run of {entry.name}, length {length}", _first_seconds(entry, length))
            with self._reported(entry), torch.inference_mode():
                breaks = _graph_breaks()
                run, inputs = self.call(entry, length)
                with _choices() as made:
                    output = run(inputs)
                if entry.storage == "auto" and made:
                    self._check_choice(entry, made[-1])
                self.graph_breaks[entry] = _graph_breaks() - breaks
                if self.config.training:
                    encoder = self._encoder(entry)
                    layers = runner(encoder, "layers", compiled=entry.compiled)
                    output = self._probe(encoder, layers, self._inputs(length, self.config.batch, "layers"))
                twin, reference = first.setdefault(entry.plan, (entry, output))
                self._compare(entry, output, reference, f"{twin.name} at length {length}")
                calls[entry] = partial(run, inputs)
        return calls

    def _check_choice(self, entry: Contestant, choice: StorageChoice) -> None:
        """Compare with the definition the way in which "auto" carries maps here; it may be another than before."""
        self.choices[entry] = choice
        length = min(_CHECKED_LENGTH, max(self.config.lengths))
        encoder = self._encoder(replace(entry, storage=choice.storage))
        output = self._probe(encoder, encoder.layers, self._inputs(length, 1, "layers"))
        self._compare(entry, output, self.references[entry.plan], f"the definition at length {length}")

    def _cell(self, entry: Contestant, measured: dict[str, Latency]) -> dict[str, Any]:
        if entry.name not in measured:
            return asdict(entry) | {"not_measured": self.failures[entry]}
        cell = asdict(entry) | described(measured[entry.name]) | {"agreement": self.agreement[entry]}
        if entry in self.choices:
            cell |= {"carried": self.choices[entry].storage, "choice": str(self.choices[entry])}
        return cell | {"graph_breaks": self.graph_breaks[entry]} if entry.compiled else cell

    def _advance(self, doing: str, seconds: float) -> None:
        self._done += seconds
        self._progress(doing, self._done, max(self._total(), self._done))

    def _total(self) -> float:
        config, entries = self.config, self._running()
        checked = _rough_seconds(min(_CHECKED_LENGTH, max(config.lengths)))
        total = len({entry.uncompiled for entry in entries}) * checked
        for length in config.lengths:
            rounds = (1 + config.repeats) * (len(entries) + (not config.training))
            total += rounds * _rough_seconds(length) + sum(_first_seconds(entry, length) for entry in entries)
            total += config.memory * sum(_memory_seconds(entry, length) for entry in entries)
        return total


@contextlib.contextmanager
def _choices() -> Iterator[list[StorageChoice]]:
    """What storage "auto" chose while it lasts, as the package's log has it."""
    made: list[StorageChoice] = []
    logger = logging.getLogger("mapreuse")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: made.extend(  # type: ignore[method-assign]
        argument for argument in record.args or () if isinstance(argument, StorageChoice)
    )
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield made
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _graph_breaks() -> int:
    """How often so far the compiler gave up a graph and left the code between two graphs to Python."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _graphs() -> int:
    """How many graphs the compiler has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _hidden_states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def _ratios(timed: list[Contestant], measured: dict[str, Latency]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast each of ours is as every contestant that reuses nothing."""
    others = [entry for entry in timed if entry.kind != "ours" or entry.plan == "full"]
    return {
        entry.name: {
            other.name: paired_ratio(measured[other.name], measured[entry.name]) for other in others if other != entry
        }
        for entry in timed
        if entry.kind == "ours"
    }


def _rough_seconds(length: int) -> float:
    """For the progress bar: how long a forward pass may take, beside that of another length."""
    return (length / 1000) ** 2 + length / 2000


def _first_seconds(entry: Contestant, length: int) -> float:
    return _rough_seconds(length) + (60 if entry.compiles else 0)


def _memory_seconds(entry: Contestant, length: int) -> float:
    return 8 + 2 * _first_seconds(entry, length)
