import numpy as np
import pytest
import torch
from mapreuse_lab.training import FeatureConfig, features
from mapreuse_lab.training._features import change_speed, mel_filters, resample, spec_augment

CONFIG = FeatureConfig()


def tone(hertz: float, seconds: float, rate: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_an_utterance_has_the_same_features_alone_and_in_any_batch(prompts):
    audio = [cut.load_audio()[0] for cut in list(prompts.test)[:5]]
    together, mask = features(audio, CONFIG)
    for row, real, samples in zip(together, mask.bool(), audio, strict=True):
        alone, _ = features([samples], CONFIG)
        assert torch.allclose(row[real], alone[0], atol=1e-5)
        assert not row[~real].any()


def test_features_come_every_ten_milliseconds_with_mean_zero_and_deviation_one(prompts):
    samples = next(iter(prompts.test)).load_audio()[0]
    (row,), (mask,) = features([samples], CONFIG)
    assert len(row) == int(mask.sum()) == 1 + (len(samples) - 200) // 80
    assert row.mean(0).abs().max() < 1e-4
    assert (row.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("factor", [1 / 30, 1e30])
def test_loudness_has_no_effect(prompts, factor):
    samples = next(iter(prompts.test)).load_audio()[0]
    expected, _ = features([samples], CONFIG)
    found, _ = features([samples * np.float32(factor)], CONFIG)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "setting",
    [
        {"sampling_rate": "x"},
        {"sampling_rate": 8000.0},
        {"window": -1.0},
        {"window": 1e-6},
        {"hop": 0},
        {"hop": float("nan")},
        {"num_mel_bins": 6.5},
        {"lowest": 5000.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"features.* {name.split('_')[0]}"):
        FeatureConfig(**setting)


@pytest.mark.parametrize("hertz", [200, 1000, 3000])
def test_a_tone_is_loudest_in_its_own_band(hertz):
    filters = mel_filters(CONFIG, 512)
    power = torch.zeros(257)
    power[round(hertz / 4000 * 256)] = 1
    expected = int((power @ filters).argmax())
    quiet = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 1e-2
    (row,), _ = features([np.concatenate([quiet, tone(hertz, 0.5)])], CONFIG)
    assert abs(int((row[-20:].mean(0) - row[:20].mean(0)).argmax()) - expected) <= 1


def test_audio_below_one_window_is_padded_to_one_frame():
    batch, mask = features([np.ones(10, np.float32), np.ones(200, np.float32)], CONFIG)
    assert batch.shape == (2, 1, 64)
    assert mask.tolist() == [[1], [1]]


def test_resampling_keeps_the_pitch_and_speed_changes_it():
    def pitch(samples: np.ndarray, rate: int) -> float:
        return float(np.fft.rfft(samples * np.hanning(len(samples))).__abs__().argmax() * rate / len(samples))

    assert pitch(resample(tone(500, 1, 44100), 44100, 8000), 8000) == pytest.approx(500, abs=2)
    faster = change_speed(tone(500, 1), 1.1)
    assert len(faster) == pytest.approx(8000 / 1.1, abs=2)
    assert pitch(faster, 8000) == pytest.approx(550, abs=2)


def test_masks_are_limited_in_size_and_follow_their_generator():
    batch, mask = torch.ones(4, 300, 64), torch.ones(4, 300, dtype=torch.long)
    settings = {"bands": 2, "spans_per_second": 1.0, "frames_per_second": 100.0}
    masked = spec_augment(batch, mask, torch.Generator().manual_seed(1), **settings)
    again = spec_augment(batch, mask, torch.Generator().manual_seed(1), **settings)
    assert torch.equal(masked, again)
    assert 0 < (masked == 0).float().mean() < 20 / 64 + 3 * 15 / 300
    assert (batch == 1).all()
