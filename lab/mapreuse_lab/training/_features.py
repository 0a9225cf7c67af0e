"""Log-mel features, and augmentation of waveforms and features."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapreuse.data import as_waveform, resample

_MAX_BAND, _MAX_SPAN = 10, 15  # of SpecAugment, in mels and frames


@dataclass(frozen=True)
class FeatureConfig:
    """Settings of the log-mel features.

    Attributes:
        sampling_rate: in Hz.
        window: length of an analysis window in seconds.
        hop: seconds between two windows.
        num_mel_bins: number of bands.
        lowest: lower edge of the lowest band in Hz.

    Raises:
        ValueError: if a value is not a positive finite number, or the values do not fit together.
    """

    sampling_rate: int = 8000
    window: float = 0.025
    hop: float = 0.01
    num_mel_bins: int = 64
    lowest: float = 20.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name in ("sampling_rate", "num_mel_bins")
            is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                kind = "whole" if whole else "finite"
                raise ValueError(f"the features' {name} must be a positive {kind} number, got {value!r}")
        if not (self.window_samples > 1 and self.hop_samples > 0 and self.lowest < self.sampling_rate / 2):
            raise ValueError(
                f"impossible features: window {self.window} s, hop {self.hop} s and lowest {self.lowest} Hz at "
                f"{self.sampling_rate} Hz; a window needs two samples, a hop one, and lowest must be below half the "
                "sampling rate"
            )

    @property
    def window_samples(self) -> int:
        return round(self.window * self.sampling_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.hop * self.sampling_rate)


def features(
    audio: Sequence[np.ndarray], config: FeatureConfig
) -> tuple[Float[Tensor, "batch frames mels"], Int[Tensor, "batch frames"]]:
    """Normalised log-mel features of a batch of waveforms, padded with zeros, and the mask of valid frames.

        x[t, m] = log(1e-5 + Σ_f  mel[m, f] |STFT(0.1 · audio / rms(audio))[t, f]|²)
        features = (x − mean_t x) / (std_t x + 0.01)

    Level, mean and standard deviation are computed per utterance (and band). So loudness and channel have no effect,
    and the features of an utterance do not depend on its batch.

    Args:
        audio: waveforms at `config.sampling_rate`, of any level. They are padded to one window if shorter.
        config: the settings.

    Raises:
        ValueError: if there is no waveform, or one is not one-dimensional and finite.
    """
    if not len(audio):
        raise ValueError("features need at least one waveform, got none")
    audio = [as_waveform(samples) for samples in audio]
    # Computed again in each epoch: 100 s of speech take 20 ms, and every epoch can perturb the waveform.
    length, hop = config.window_samples, config.hop_samples
    num_samples = torch.tensor([max(len(samples), length) for samples in audio])
    batch = torch.zeros(len(audio), int(num_samples.max()))
    for row, samples in zip(batch, audio, strict=True):
        waveform = torch.from_numpy(samples)
        level = waveform.double().square().mean().sqrt().clamp(min=1e-5)  # in float32 the squares could overflow
        row[: len(samples)] = 0.1 * waveform / level.float()
    num_frames = 1 + (num_samples - length) // hop
    frames = batch.unfold(1, length, hop) * torch.hann_window(length, periodic=False)
    num_bins = 2 ** (length - 1).bit_length() * 2
    power = torch.fft.rfft(frames, n=num_bins).abs().square()
    mel = (power @ mel_filters(config, num_bins)).add(1e-5).log()
    mask = torch.arange(mel.shape[1]) < num_frames[:, None]
    weight = mask[:, :, None].float()
    count = num_frames[:, None, None]
    mean = (mel * weight).sum(1, keepdim=True) / count
    deviation = (((mel - mean) * weight).square().sum(1, keepdim=True) / count).sqrt()
    return (mel - mean) / (deviation + 1e-2) * weight, mask.long()


@lru_cache(maxsize=8)
def mel_filters(config: FeatureConfig, num_bins: int) -> Float[Tensor, "frequencies mels"]:
    """Triangular filters, equally spaced on the scale 1127 ln(1 + f/700) from `lowest` to half the sampling rate."""
    frequencies = torch.linspace(0, config.sampling_rate / 2, num_bins // 2 + 1, dtype=torch.float64)
    mels = 1127 * torch.log1p(frequencies / 700)
    lowest = 1127 * np.log1p(config.lowest / 700)
    edges = torch.linspace(lowest, float(mels[-1]), config.num_mel_bins + 2, dtype=torch.float64)
    rising = (mels[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mels[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Speed up a waveform by `factor`; the pitch changes with it (Ko et al., 2015)."""
    ratio = Fraction(factor).limit_denominator(100)
    return resample(samples, ratio.numerator, ratio.denominator)


def spec_augment(
    batch: Float[Tensor, "batch frames mels"],
    mask: Int[Tensor, "batch frames"],
    generator: torch.Generator,
    *,
    bands: int,
    spans_per_second: float,
    frames_per_second: float,
) -> Float[Tensor, "batch frames mels"]:
    """SpecAugment (Park et al., 2019): set random mel bands and time spans to 0, which is the mean of the features.

    An utterance gets `bands` bands of at most 10 mels, and `spans_per_second` spans per second of at most 15 frames
    or a quarter of the utterance.
    """
    out = batch.clone()
    num_mels = batch.shape[2]

    def below(limit: int) -> int:
        return int(torch.randint(max(limit, 1), (), generator=generator))

    for row, length in zip(out, mask.sum(1).tolist(), strict=True):
        for _ in range(bands):
            width = below(_MAX_BAND + 1)
            start = below(num_mels - width)
            row[:, start : start + width] = 0
        for _ in range(round(length / frames_per_second * spans_per_second)):
            width = below(min(_MAX_SPAN, length // 4) + 1)
            start = below(length - width)
            row[start : start + width] = 0
    return out
