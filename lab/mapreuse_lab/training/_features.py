import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.signal import resample_poly
from torch import Tensor


@dataclass(frozen=True)
class FeatureConfig:
    """Log-mel settings: sampling rate and lowest band's edge in Hz, window and hop in seconds, number of bands.

    Raises `ValueError` for what is not a positive finite number, or makes no features.
    """

    sampling_rate: int = 8000
    window: float = 0.025
    hop: float = 0.01
    num_mel_bins: int = 64
    lowest: float = 20.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name in ("sampling_rate", "num_mel_bins")
            if not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
                kind = "whole" if whole else "finite"
                raise ValueError(f"the features' {name} must be a positive {kind} number: got {value!r}")
        if not (self.window_samples > 1 and self.hop_samples > 0 and self.lowest < self.sampling_rate / 2):
            raise ValueError(
                f"no features at {self.sampling_rate} Hz with window {self.window} s, hop {self.hop} s and lowest "
                f"{self.lowest} Hz: a window needs two samples, a hop one, and bands end at half the sampling rate"
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
    """Normalised log-mel features of a batch of waveforms, padded with zeros, and the mask of real frames.

        x[t, m] = log(1e-5 + Σ_f  mel[m, f] |STFT(0.1 · audio / rms(audio))[t, f]|²)
        features = (x − mean_t x) / (std_t x + 0.01)

    Waveforms are at `config.sampling_rate`, of any level and any length (padded to one window where shorter). Level,
    mean and deviation are per utterance (and band), over its own frames, so that loudness and channel drop out and
    an utterance's features do not depend on its batch.

    They are computed anew from cached waveforms whenever they are needed: 100 s of speech take 20 ms, less than
    reading them back would, and every epoch can perturb the waveform.
    """
    length, hop = config.window_samples, config.hop_samples
    num_samples = torch.tensor([max(len(samples), length) for samples in audio])
    batch = torch.zeros(len(audio), int(num_samples.max()))
    for row, samples in zip(batch, audio, strict=True):
        waveform = torch.as_tensor(samples, dtype=torch.float32)
        level = waveform.double().square().mean().sqrt().clamp(min=1e-5)  # in float32 the squares would overflow
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


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """A waveform at `target` Hz from one at `source` Hz, by polyphase filtering."""
    if source == target:
        return samples
    ratio = Fraction(target, source)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """The waveform played `factor` times as fast (pitch moves with it), by resampling (Ko et al., 2015)."""
    if factor == 1:
        return samples
    ratio = Fraction(factor).limit_denominator(100)
    return resample_poly(samples, ratio.denominator, ratio.numerator).astype(np.float32)


def spec_augment(
    batch: Float[Tensor, "batch frames mels"],
    mask: Int[Tensor, "batch frames"],
    generator: torch.Generator,
    *,
    bands: int,
    band_width: int,
    spans_per_second: float,
    span: int,
    frames_per_second: float = 100.0,
) -> Float[Tensor, "batch frames mels"]:
    """SpecAugment (Park et al., 2019): `bands` mel bands and some spans of time set to 0, the features' mean.

    Each band is up to `band_width` mels wide; an utterance of s seconds loses round(s · spans_per_second) spans
    of up to `span` frames each.
    """
    out = batch.clone()
    num_mels = batch.shape[2]

    def below(limit: int) -> int:
        return int(torch.randint(max(limit, 1), (), generator=generator))

    for row, length in zip(out, mask.sum(1).tolist(), strict=True):
        for _ in range(bands):
            width = below(band_width + 1)
            start = below(num_mels - width)
            row[:, start : start + width] = 0
        for _ in range(round(length / frames_per_second * spans_per_second)):
            width = below(min(span, length // 4) + 1)
            start = below(length - width)
            row[start : start + width] = 0
    return out
