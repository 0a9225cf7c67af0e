"""What one training step reads: which utterances, how perturbed, and their features and labels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from mapreuse_lab.training._audio import waveform_of
from mapreuse_lab.training._features import change_speed, features, spec_augment
from mapreuse_lab.training._recogniser import Recogniser

if TYPE_CHECKING:
    from mapreuse_lab.training._training import TrainConfig

Item = tuple[Cut, float]


@dataclass(frozen=True)
class RoundPlan:
    """Draws the batches of one round: every recorded utterance once, with synthetic ones beside them.

    Synthetic utterances are drawn until recorded speech makes up `real_share` of the round's seconds (or all
    synthetic speech is used). Everything follows from `seed` and the arguments of `batches`.
    """

    real: Sequence[Cut]
    synthetic: Sequence[Cut]
    config: "TrainConfig"

    def batches(self, round_number: int, progress: float, num_processes: int) -> list[list[Item]]:
        """Batches of (cut, speed) of similar length, in random order, as many as `num_processes` divides."""
        config = self.config
        generator = random.Random(f"{config.seed}:{round_number}")
        share = config.real_share[0] + (config.real_share[1] - config.real_share[0]) * progress
        chosen = list(self.real)
        wanted = sum(cut.duration for cut in self.real) * (1 - share) / share
        for cut in generator.sample(self.synthetic, len(self.synthetic)):
            if wanted <= 0:
                break
            wanted -= cut.duration
            chosen.append(cut)
        items = [(cut, generator.choice(config.speeds)) for cut in chosen]
        # A little noise on the lengths gives every round other neighbours.
        items.sort(key=lambda item: item[0].duration / item[1] * generator.uniform(0.9, 1.1))
        batches: list[list[Item]] = []
        longest = 0.0
        for item in items:
            seconds = item[0].duration / item[1]
            longest = max(longest, seconds) if batches else seconds
            if batches and (len(batches[-1]) + 1) * longest <= config.batch_seconds:
                batches[-1].append(item)
            else:
                batches.append([item])
                longest = seconds
        while len(batches) % num_processes:
            batches.append(generator.choice(batches))
        generator.shuffle(batches)
        return batches


def read_batch(items: Sequence[Item], recogniser: Recogniser, config: "TrainConfig", seed: int) -> dict[str, Tensor]:
    """Model inputs of one batch: perturbed, masked features, their attention mask, labels padded with −100."""
    generator = torch.Generator().manual_seed(seed)
    noise = np.random.default_rng(seed)
    rate = recogniser.feature_config.sampling_rate
    audio, labels = [], []
    for cut, speed in items:
        samples = change_speed(waveform_of(cut, rate), speed)
        if noise.random() < config.noise_probability:
            decibels = noise.uniform(*config.noise_decibels)
            level = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-decibels / 20)
            samples = samples + np.float32(level) * noise.standard_normal(len(samples), dtype=np.float32)
        audio.append(samples)
        labels.append(torch.tensor(recogniser.encode(cut.supervisions[0].text)))
    heard = recogniser.feature_config
    heard = replace(heard, hop=heard.hop * config.tempos[noise.integers(len(config.tempos))])
    batch, mask = features(audio, heard)
    batch = spec_augment(
        batch,
        mask,
        generator,
        bands=config.mask_bands,
        band_width=config.mask_band_width,
        spans_per_second=config.mask_spans_per_second,
        span=config.mask_span,
        frames_per_second=1 / heard.hop,
    )
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_features": batch, "attention_mask": mask, "labels": padded}
