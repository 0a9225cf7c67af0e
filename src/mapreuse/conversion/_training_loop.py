"""The training loop: a budget, a schedule, evaluation, checkpoints and resuming."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim import Optimizer

from mapreuse.console import check_number, one_line, progress_bar
from mapreuse.conversion._validation import digest

_FORMAT = 3
"""Version of the checkpoints; mapreuse 0.1.0 wrote version 1. Up to version 2, heads had another order."""

_MAX_GRADIENT_NORM = 1.0
"""Longer gradients are scaled down to this norm."""


@dataclass(frozen=True)
class LoopConfig:
    """Budget and hyper-parameters of a training run.

    The learning rate rises linearly over the first `warmup` fraction of the budget, then falls to zero along a cosine
    (Loshchilov and Hutter, "SGDR", ICLR 2017).

    Attributes:
        steps: budget in steps. Give exactly one of `steps` and `seconds`.
        seconds: budget in seconds.
        learning_rate: peak learning rate.
        warmup: fraction of the budget, from 0 to 0.99.
        weight_decay: of AdamW.
        evaluate_every: steps between two evaluations.
        patience: training ends after this number of evaluations without improvement.
    """

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluate_every: int = 50
    patience: int = 10

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"give the budget as steps or as seconds: got steps={self.steps}, seconds={self.seconds}"
            )
        if self.steps is not None:
            check_number("steps", self.steps, 1, whole=True)
        else:
            check_number("seconds", self.seconds, 0, exclusive=True)
        check_number("learning_rate", self.learning_rate, 0, exclusive=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("warmup", self.warmup, 0, 0.99)
        check_number("evaluate_every", self.evaluate_every, 1, whole=True)
        check_number("patience", self.patience, 1, whole=True)

    def progress(self, step: int, elapsed: float) -> float:
        """The fraction of the budget used after `step` steps and `elapsed` seconds."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return elapsed / self.seconds

    def learning_rate_at(self, step: int, elapsed: float) -> float:
        """The learning rate of the step that follows `step` steps and `elapsed` seconds."""
        progress = self.progress(step, elapsed)
        if self.steps is not None:
            progress += 0.5 / self.steps  # the middle of the step, so that no step has rate zero
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


@dataclass
class TrainingState:
    """The position of a training run between two steps. Checkpoints contain it.

    Attributes:
        step: number of steps taken.
        elapsed: seconds of training, over all sessions.
        epoch: number of the current epoch.
        position: batches read in this epoch, by all processes together.
        epoch_progress: fraction of the budget used when the epoch began.
        history: one entry per evaluation: `step`, `elapsed`, the mean training `loss` since the last one, and
            metrics.
        losses: training losses since the last evaluation.
        best_step: step of the best evaluation.
        finished: whether the budget or the patience is used up.
        choices: decisions of the caller at the start of the run. A resumed run keeps them.
    """

    step: int = 0
    elapsed: float = 0.0
    epoch: int = 0
    position: int = 0
    epoch_progress: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_step: int = 0
    finished: bool = False
    choices: dict[str, Any] = field(default_factory=dict)


