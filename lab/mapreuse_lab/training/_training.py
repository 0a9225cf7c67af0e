import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from lhotse.cut import Cut
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from mapreuse.conversion import DAMAGED, checkpoints, learning_rate, load_moments, save_moments, spent
from mapreuse.models import plan_of
from mapreuse_lab.training._batches import Item, RoundPlan, read_batch
from mapreuse_lab.training._corpora import Corpus
from mapreuse_lab.training._evaluation import ErrorRates, evaluate
from mapreuse_lab.training._files import cache_dir, one_line
from mapreuse_lab.training._recogniser import Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise


@dataclass(frozen=True)
class TrainConfig:
    """Every hyper-parameter of a training run.

    The budget is `steps` or `seconds` (exactly one); the learning rate rises linearly over the first `warmup`
    fraction of it and falls to zero along a cosine. `real_share` is the share of recorded speech (in seconds) at
    the start and at the end, the rest being `synthetic_utterances` generated sentences in espeak-ng's voices.
    `hop`, where given, replaces the recogniser's seconds between features. Each utterance is played at one of
    `speeds`, which moves its pitch; each batch is heard at one of `tempos`, which does not (its features are as much
    further apart).
    `patience` evaluations without a better dev WER end the run. `distillation` weighs, against the CTC loss, the
    divergence of every frame's distribution from the original's where `train` is given one.
    """

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 1.5e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_seconds: float = 40.0
    synthetic_utterances: int = 0
    real_share: tuple[float, float] = (1.0, 1.0)
    hop: float | None = None
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    tempos: tuple[float, ...] = (1.0,)
    noise_probability: float = 0.4
    noise_decibels: tuple[float, float] = (10.0, 45.0)
    mask_bands: int = 2
    mask_band_width: int = 10
    mask_spans_per_second: float = 0.7
    mask_span: int = 15
    distillation: float = 1.0
    evaluate_every: int = 250
    patience: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"give the budget as steps or as seconds: got steps={self.steps}, seconds={self.seconds}"
            )
        if not 0 < (self.steps or self.seconds or 0) < math.inf:
            raise ValueError(f"the budget must be positive, finite: got steps={self.steps}, seconds={self.seconds}")
        if not all(0 < share <= 1 for share in self.real_share):
            raise ValueError(f"real_share must be two fractions above 0 and up to 1: got {self.real_share}")
        if not self.tempos or min(self.tempos) <= 0 or (self.hop is not None and self.hop <= 0):
            raise ValueError(f"hop and tempos must be positive: got hop={self.hop}, tempos={self.tempos}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The config `to_json` wrote; raises `ValueError` for a field it does not know."""
        values: dict[str, Any] = json.loads(text)
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ValueError(f"no such training setting: {', '.join(sorted(unknown))}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)


@dataclass
class _State:
    """Where a run stands between two steps; all that a checkpoint needs beside weights and moments."""

    step: int = 0
    round_number: int = 0
    position: int = 0
    progress_of_round: float = 0.0
    elapsed: float = 0.0
    best_wer: float = math.inf
    best_cer: float = math.inf
    best_step: int = 0
    stale: int = 0
    finished: bool = False

    @property
    def description(self) -> str:
        found = f", best dev WER {self.best_wer:.1%}" if math.isfinite(self.best_wer) else ""
        return f"Step {self.step}{found}"


def train(
    recogniser: Recogniser,
    corpus: Corpus,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    original: Recogniser | None = None,
) -> ErrorRates | None:
    """Trains the recogniser on `corpus.train`, keeps the weights of the best dev WER, and returns their dev scores.

    Runs on every process of `accelerate launch`, or on the one there is; several CPU processes are started by
    `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`. AdamW on the CTC loss, plus the
    divergence from `original`, frame by frame, where given (gradient recovery of a converted model is this same
    function with a short budget and a low learning rate). `out_dir` receives `best/` (the recogniser), `log.jsonl`
    and, while the run goes on, `checkpoint-<step>/`; called again with the same arguments it goes on from there,
    under a budget in steps bit for bit as if never interrupted, and at once where the run had ended. Without dev
    utterances the last weights are kept, and None is returned.

    Raises `ValueError` where `out_dir` holds a run with other settings, from other weights, or damaged, and where a
    loss is not finite.
    """
    run = _Run(recogniser, corpus, config, Path(out_dir), original)
    run.resume()
    run.go()
    return run.finish()


def _fingerprint(recogniser: Recogniser) -> str:
    """Of all that a run starts from: features, vocabulary, plan and weights."""
    plan = plan_of(recogniser.model)
    said = [asdict(recogniser.feature_config), recogniser.vocabulary, None if plan is None else plan.to_json()]
    digest = hashlib.sha256(json.dumps(said).encode())
    for name, tensor in sorted(recogniser.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Run:
    def __init__(
        self,
        recogniser: Recogniser,
        corpus: Corpus,
        config: TrainConfig,
        out_dir: Path,
        original: Recogniser | None,
    ) -> None:
        self.accelerator = Accelerator()
        start = _fingerprint(recogniser)
        if config.hop is not None:
            recogniser.feature_config = replace(recogniser.feature_config, hop=config.hop)
        self.recogniser = recogniser
        self.original = original
        self.corpus = corpus
        self.config = config
        self.out_dir = out_dir
        self.state = _State()
        out_dir.mkdir(parents=True, exist_ok=True)
        self.transcripts = sorted({cut.supervisions[0].text for cut in corpus.train})
        self.spoken = self._sentences(config.synthetic_utterances, config.seed)
        with self.accelerator.main_process_first():
            made = self._made()
        self.plan = RoundPlan(list(corpus.train), made, config)
        self.identity = {
            "config": json.loads(config.to_json()),
            "corpus": corpus.name,
            "start": start,
        }
        optimizer = torch.optim.AdamW(
            recogniser.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(recogniser.model, optimizer)
        if original is not None:
            original.model.to(self.accelerator.device).eval()

    def _sentences(self, count: int, seed: int) -> list[str]:
        """New texts; never a dev or test transcript."""
        language, held_out = self.corpus.language, self.corpus.held_out
        if not count:
            return []
        return generate_sentences(count, language, seed=seed, transcripts=self.transcripts, exclude=held_out)

    def _made(self) -> list[Cut]:
        """New texts spoken by synthetic voices."""
        rate, seed = self.recogniser.feature_config.sampling_rate, self.config.seed
        cache = cache_dir() / "synthetic"
        return [*synthesise(self.spoken, self.corpus.language, cache, seed=seed, sampling_rate=rate)]

    def finish(self) -> ErrorRates | None:
        """The best weights in the recogniser, and their scores on dev."""
        self.accelerator.wait_for_everyone()
        best = Recogniser.load(self.out_dir / "best")
        self.accelerator.wait_for_everyone()
        self.recogniser.model.load_state_dict(best.model.state_dict())
        self.recogniser.model.eval()
        dev = list(self.corpus.dev)
        return evaluate(self.recogniser, dev) if dev else None

    def go(self) -> None:
        state, config = self.state, self.config
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        quiet = not self.accelerator.is_main_process
        with Progress(*columns, disable=quiet) as bar:
            task = bar.add_task("Training", total=1.0)
            loss_sum, since, started = 0.0, 0, time.monotonic() - state.elapsed
            for items in self._batches():
                if state.finished:
                    break
                loss_sum, since = loss_sum + self._step(items), since + 1
                state.step, state.position = state.step + 1, state.position + 1
                state.elapsed = self._agreed(time.monotonic() - started)
                ended = self._progress() >= 1
                if ended or state.step % config.evaluate_every == 0:
                    loss, loss_sum, since = loss_sum / since, 0.0, 0
                    state.finished = ended
                    if self.accelerator.is_main_process:
                        bar.console.print(self._evaluate(loss))
                    state.finished = bool(self._agreed(float(state.finished)))
                    self._checkpoint()
                bar.update(task, completed=self._progress(), description=state.description)

    def _batches(self) -> Iterator[list[Item]]:
        """This process's batches, round after round, from the position the state is at."""
        state, world = self.state, self.accelerator.num_processes
        while True:
            batches = self.plan.batches(state.round_number, state.progress_of_round, world)
            mine = batches[self.accelerator.process_index :: world]
            while state.position < len(mine):
                yield mine[state.position]
            state.round_number, state.position, state.progress_of_round = (
                state.round_number + 1,
                0,
                min(self._progress(), 1.0),
            )

    def _progress(self) -> float:
        return spent(self.config, self.state.step, self.state.elapsed)

    def _step(self, items: list[Item]) -> float:
        # Seeding every step, rather than storing generators, is what makes a resumed run equal to an unbroken one.
        seed = hash((self.config.seed, self.state.step, self.accelerator.process_index)) & 0x7FFFFFFF
        torch.manual_seed(seed)
        batch = read_batch(items, self.recogniser, self.config, seed)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step, self.state.elapsed)
        output = self.model(**batch)
        loss = output.loss
        if self.original is not None:
            loss = loss + self.config.distillation * self._divergence(output.logits, batch)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"train: the loss is not finite at step {self.state.step}; lower the learning rate, or check the "
                "recogniser and its recordings"
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _divergence(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """KL(original ‖ trained) of the frame distributions, averaged over the frames that are not padding."""
        assert self.original is not None
        inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
        with torch.no_grad():
            target = self.original.model(**inputs).logits.log_softmax(-1)
        lengths = self.original.model._get_subsampling_output_length(batch["attention_mask"].sum(1))
        real = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        return kl_div(logits.log_softmax(-1)[real], target[real], reduction="batchmean", log_target=True)

    def _agreed(self, value: float) -> float:
        """The main process's value, on every process."""
        if self.accelerator.num_processes == 1:
            return value
        return broadcast(torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)).item()

    def _evaluate(self, loss: float) -> str:
        state = self.state
        line = {"step": state.step, "elapsed": round(state.elapsed, 1), "loss": round(loss, 4)}
        if len(self.corpus.dev):
            scores = evaluate(self.recogniser, self.corpus.dev)
            better = (scores.wer, scores.cer) < (state.best_wer, state.best_cer)
            state.stale = 0 if better else state.stale + 1
            state.finished |= state.stale >= self.config.patience
            line |= {"dev_wer": round(scores.wer, 4), "dev_cer": round(scores.cer, 4)}
            if better:
                state.best_wer, state.best_cer, state.best_step = scores.wer, scores.cer, state.step
        if not len(self.corpus.dev) or better:
            self.recogniser.save(self.out_dir / "best")
        with (self.out_dir / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        return ", ".join(f"{name} {value}" for name, value in line.items())

    def _checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        partial, complete = self.out_dir / "checkpoint.partial", self.out_dir / f"checkpoint-{self.state.step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model = self.recogniser.model.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in model.items()}, partial / "model.safetensors")
        save_moments(self.optimizer, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"run": self.identity, "state": asdict(self.state)}))
        partial.rename(complete)
        for older in checkpoints(self.out_dir)[:-1]:
            shutil.rmtree(older)

    def resume(self) -> None:
        self._restore()
        if self.accelerator.is_main_process:
            self._forget_what_comes_again()

    def _forget_what_comes_again(self) -> None:
        """Take from the log what was said after the checkpoint, by a run that was ended before its next."""
        log = self.out_dir / "log.jsonl"
        if not log.is_file():
            return
        try:
            lines = log.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.state.step]
        except (LookupError, TypeError, ValueError) as damage:
            raise ValueError(f"{log}: not a log of train ({one_line(damage)}); delete it") from None
        if kept != lines:
            partial = log.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(log)

    def _restore(self) -> None:
        found = checkpoints(self.out_dir)
        if not found:
            return
        checkpoint = found[-1]
        try:
            saved = json.loads((checkpoint / "state.json").read_text())
            identity, state = saved["run"], _State(**saved["state"])
            if checkpoint.name != f"checkpoint-{state.step}":
                raise ValueError(f"its state is of step {state.step}")
            weights = load_file(checkpoint / "model.safetensors")
            if identity == self.identity:
                load_moments(self.optimizer, checkpoint / "optimizer.safetensors")
                self.recogniser.model.load_state_dict(weights)
        except DAMAGED as damage:
            raise ValueError(f"{checkpoint}: not a checkpoint of train ({one_line(damage)}); delete it") from None
        if identity != self.identity:
            raise ValueError(
                f"{self.out_dir} holds a run with other settings, or from other weights; choose another directory or "
                "delete it"
            )
        self.state = state
