"""Distillation: a converted model learns to reproduce the original's hidden states and outputs."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from mapreuse.console import check_number
from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.conversion._targets import MIN_CHANNEL
from mapreuse.conversion._training_loop import LoopConfig, TrainingLoop
from mapreuse.conversion._validation import check_original, digest
from mapreuse.data import check_precision
from mapreuse.measure import time_interleaved
from mapreuse.models import check_batch, find_stack, not_padding, plan_of, recorded_states, with_projections
from mapreuse.plan import ReusePlan

_HELD_OUT = 8
"""Every eighth batch is held out if the caller gives no other batches for evaluation."""

_MAX_BFLOAT16_TIME = 0.8
"""bfloat16 is chosen if a forward pass takes at most this fraction of the time in float32."""


@dataclass(frozen=True)
class DistillConfig(LoopConfig):
    """How `distill` trains; budget, learning rate and evaluation are as in `LoopConfig`.

    Attributes:
        hidden: weight of the hidden states in the loss.
        logits: weight of the logits in the loss.
        bfloat16: whether matrix products are taken in bfloat16 (autocast). None: if a short measurement shows that a
            forward pass is much faster in bfloat16. The measurement may differ from run to run.
    """

    hidden: float = 1.0
    logits: float = 1.0
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("hidden", self.hidden, 0)
        check_number("logits", self.logits, 0)
        if self.hidden == self.logits == 0:
            raise ValueError("hidden and logits must not both be 0: nothing would be learned")
        if self.bfloat16 not in (None, True, False):
            raise ValueError(f"bfloat16 must be True, False or None, got {self.bfloat16!r}")


@dataclass(frozen=True)
class Distillation:
    """The result of `distill`.

    Attributes:
        errors: by step, the held-out error √(mean ‖h − h°‖² / ‖h°‖²), with h one channel of the hidden states after
            the last layer in a batch, and h° that of the original.
        step: number of steps taken.
        elapsed: seconds of training.
        bfloat16: whether products were taken in bfloat16.
    """

    errors: dict[int, float]
    step: int
    elapsed: float
    bfloat16: bool

    @property
    def before(self) -> float:
        """Held-out error of the model before training."""
        return self.errors[0]

    @property
    def best_step(self) -> int:
        """Step of the weights that the model has now; 0 if training did not help."""
        return min(self.errors, key=lambda step: (self.errors[step], step))

    @property
    def after(self) -> float:
        """Held-out error of the model as it is now."""
        return self.errors[self.best_step]


def distill(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: DistillConfig,
    *,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    out_dir: str | Path | None = None,
) -> Distillation:
    """Train a converted model, in place, to match the original's hidden states and outputs. It keeps the best
    weights.

    AdamW minimises, without dropout,

        hidden · mean ‖h − h°‖² / ‖h°‖²  +  logits · KL(p° ‖ p)

    with h one channel of the hidden states after a layer, at all positions of the batch except padding. The mean is
    over channels and layers, because a few large channels would decide otherwise. p are the output distributions of a
    model with logits, and ° marks the original. Training starts at the first layer that shares its map. Earlier
    layers and modules outside the layers keep their weights. Runs on every process of `accelerate launch` or on a
    single one, on a GPU if there is one. Afterwards both models are on their devices again.

    Args:
        model: a converted model with a plan in force.
        original: the model before its conversion; it is not changed.
        batches: any re-iterable of keyword dictionaries for both models. The order of each epoch is its own.
        config: budget and hyper-parameters.
        held_out: batches for evaluation. None: every eighth of `batches`, which is then left out of training.
        out_dir: directory of checkpoints. The same call continues an interrupted run from there. With a budget in
            steps, the result has the same bits as without interruption. None: nothing is written.

    Raises:
        ValueError: if no plan is in force, the models do not belong together, one of them is in half precision on a
            CPU, no parameter of a layer learns, there are too few batches, they can be read only once or contain only
            padding, an activation or the loss is not finite, `held_out` is None and batches differ between readings,
            or `out_dir` cannot be written or holds another run.
    """
    if not isinstance(config, DistillConfig):
        raise ValueError(f"config must be a DistillConfig, such as DistillConfig(seconds=600), got {config!r}")
    plan = plan_of(model)
    if plan is None:
        raise ValueError("distill needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original)
    if any(iter(given) is given for given in (batches, held_out) if given is not None):
        raise ValueError("distill reads its batches several times: give a list, not a generator")
    training, evaluation = batches, held_out
    if evaluation is None:
        once, again = (next(iter(batches), {}) for _ in range(2))
        if digest([once]) != digest([again]):
            raise ValueError(
                "distill holds out every eighth batch for evaluation, but the batches differ from one reading to the "
                "next: give held_out, or batches that are not shuffled"
            )
        training, evaluation = _Split(batches, held_out=False), _Split(batches, held_out=True)
    first, first_held_out = (next(iter(some), None) for some in (training, evaluation))
    if first is None or first_held_out is None:
        raise ValueError(f"distill has no batches to learn from, or none held out: give at least {_HELD_OUT}")
    check_batch(first)
    check_batch(first_held_out)
    identity: dict[str, Any] = {"plan": json.loads(plan.to_json())}
    if out_dir is not None:
        identity["given"] = digest(itertools.chain([original.state_dict(), first], evaluation))
    devices = [next(one.parameters()).device for one in (model, original)]
    try:
        with in_evaluation_mode(model, original), _only_sharing_layers_learn(model, plan):
            objective = _Objective(model, original, evaluation, config)
            loop = TrainingLoop(
                model,
                config,
                batches=lambda epoch, progress: training,
                loss=objective.loss,
                evaluate=objective.evaluate,
                evaluate_first=True,
                out_dir=out_dir,
                identity=identity,
                name="distill",
            )
            choices = loop.state.choices
            if "bfloat16" not in choices:
                choices["bfloat16"] = objective.chooses_bfloat16(first)
            objective.bfloat16 = choices["bfloat16"]
            state = loop.run()
    finally:
        for which, device in zip((model, original), devices, strict=True):
            which.to(device)
    errors = {entry["step"]: entry["error"] for entry in state.history}
    return Distillation(errors, state.step, state.elapsed, choices["bfloat16"])


@contextmanager
def _only_sharing_layers_learn(model: nn.Module, plan: ReusePlan) -> Iterator[None]:
    """Freeze all parameters except those of the first layer that shares its map and of later layers."""
    first = min((source for layer in range(plan.num_layers) for source in plan.sources(layer)), default=0)
    learning = {parameter for layer in find_stack(model).layers[first:] for parameter in layer.layer.parameters()}
    others = [one for one in model.parameters() if one.requires_grad and one not in learning]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        if not any(parameter.requires_grad for parameter in learning):
            raise ValueError("no parameter of the layers that share maps learns: all have requires_grad=False")
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Split:
    """Every eighth of some batches, or all the others."""

    batches: Iterable[Mapping[str, Any]]
    held_out: bool

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for index, batch in enumerate(self.batches):
            if (index % _HELD_OUT == _HELD_OUT - 1) == self.held_out:
                yield batch


class _Objective:
    """Loss and held-out error of a converted model against its original."""

    def __init__(
        self, model: nn.Module, original: nn.Module, evaluation: Iterable[Mapping[str, Any]], config: DistillConfig
    ) -> None:
        self.bfloat16 = False
        self._accelerator = Accelerator()
        self._model = model.to(self._accelerator.device)
        self._original = with_projections(original).to(self._accelerator.device)
        self._evaluation, self._config = evaluation, config

    def chooses_bfloat16(self, batch: Mapping[str, Any]) -> bool:
        """The configured choice, or else True if forward passes of both models are much faster in bfloat16."""
        if self._config.bfloat16 is not None:
            return self._config.bfloat16
        calls = {
            "float32": functools.partial(self._pair, batch),
            "bfloat16": functools.partial(self._pair, batch, bfloat16=True),
        }
        with torch.enable_grad():
            timed = time_interleaved(calls, repeats=5, device=self._accelerator.device.type)
        chosen = [timed["bfloat16"].median < _MAX_BFLOAT16_TIME * timed["float32"].median]
        return (broadcast_object_list(chosen) if self._accelerator.num_processes > 1 else chosen)[0]

    def loss(self, batch: Mapping[str, Any], step: int) -> Tensor:
        states, targets, rows, output, target = self._pair(batch, bfloat16=self.bfloat16)
        if not bool(rows.any()):
            raise ValueError(f"distill: the batch of step {step} contains only padding; leave it out")
        layers = [_relative_error(one[rows], other[rows]) for one, other in zip(states, targets, strict=True)]
        loss = self._config.hidden * torch.stack(layers).mean()
        logits, target_logits = getattr(output, "logits", None), getattr(target, "logits", None)
        if logits is not None and target_logits is not None:
            if logits.dim() > 2 and logits.shape[:2] == rows.shape:
                logits, target_logits = logits[rows], target_logits[rows]
            found, expected = (one.flatten(0, -2).float().log_softmax(-1) for one in (logits, target_logits))
            loss = loss + self._config.logits * kl_div(found, expected, reduction="batchmean", log_target=True)
        return loss

    def evaluate(self) -> dict[str, float]:
        """The held-out error; each process evaluates its share of the batches."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._accelerator.device)
        world, rank = self._accelerator.num_processes, self._accelerator.process_index
        for batch in itertools.islice(self._evaluation, rank, None, world):
            states, targets, rows, *_ = self._pair(batch)
            if bool(rows.any()):
                error = _relative_error(states[-1][rows], targets[-1][rows]).double()
                sums += torch.stack([error, torch.ones_like(error)])
        total, count = self._accelerator.reduce(sums, "sum").tolist()
        if count == 0:
            raise ValueError("distill: the held-out batches contain only padding")
        if not math.isfinite(total):
            raise ValueError(
                "distill: hidden states are not finite; check the models' weights and the held-out batches"
            )
        return {"error": math.sqrt(total / count)}

    def _pair(
        self, batch: Mapping[str, Any], *, bfloat16: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Bool[Tensor, "batch positions"], Any, Any]:
        """Hidden states of every layer in both models, which positions are not padding, and both outputs."""
        batch = send_to_device(dict(batch), self._accelerator.device)
        with torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad(), recorded_states(self._original) as (targets, masks):
                target = self._original(**batch)
            with recorded_states(self._model) as (states, _):
                output = self._model(**batch)
        return states, targets, not_padding(masks[0], targets[0]), output, target


def _relative_error(states: Float[Tensor, "rows width"], targets: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Mean of ‖h − h°‖² / ‖h°‖² over the channels h, in float32; see `MIN_CHANNEL` for channels near zero."""
    distance, size = (one.square().sum(0) for one in (states.float() - targets.float(), targets.float()))
    return (distance / size.clamp_min(MIN_CHANNEL * float(size.median()))).mean()
