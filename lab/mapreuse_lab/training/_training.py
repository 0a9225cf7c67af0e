"""Training of a recogniser, from scratch or after a conversion."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from lhotse import MonoCut
from lhotse.cut import Cut
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div

from mapreuse.console import console
from mapreuse.conversion import LoopConfig, TrainingLoop, TrainingState
from mapreuse.models import plan_of
from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._corpora import Corpus
from mapreuse_lab.training._evaluation import ErrorRates, evaluate
from mapreuse_lab.training._features import change_speed, features, spec_augment
from mapreuse_lab.training._files import cache_dir, write_whole
from mapreuse_lab.training._recogniser import Recogniser
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise

Item = tuple[Cut, float]
"""An utterance, and the factor of its speed."""


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Hyper-parameters of a training run: those of `LoopConfig`, of the data and of the augmentation.

    Attributes:
        batch_seconds: maximum seconds of padded audio in a batch.
        synthetic_utterances: number of generated sentences, spoken by espeak-ng.
        real_share: share of recorded speech, in seconds, at the start and at the end of training.
        speeds: each utterance is played at a random one of these speeds, which changes its pitch.
        noise_probability: probability that noise is added to an utterance, at 10 to 45 dB below its level.
        mask_bands, mask_spans_per_second: numbers of masks of SpecAugment, per utterance and per second.
        distillation: weight of the divergence from the original, relative to the CTC loss; see `train`.
        teacher_weight: weight of the error of the teacher's states, relative to the CTC loss; see `train`.
        seed: random seed of batches and augmentation.
    """

    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    evaluate_every: int = 250
    patience: int = 20
    batch_seconds: float = 40.0
    synthetic_utterances: int = 0
    real_share: tuple[float, float] = (1.0, 1.0)
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise_probability: float = 0.4
    mask_bands: int = 2
    mask_spans_per_second: float = 0.7
    distillation: float = 1.0
    teacher_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share <= 1 for share in self.real_share):
            raise ValueError(f"real_share must be two fractions above 0 and at most 1, got {self.real_share}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def train(
    recogniser: Recogniser,
    corpus: Corpus,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    original: Recogniser | None = None,
) -> ErrorRates | None:
    """Train a recogniser on `corpus.train`, keep the weights with the best dev WER, and return their error rates.

    Training minimises the CTC loss. If `original` is given, it minimises

        CTC + distillation · KL(p° ‖ p)

    with the output distributions p of the recogniser and p° of the original, at all frames that are not padding.

    With a `teacher_weight`, it minimises

        CTC + teacher_weight · mean (W h + b − s)²

    with the last hidden states h of the encoder and the states s of a teacher, at the same frames. The linear layer
    (W, b) is trained, too, and dropped afterwards. Every training utterance needs states as
    `mapreuse_lab.models.taught_speech` makes them, and keeps its speed.

    Recovery after a conversion is this function with a short budget and a low learning rate.

    Every process of `accelerate launch` may call this function. On a CPU, `ACCELERATE_USE_CPU=true accelerate launch
    --multi_gpu --num_processes 2 ...` starts two processes.

    Args:
        recogniser: trained in place.
        corpus: the recogniser is trained on `train` and evaluated on `dev`.
        config: budget and hyper-parameters.
        out_dir: directory of `best/` (the recogniser), `log.jsonl` (one line per evaluation) and
            `checkpoint-<step>/`. The same call continues an interrupted run. With a budget in steps, the result has
            the same bits as without the interruption. If the run has ended, the call returns at once.
        original: the recogniser to stay close to.

    Returns:
        The dev error rates; None if the corpus has no dev utterances. Then the last weights are kept.

    Raises:
        ValueError: if `out_dir` holds a damaged run or one with other settings or weights, or a loss is not finite.
    """
    if config.teacher_weight and (config.speeds != (1.0,) or config.synthetic_utterances or original is not None):
        raise ValueError("a teacher needs speeds=(1.0,), and neither synthetic utterances nor an original")
    plan = plan_of(recogniser.model)
    identity = {
        "corpus": corpus.name,
        "features": asdict(recogniser.feature_config),
        "vocabulary": recogniser.vocabulary,
        "plan": None if plan is None else plan.to_json(),
    }
    accelerator = Accelerator()
    with accelerator.main_process_first():
        rate = recogniser.feature_config.sampling_rate
        synthetic = synthetic_speech(corpus, config.synthetic_utterances, config.seed, rate)
    if original is not None:
        original.model.to(accelerator.device).eval()
    trained: nn.Module = recogniser.model
    if config.teacher_weight:
        trained = nn.ModuleDict(
            {"model": recogniser.model, "teacher": _teacher_head(recogniser, corpus, config.seed)}
        )

    def loss(items: list[Item], step: int) -> Tensor:
        # A seed for each step makes a resumed run equal to an uninterrupted one without storing generators.
        seed = hash((config.seed, step, accelerator.process_index)) & 0x7FFFFFFF
        torch.manual_seed(seed)
        batch = read_batch(items, recogniser, config, seed)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        if config.teacher_weight:
            return _taught_loss(trained.train(), items, recogniser, batch, config.teacher_weight)
        output = recogniser.model.train()(**batch)
        if original is None:
            return output.loss
        return output.loss + config.distillation * _divergence(original, output.logits, batch)

    def evaluate_dev() -> dict[str, float]:
        if not accelerator.is_main_process:
            return {}
        scores = evaluate(recogniser, corpus.dev)
        return {"dev_wer": scores.wer, "dev_cer": scores.cer}

    def save_and_log(state: TrainingState, improved: bool) -> None:
        if improved:
            recogniser.save(Path(out_dir) / "best")
        entries = [{name: round(value, 4) for name, value in entry.items()} for entry in state.history]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_whole(Path(out_dir) / "log.jsonl", lambda file: file.write_text(text))
        console.print(", ".join(f"{name} {value}" for name, value in entries[-1].items()), highlight=False)

    TrainingLoop(
        trained,
        config,
        batches=lambda epoch, progress: epoch_batches(list(corpus.train), synthetic, config, epoch, progress),
        loss=loss,
        evaluate=evaluate_dev if len(corpus.dev) else None,
        out_dir=out_dir,
        identity=identity,
        on_evaluation=save_and_log,
        name="train",
    ).run()
    recogniser.model.eval()
    return evaluate(recogniser, corpus.dev) if len(corpus.dev) else None


