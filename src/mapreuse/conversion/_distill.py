"""Gradient recovery: a converted model learns from the original what its layers used to say."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from jaxtyping import Bool, Float
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import tqdm

from mapreuse.conversion._checkpoints import DAMAGED, checkpoints, load_moments, save_moments
from mapreuse.conversion._schedule import learning_rate, spent
from mapreuse.conversion._states import in_evaluation_mode
from mapreuse.conversion._validation import check_original, check_precision, digest
from mapreuse.measure import time_interleaved
from mapreuse.models import check_batch, find_stack, not_padding, plan_of, recorded_states, with_projections
from mapreuse.plan import ReusePlan

_HELD_OUT = 8
"""Every eighth batch judges instead of teaching, where no others are given to judge by."""

_WORTH = 0.8
"""Share of a forward pass's time in float32 that one in bfloat16 may take to be worth its rounding."""


@dataclass(frozen=True)
class DistillConfig:
    """How `distill` trains.

    The budget is `steps` or `seconds` (exactly one); the learning rate rises linearly over the first `warmup`
    fraction of it and falls to zero along a cosine. `hidden` and `logits` weigh the two parts of the loss. Every
    `evaluate_every` steps the held-out error is measured; `patience` measurements without a better one end the run.
    `bfloat16` tells whether products are taken in that type (autocast); where None, they are where a forward pass is
    measured to be much faster so, which may come out differently on another day.
    """

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    evaluate_every: int = 50
    patience: int = 10
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        budget = self.steps or self.seconds or 0
        if (self.steps is None) == (self.seconds is None) or not 0 < budget < math.inf:
            raise ValueError(
                f"give a positive budget as steps or as seconds: got steps={self.steps}, seconds={self.seconds}"
            )
        if not (0 <= self.warmup < 1 and min(self.learning_rate, self.clip) > 0 and self.weight_decay >= 0):
            raise ValueError(
                "learning_rate and clip must be positive, weight_decay not negative, warmup a share of the budget: "
                f"got {self.learning_rate}, {self.clip}, {self.weight_decay} and {self.warmup}"
            )
        if min(self.hidden, self.logits) < 0 or self.hidden == self.logits == 0:
            raise ValueError(f"hidden and logits weigh the loss, got {self.hidden} and {self.logits}")
        if self.evaluate_every < 1 or self.patience < 1:
            raise ValueError(
                f"evaluate_every and patience must be at least 1, got {self.evaluate_every} and {self.patience}"
            )


@dataclass
class Distillation:
    """What `distill` did: held-out errors, each the distance of the last layer's hidden states from the original's
    relative to their size, by the step at which they were measured. The model has the weights of the least.
    `bfloat16` tells whether products were taken in that type; None before the first step."""

    errors: dict[int, float] = field(default_factory=dict)
    step: int = 0
    elapsed: float = 0.0
    finished: bool = False
    bfloat16: bool | None = None

    @property
    def before(self) -> float:
        """Held-out error of the model as it came."""
        return self.errors[0]

    @property
    def best_step(self) -> int:
        """Step of the weights that the model has now; 0 where training did not help."""
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
    """Train a converted model, in place, until its layers say what the original's do; the best weights stay.

    With hₗ the hidden states after layer l over all positions but padding, and p the outputs' distributions where the
    model has logits, AdamW on

        hidden · meanₗ ‖hₗ − hₗ°‖² / ‖hₗ°‖²  +  logits · KL(p° ‖ p),        ° the original

    without dropout, as it is for inference. The layers from the first whose map others apply learn; what comes before
    them, and after the last, stays. Weights keep their type; products are in bfloat16 where `config` says so, or
    leaves it open and a forward pass is measured to be much faster so. Runs on every process of `accelerate launch`,
    each with the same model, or on the one there is; on a GPU where there is one.

    Args:
        model: a converted model with a plan in force.
        original: the model it was converted from; it stays as it is. Both are on their device again afterwards.
        batches: any re-iterable of keyword dictionaries for both; read again and again in its own order.
        config: budget and hyper-parameters.
        held_out: batches to judge by; where None, every eighth of `batches`, which then does not teach.
        out_dir: where checkpoints go; the same call again goes on from there, under a budget in steps bit for bit as
            if never interrupted, of the model as it came or as the run left it. Batches are known again by the first
            to learn from and by all those held out. Without it, nothing is written.

    Raises:
        ValueError: where no plan is in force, `original` has another depth or width or a plan, there are too few
            batches or they can be read only once, one is nothing but padding, a model is in half precision on a CPU,
            no parameter of a layer learns, an activation or the loss is not finite, `held_out` is None and batches
            differ from one reading to the next, or `out_dir` cannot be written, holds a run of other models, batches
            or settings, or a damaged one. The model then has the best weights that were found.
    """
    plan = plan_of(model)
    if plan is None:
        raise ValueError("distill needs a converted model: apply a plan to it first")
    check_precision(model)
    check_original(model, original)
    if any(iter(given) is given for given in (batches, held_out) if given is not None):
        raise ValueError("distill reads its batches again and again: give a list, not a generator")
    teaching, judging = batches, held_out
    if judging is None:
        once, again = (next(iter(batches), {}) for _ in range(2))
        if digest([once]) != digest([again]):
            raise ValueError(
                "distill keeps every eighth batch apart to judge by, and these differ from one reading to the next: "
                "give held_out, or batches that are not shuffled"
            )
        teaching, judging = _EveryEighth(batches, of_them=False), _EveryEighth(batches, of_them=True)
    first: list[Mapping[str, Any]] = []
    for name, some in (("to learn from", teaching), ("held out", judging)):
        if (one := next(iter(some), None)) is None:
            raise ValueError(f"distill has no batches {name}: give at least {_HELD_OUT}, or some of each kind")
        check_batch(one)
        first.append(one)
    identity = {"config": asdict(config), "plan": json.loads(plan.to_json())}
    folder = None if out_dir is None else Path(out_dir)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}, where checkpoints would go, cannot be made: {error.strerror}") from None
        identity["given"] = digest(itertools.chain([original.state_dict(), first[0]], judging))
    devices = [next(one.parameters()).device for one in (model, original)]
    try:
        with in_evaluation_mode(model, original), _only_sharing_layers_learn(model, plan), torch.enable_grad():
            return _Run(model, original, teaching, judging, config, folder, identity).go()
    finally:
        for which, device in zip((model, original), devices, strict=True):
            which.to(device)


