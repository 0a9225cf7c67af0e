"""Training a recogniser, from scratch or to recover what a conversion lost."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.functional import kl_div

from mapreuse.console import console
from mapreuse.conversion import LoopConfig, TrainingLoop, TrainingState
from mapreuse.models import plan_of
from mapreuse_lab.training._batches import Item, RoundPlan, read_batch
from mapreuse_lab.training._corpora import Corpus
from mapreuse_lab.training._evaluation import ErrorRates, evaluate
from mapreuse_lab.training._files import cache_dir
from mapreuse_lab.training._recogniser import Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Every hyper-parameter of a training run: those of `LoopConfig`, data and augmentation.

    Attributes:
        batch_seconds: seconds of audio in a batch.
        synthetic_utterances: number of generated sentences, spoken by espeak-ng's voices.
        real_share: share of recorded speech, in seconds, at the start and at the end of training.
        hop: seconds between features, instead of the recogniser's own.
        speeds: each utterance is played at one of them, which changes its pitch.
        tempos: each batch is heard at one of them, which keeps the pitch (features are spaced further apart).
        noise_probability, noise_decibels: share of utterances with noise, and its signal-to-noise ratios.
        mask_bands, mask_band_width, mask_spans_per_second, mask_span: SpecAugment's masks.
        distillation: weight, against the CTC loss, of the divergence from the original that `train` is given.
        seed: of batches and augmentation.
    """

    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    evaluate_every: int = 250
    patience: int = 20
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
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
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


def train(
    recogniser: Recogniser,
    corpus: Corpus,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    original: Recogniser | None = None,
) -> ErrorRates | None:
    """Train a recogniser on `corpus.train`, keep the weights with the best dev WER, and return their dev scores.

    Minimises the CTC loss. With an `original`, the loss also has the divergence from its output distribution, frame by
    frame: recovery of a converted model is this function with a short budget and a low learning rate. Without dev
    utterances the last weights are kept, and None is returned.

    Runs on every process of `accelerate launch`, or on a single one; several CPU processes are started by
    `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`.

    Args:
        recogniser: trained in place.
        corpus: its `train` is learned, its `dev` evaluated.
        config: budget and hyper-parameters.
        out_dir: directory for `best/` (the recogniser), `log.jsonl` (one line for each evaluation) and, during the
            run, `checkpoint-<step>/`. The same call continues there, under a budget in steps with the same bits as
            without interruption, or returns at once if the run has ended.
        original: the recogniser to stay close to.

    Raises:
        ValueError: if `out_dir` holds a run with other settings or weights, or a damaged one, or a loss is not finite.
    """
    plan = plan_of(recogniser.model)
    identity = {
        "corpus": corpus.name,
        "features": asdict(recogniser.feature_config),
        "vocabulary": recogniser.vocabulary,
        "plan": None if plan is None else plan.to_json(),
    }
    if config.hop is not None:
        recogniser.feature_config = replace(recogniser.feature_config, hop=config.hop)
    task = _Task(recogniser, corpus, config, Path(out_dir), original)
    loop = TrainingLoop(
        recogniser.model,
        config,
        batches=task.batches,
        loss=task.loss,
        evaluate=task.evaluate if len(corpus.dev) else None,
        out_dir=out_dir,
        identity=identity,
        on_evaluation=task.on_evaluation,
        name="train",
    )
    loop.run()
    recogniser.model.eval()
    return evaluate(recogniser, corpus.dev) if len(corpus.dev) else None


class _Task:
    """Batches, loss and evaluation of a recogniser's training."""

    def __init__(
        self,
        recogniser: Recogniser,
        corpus: Corpus,
        config: TrainConfig,
        out_dir: Path,
        original: Recogniser | None,
    ) -> None:
        self._recogniser, self._corpus, self._config = recogniser, corpus, config
        self._out_dir, self._original = out_dir, original
        self._accelerator = Accelerator()
        with self._accelerator.main_process_first():
            synthetic = self._synthetic_speech()
        self._plan = RoundPlan(list(corpus.train), synthetic, config)
        if original is not None:
            original.model.to(self._accelerator.device).eval()

    def _synthetic_speech(self) -> Sequence[Cut]:
        """Generated sentences, none of which is a dev or test transcript, spoken by synthetic voices."""
        config, corpus = self._config, self._corpus
        if not config.synthetic_utterances:
            return []
        transcripts = sorted({cut.supervisions[0].text for cut in corpus.train})
        texts = generate_sentences(
            config.synthetic_utterances,
            corpus.language,
            seed=config.seed,
            transcripts=transcripts,
            exclude=corpus.held_out,
        )
        rate = self._recogniser.feature_config.sampling_rate
        return [*synthesise(texts, corpus.language, cache_dir() / "synthetic", seed=config.seed, sampling_rate=rate)]

    def batches(self, epoch: int, progress: float) -> list[list[Item]]:
        return self._plan.batches(epoch, progress, self._accelerator.num_processes)

    def loss(self, items: list[Item], step: int) -> Tensor:
        # Seeding every step, rather than storing generators, is what makes a resumed run equal to an unbroken one.
        seed = hash((self._config.seed, step, self._accelerator.process_index)) & 0x7FFFFFFF
        torch.manual_seed(seed)
        batch = read_batch(items, self._recogniser, self._config, seed)
        batch = {name: tensor.to(self._accelerator.device) for name, tensor in batch.items()}
        output = self._recogniser.model.train()(**batch)
        if self._original is None:
            return output.loss
        return output.loss + self._config.distillation * self._divergence(output.logits, batch)

    def _divergence(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """KL(original ‖ trained) of the output distributions, averaged over the frames that are not padding."""
        assert self._original is not None
        inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
        with torch.no_grad():
            target = self._original.model(**inputs).logits.log_softmax(-1)
        lengths = self._original.model._get_subsampling_output_length(batch["attention_mask"].sum(1))
        valid = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        return kl_div(logits.log_softmax(-1)[valid], target[valid], reduction="batchmean", log_target=True)

    def evaluate(self) -> dict[str, float]:
        """Dev error rates, on the main process."""
        if not self._accelerator.is_main_process:
            return {}
        scores = evaluate(self._recogniser, self._corpus.dev)
        return {"dev_wer": scores.wer, "dev_cer": scores.cer}

    def on_evaluation(self, state: TrainingState, improved: bool) -> None:
        """Save the best recogniser; write and print the log."""
        if improved:
            self._recogniser.save(self._out_dir / "best")
        lines = [
            {
                name: value if name == "step" else round(value, 1 if name == "elapsed" else 4)
                for name, value in one.items()
            }
            for one in state.history
        ]
        partial = self._out_dir / "log.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.replace(self._out_dir / "log.jsonl")
        console.print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), highlight=False)