class TrainingLoop:
    """Trains a model in place with AdamW, keeps the best weights, and resumes from its checkpoints.

    Runs on each process of `accelerate launch`, or on a single one. Gradients are averaged over processes. With a
    budget in steps, an interrupted and resumed run gives the same bits as a run without interruption. When training
    ends or fails, the model has the best weights so far.

    Args:
        model: moved to the accelerator's device. Parameters with `requires_grad` are trained.
        config: budget and hyper-parameters.
        batches: `batches(epoch, progress)` gives the batches of an epoch; `progress` is the fraction of the budget
            used at its begin. Each process must get the same batches. It trains on its share of them.
        loss: `loss(batch, step)` gives the loss of one batch as a scalar tensor.
        evaluate: gives metrics by name. Lower is better; later metrics break ties. Called on every process, but only
            the main process's metrics count. None: the latest weights are the best.
        evaluate_first: also evaluate before the first step, so that the initial weights can be the best.
        out_dir: directory of checkpoints. None: nothing is written.
        identity: JSON that identifies the run. A run is resumed only with the same identity, settings and weights.
        on_evaluation: called on the main process after each evaluation, with the state and True for the best so far.
        name: of the caller, for messages.

    Attributes:
        state: the position of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        *,
        batches: Callable[[int, float], Iterable[Any]],
        loss: Callable[[Any, int], Tensor],
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_first: bool = False,
        out_dir: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        on_evaluation: Callable[[TrainingState, bool], None] = lambda state, improved: None,
        name: str = "training",
    ) -> None:
        self._accelerator = Accelerator()
        self._model, self._config, self.state = model.to(self._accelerator.device), config, TrainingState()
        self._best: dict[str, Tensor] = {}
        self._batches, self._loss, self._evaluate, self._evaluate_first = batches, loss, evaluate, evaluate_first
        self._on_evaluation, self._name = on_evaluation, name
        self._out_dir = None if out_dir is None else Path(out_dir)
        self._identity = {"config": asdict(config), **(identity or {})}
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._optimizer = self._accelerator.prepare(optimizer)
        if self._out_dir is not None:
            try:
                self._out_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{out_dir}: cannot make this directory of checkpoints ({error.strerror})") from None
            self._start = digest([model.state_dict()])
            self._resume()

    def run(self) -> TrainingState:
        """Train until the budget or the patience is used up. Returns at once if the run has ended before.

        Raises `ValueError` if a loss or a metric is not finite, or there are no batches.
        """
        self._optimizer.zero_grad()  # gradients of the caller
        try:
            with torch.enable_grad():
                self._train()
        finally:
            self._optimizer.zero_grad()
            if self._best:
                self._model.load_state_dict(self._best)
        return self.state

    def _train(self) -> None:
        state, config = self.state, self._config
        if self._evaluate_first and not state.history:
            self._evaluate_now({})
        started = time.monotonic() - state.elapsed
        batches = self._share()
        with (
            progress_bar("training", disable=not self._accelerator.is_main_process) as progress,
            _deferred_interrupt(self._out_dir is not None) as interrupted,
        ):
            while not state.finished:
                state.losses.append(self._step(next(batches)))
                state.step += 1
                state.elapsed, stops = self._agreed((time.monotonic() - started, interrupted.is_set()))
                ended = config.progress(state.step, state.elapsed) >= 1
                if ended or state.step % config.evaluate_every == 0:
                    self._evaluate_now({"loss": sum(state.losses) / len(state.losses)})
                    state.losses.clear()
                    stale = sum(entry["step"] > state.best_step for entry in state.history)
                    state.finished = ended or stale >= config.patience
                    self._checkpoint()
                elif stops:
                    self._checkpoint()
                if stops:
                    stop = KeyboardInterrupt()
                    stop.add_note(f"{self._name}: {state.step} steps are kept")
                    raise stop
                progress(self._description(), min(config.progress(state.step, state.elapsed), 1.0), 1.0)

    def _share(self) -> Iterator[Any]:
        """This process's batches, epoch after epoch, from the position of the state."""
        state, world = self.state, self._accelerator.num_processes
        turn = 0
        while True:
            found = False
            for index, batch in enumerate(self._batches(state.epoch, state.epoch_progress)):
                found = True
                if index < state.position:
                    continue
                state.position += 1
                if turn % world == self._accelerator.process_index:
                    mine = batch
                turn += 1
                if turn % world == 0:
                    yield mine
            if not found:
                raise ValueError(f"{self._name} has no batches to learn from")
            progress = min(self._config.progress(state.step, state.elapsed), 1.0)
            state.epoch, state.position, state.epoch_progress = state.epoch + 1, 0, progress

    def _step(self, batch: Any) -> float:
        state = self.state
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(state.step, state.elapsed)
        loss = self._loss(batch, state.step)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"{self._name}: the loss is not finite at step {state.step}; lower the learning rate, or check the "
                "model and its batches"
            )
        self._accelerator.backward(loss)
        self._average_gradients()
        self._accelerator.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _average_gradients(self) -> None:
        """Average over processes, except parameters without gradients, such as those of an unused pooler."""
        if self._accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            averaged = self._accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            parts = averaged.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _evaluate_now(self, entry: dict[str, float]) -> None:
        state = self.state
        if self._accelerator.num_processes > 1:  # running statistics, such as those of batch normalisation, differ
            for buffer in self._model.buffers():
                buffer.copy_(broadcast(buffer))
        metrics = self._agreed(dict(self._evaluate())) if self._evaluate is not None else {}
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(f"{self._name}: a metric is not finite at step {state.step}: {metrics}")
        best = next((one for one in state.history if one["step"] == state.best_step), None)
        improved = not metrics or best is None or tuple(metrics.values()) < tuple(best[name] for name in metrics)
        state.history.append({"step": state.step, "elapsed": state.elapsed, **entry, **metrics})
        if improved:
            state.best_step = state.step
            self._best = self._weights()
        if self._accelerator.is_main_process:
            self._on_evaluation(state, improved)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def _description(self) -> str:
        best = next((entry for entry in self.state.history if entry["step"] == self.state.best_step), {})
        metrics = [f"{name} {value:.4f}" for name, value in best.items() if name not in ("step", "elapsed", "loss")]
        return f"step {self.state.step}" + (f", best {', '.join(metrics)}" if metrics else "")

    def _agreed(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self._accelerator.num_processes > 1:
            (value,) = broadcast_object_list([value])
        return value

    def _checkpoint(self) -> None:
        if self._out_dir is None:
            return
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            partial, complete = self._out_dir / "checkpoint.partial", self._out_dir / f"checkpoint-{self.state.step}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _save_moments(self._optimizer, partial / "optimizer.safetensors")
            save_model(self._model, str(partial / "model.safetensors"))
            if self._best:
                current = self._weights()
                self._model.load_state_dict(self._best)
                save_model(self._model, str(partial / "best.safetensors"))
                self._model.load_state_dict(current)
            described = {"format": _FORMAT, "run": self._identity, "weights": [self._start, digest([self._best])]}
            (partial / "state.json").write_text(json.dumps(described | {"state": asdict(self.state)}))
            partial.rename(complete)
            for older in checkpoints(self._out_dir)[:-1]:
                shutil.rmtree(older)
        self._accelerator.wait_for_everyone()

    def _resume(self) -> None:
        assert self._out_dir is not None
        if not (found := checkpoints(self._out_dir)):
            return
        folder = found[-1]
        try:
            saved = json.loads((folder / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a checkpoint ({one_line(error)}); delete it") from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise ValueError(f"{folder}: not a checkpoint of this version of mapreuse; delete it to start anew")
        if saved["run"] != json.loads(json.dumps(self._identity)) or self._start not in saved["weights"]:
            raise ValueError(
                f"{self._out_dir} holds a run with other settings, batches or weights; choose another directory or "
                "delete it"
            )
        before = self._weights()
        try:
            _load_moments(self._optimizer, folder / "optimizer.safetensors")
            if saved["state"]["history"]:
                load_model(self._model, str(folder / "best.safetensors"))
                self._best = self._weights()
            load_model(self._model, str(folder / "model.safetensors"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            self._model.load_state_dict(before)
            raise ValueError(f"{folder}: not a checkpoint ({one_line(error)}); delete it") from None
        self.state, self._start = TrainingState(**saved["state"]), saved["weights"][0]


@contextmanager
def _deferred_interrupt(deferred: bool) -> Iterator[threading.Event]:
    """The first interrupt by the keyboard sets an event, and raises only at the end of the block. The next one raises
    at once."""
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (deferred and in_main_thread and before is signal.default_int_handler):
        yield event
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
    if event.is_set():
        raise KeyboardInterrupt


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `checkpoint-<step>` in a folder, ordered by step."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _save_moments(optimizer: Optimizer, file: Path) -> None:
    state = optimizer.state_dict()["state"]
    moments = {f"{number}.{name}": value.contiguous() for number, one in state.items() for name, value in one.items()}
    save_file(moments, file)


def _load_moments(optimizer: Optimizer, file: Path) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        number, name = key.split(".")
        moments.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