def epoch_batches(
    real: Sequence[Cut], synthetic: Sequence[Cut], config: TrainConfig, epoch: int, progress: float
) -> list[list[Item]]:
    """The batches of one epoch: utterances of similar length together, in random order.

    An epoch has every recorded utterance once. Random synthetic utterances are added until recorded speech makes up
    `config.real_share` of the seconds, or all of them are used.

    Args:
        real: recorded utterances.
        synthetic: synthetic utterances.
        config: hyper-parameters; the random order depends on its seed and on `epoch`.
        progress: fraction of the budget that is used.
    """
    generator = random.Random(f"{config.seed}:{epoch}")
    share = config.real_share[0] + (config.real_share[1] - config.real_share[0]) * progress
    chosen = list(real)
    missing = sum(cut.duration for cut in real) * (1 - share) / share
    for cut in generator.sample(synthetic, len(synthetic)):
        if missing <= 0:
            break
        missing -= cut.duration
        chosen.append(cut)
    items = [(cut, generator.choice(config.speeds)) for cut in chosen]
    # Noise on the lengths: an utterance shares its batch with others in each epoch.
    items.sort(key=lambda item: item[0].duration / item[1] * generator.uniform(0.9, 1.1))
    batches: list[list[Item]] = []
    longest = 0.0
    for cut, speed in items:
        seconds = cut.duration / speed
        longest = max(longest, seconds)
        if batches and (len(batches[-1]) + 1) * longest <= config.batch_seconds:
            batches[-1].append((cut, speed))
        else:
            batches.append([(cut, speed)])
            longest = seconds
    generator.shuffle(batches)
    return batches