@contextmanager
def _only_sharing_layers_learn(model: nn.Module, plan: ReusePlan) -> Iterator[None]:
    """Meanwhile no parameter before the first layer whose map others apply, or after the last layer, learns."""
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


class _EveryEighth:
    """Every eighth of some batches, or all the others."""

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, of_them: bool) -> None:
        self._batches, self._of_them = batches, of_them

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for index, batch in enumerate(self._batches):
            if (index % _HELD_OUT == _HELD_OUT - 1) == self._of_them:
                yield batch


class _Run:
    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        teaching: Iterable[Mapping[str, Any]],
        judging: Iterable[Mapping[str, Any]],
        config: DistillConfig,
        out_dir: Path | None,
        identity: dict[str, Any],
    ) -> None:
        self.accelerator = Accelerator()
        self.model = model.to(self.accelerator.device)
        self.original = with_projections(original).to(self.accelerator.device)
        self.teaching, self.judging, self.config = teaching, judging, config
        self.out_dir, self.identity = out_dir, identity
        self.given = None if out_dir is None else digest([model.state_dict()])
        self.state = Distillation()
        self.best: dict[str, Tensor] = {}
        self.learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self.learning,
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizer = self.accelerator.prepare(optimizer)

    def go(self) -> Distillation:
        self._resume()
        self.optimizer.zero_grad()  # of what the caller did before
        try:
            self._train()
        finally:  # also where it is stopped
            self.optimizer.zero_grad()
            if self.best:
                self.model.load_state_dict(self.best)
        return self.state

    def _train(self) -> None:
        if not self.state.errors:
            self._judge()
        if self.state.bfloat16 is None:
            self.state.bfloat16 = self.config.bfloat16
        if self.state.bfloat16 is None:
            self.state.bfloat16 = self._is_faster_in_bfloat16(next(iter(self.teaching)))
        started = time.monotonic() - self.state.elapsed
        shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=1.0, bar_format=shown, disable=not self.accelerator.is_main_process, leave=False) as bar:
            batches = self._batches()
            while not self.state.finished:
                self._step(next(batches))
                self.state.step += 1
                self.state.elapsed = self._agreed(time.monotonic() - started)
                ended = self._progress() >= 1
                if ended or self.state.step % self.config.evaluate_every == 0:
                    self._judge()
                    stale = sum(step > self.state.best_step for step in self.state.errors)
                    self.state.finished = ended or stale >= self.config.patience
                    self._checkpoint()
                bar.set_description(f"Step {self.state.step}, error {self.state.before:.4f} → {self.state.after:.4f}")
                bar.update(min(1.0, self._progress()) - bar.n)

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """This process's batches, over and over, from the one that the state is at."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        taken = 0
        while True:
            for index, batch in enumerate(self.teaching):
                if index % world != rank:
                    continue
                if taken >= self.state.step:
                    yield batch
                taken += 1
            if not taken:
                raise ValueError(f"distill has fewer batches to learn from than its {world} processes")

    def _is_faster_in_bfloat16(self, batch: Mapping[str, Any]) -> bool:
        """Whether a forward pass of both models takes much less time so, measured in turns."""
        batch = send_to_device(dict(batch), self.accelerator.device)
        calls = {
            "float32": functools.partial(self._pair, batch),
            "bfloat16": functools.partial(self._pair, batch, bfloat16=True),
        }
        timed = time_interleaved(calls, repeats=5, device=self.accelerator.device.type)
        return self._agreed(timed["bfloat16"].median) < _WORTH * self._agreed(timed["float32"].median)

    def _progress(self) -> float:
        return spent(self.config, self.state.step, self.state.elapsed)

    def _step(self, batch: Mapping[str, Any]) -> None:
        batch = send_to_device(dict(batch), self.accelerator.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step, self.state.elapsed)
        ours, theirs, rows, output, target = self._pair(batch, bfloat16=self.state.bfloat16 is True)
        if not bool(rows.any()):
            raise ValueError(
                f"distill: the batch of step {self.state.step} holds no position but padding; leave it out"
            )
        distances = [_distance(a[rows], b[rows]) / _size(b[rows]) for a, b in zip(ours, theirs, strict=True)]
        loss = self.config.hidden * torch.stack(distances).mean()
        logits, wanted = getattr(output, "logits", None), getattr(target, "logits", None)
        if logits is not None and wanted is not None:
            if logits.dim() > 2 and logits.shape[:2] == rows.shape:
                logits, wanted = logits[rows], wanted[rows]
            logits, wanted = logits.flatten(0, -2).float(), wanted.flatten(0, -2).float()
            divergence = kl_div(
                logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
            )
            loss = loss + self.config.logits * divergence
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"distill: the loss is not finite at step {self.state.step}; lower the learning rate, or check the "
                "model and its batches"
            )
        self.accelerator.backward(loss)
        self._average_gradients()
        self.accelerator.clip_grad_norm_(self.learning, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _average_gradients(self) -> None:
        """Over processes; of the parameters that have a part in the loss, which a pooler, say, has not."""
        if self.accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in self.learning if parameter.grad is not None]
            averaged = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            parts = averaged.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _pair(
        self, batch: Mapping[str, Any], *, bfloat16: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Bool[Tensor, "b p"], Any, Any]:
        """Hidden states of every layer in both models, which positions are not padding, and both outputs."""
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad(), recorded_states(self.original) as (theirs, masks):
                target = self.original(**batch)
            with recorded_states(self.model) as (ours, _):
                output = self.model(**batch)
        return ours, theirs, not_padding(masks[0], theirs[0]), output, target

    @torch.no_grad()
    def _judge(self) -> None:
        """Held-out error now; the weights are kept where it is the least so far."""
        wrong = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for index, batch in enumerate(self.judging):
            if index % world != rank:
                continue
            ours, theirs, rows, *_ = self._pair(send_to_device(dict(batch), self.accelerator.device))
            wrong += torch.stack([_distance(ours[-1][rows], theirs[-1][rows]), _size(theirs[-1][rows])]).double()
        wrong = self.accelerator.reduce(wrong, "sum")
        if not wrong.any():
            raise ValueError("distill: the held-out batches hold no position but padding")
        error = (wrong[0] / wrong[1]).sqrt().item()
        if not math.isfinite(error):
            raise ValueError(
                "distill: hidden states are not finite; check the models' weights and the held-out batches"
            )
        self.state.errors[self.state.step] = error
        if self.state.best_step == self.state.step:
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _agreed(self, value: float) -> float:
        """The mean over processes, so that all stop together."""
        if self.accelerator.num_processes == 1:
            return value
        agreed = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(agreed, "mean").item()

    def _checkpoint(self) -> None:
        if self.out_dir is None:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            partial, complete = self.out_dir / "checkpoint.partial", self.out_dir / f"checkpoint-{self.state.step}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_moments(self.optimizer, partial / "optimizer.safetensors")
            save_model(self.model, str(partial / "model.safetensors"))
            current = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.best)
            save_model(self.model, str(partial / "best.safetensors"))
            self.model.load_state_dict(current)
            of_model = [self.given, digest([self.best])]
            described = {"run": self.identity, "of_model": of_model, "state": asdict(self.state)}
            (partial / "state.json").write_text(json.dumps(described))
            partial.rename(complete)
            for older in checkpoints(self.out_dir)[:-1]:
                shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.out_dir is None:
            return
        found = checkpoints(self.out_dir)
        if not found:
            return
        try:
            saved = json.loads((found[-1] / "state.json").read_text())
            same = saved["run"] == self.identity and self.given in saved["of_model"]
            saved["state"]["errors"] = {int(step): error for step, error in saved["state"]["errors"].items()}
            state = Distillation(**saved["state"])
            if same:
                load_moments(self.optimizer, found[-1] / "optimizer.safetensors")
                load_model(self.model, str(found[-1] / "best.safetensors"))
                self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
                load_model(self.model, str(found[-1] / "model.safetensors"))
        except DAMAGED as damage:
            said = " ".join(str(damage).split())
            raise ValueError(f"{found[-1]}: not a checkpoint of distill ({said}); delete it") from None
        if not same:
            raise ValueError(
                f"{self.out_dir} holds a run of other models, batches or settings; choose another directory or "
                "delete it"
            )
        self.state, self.given = state, saved["of_model"][0]


def _distance(ours: Float[Tensor, "rows width"], theirs: Float[Tensor, "rows width"]) -> Tensor:
    return (ours.float() - theirs.float()).square().sum()


def _size(theirs: Float[Tensor, "rows width"]) -> Tensor:
    return theirs.float().square().sum()