def read_batch(items: Sequence[Item], recogniser: Recogniser, config: TrainConfig, seed: int) -> dict[str, Tensor]:
    """Model inputs of one batch: augmented features, their attention mask, and labels padded with −100."""
    noise, rate = np.random.default_rng(seed), recogniser.feature_config.sampling_rate
    audio, labels = [], []
    for cut, speed in items:
        samples = change_speed(waveform_of(cut, rate), speed)
        if noise.random() < config.noise_probability:
            decibels = noise.uniform(10.0, 45.0)
            level = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-decibels / 20)
            samples = samples + np.float32(level) * noise.standard_normal(len(samples), dtype=np.float32)
        audio.append(samples)
        labels.append(torch.tensor(recogniser.encode(cut.supervisions[0].text)))
    batch, mask = features(audio, recogniser.feature_config)
    batch = spec_augment(
        batch,
        mask,
        torch.Generator().manual_seed(seed),
        bands=config.mask_bands,
        spans_per_second=config.mask_spans_per_second,
        frames_per_second=1 / recogniser.feature_config.hop,
    )
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_features": batch, "attention_mask": mask, "labels": padded}


def synthetic_speech(corpus: Corpus, number: int, seed: int, rate: int) -> list[Cut]:
    """Generated sentences, none of which contains a dev or test transcript, spoken by synthetic voices."""
    if not number:
        return []
    transcripts = sorted({cut.supervisions[0].text for cut in corpus.train})
    texts = generate_sentences(
        number,
        corpus.language,
        seed=seed,
        transcripts=transcripts,
        exclude=corpus.held_out,
    )
    return [*synthesise(texts, corpus.language, cache_dir() / "synthetic", seed=seed, sampling_rate=rate)]


def _divergence(original: Recogniser, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """KL(original ‖ trained) of the output distributions, averaged over the frames that are not padding."""
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    with torch.no_grad():
        target = original.model(**inputs).logits.log_softmax(-1)
    lengths = original.num_frames(batch["attention_mask"].sum(1))
    valid = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    return kl_div(logits.log_softmax(-1)[valid], target[valid], reduction="batchmean", log_target=True)


def teacher_states(cut: Cut) -> Float[Tensor, "states channels"]:
    """The states of a teacher, from the file beside the recording."""
    assert isinstance(cut, MonoCut)
    assert cut.recording is not None
    return load_file(Path(cut.recording.sources[0].source).with_suffix(".safetensors"))["states"].float()


def _teacher_head(recogniser: Recogniser, corpus: Corpus, seed: int) -> nn.Linear:
    """An untrained linear layer from the encoder's hidden states to the teacher's."""
    channels = teacher_states(next(iter(corpus.train))).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(recogniser.model.config.encoder_config.hidden_size, channels)


def _taught_loss(
    trained: nn.Module, items: list[Item], recogniser: Recogniser, batch: dict[str, Tensor], weight: float
) -> Tensor:
    """The CTC loss plus the mean squared error of the teacher's states, interpolated to the recogniser's frames."""
    recorded: list[Tensor] = []
    model, head = recogniser.model, trained.get_submodule("teacher")
    with model.encoder.register_forward_hook(lambda _, __, output: recorded.append(output.last_hidden_state)):
        loss = model(**batch).loss
    lengths = recogniser.num_frames(batch["attention_mask"].sum(1)).tolist()
    errors = []
    for (cut, _), hidden_states, length in zip(items, recorded[0], lengths, strict=True):
        states = teacher_states(cut).to(hidden_states.device)
        aligned = interpolate(states.T[None], size=length, mode="linear")[0].T
        errors.append((head(hidden_states[:length]) - aligned).square().flatten())
    return loss + weight * torch.cat(errors).mean()
