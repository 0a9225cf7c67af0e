"""Training on speech with the hidden states of a teacher."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mapreuse_lab.models import taught_speech
from mapreuse_lab.training import (
    FeatureConfig,
    Recogniser,
    TrainConfig,
    alphabet,
    open_corpus,
    teacher_states,
    train,
    waveform_of,
)
from torch import nn


class LevelEncoder(nn.Module):
    """A teacher whose states are the level of each 20 ms, relative to the loudest, and its square."""

    def forward(self, input_values):
        levels = input_values.unfold(1, 320, 320).abs().amax(-1)
        levels = levels / levels.max()
        states = torch.stack([levels, levels.square()], -1)
        return SimpleNamespace(last_hidden_state=states)


@pytest.fixture(scope="module")
def corpus():
    return open_corpus("prompts:en")


@pytest.fixture(scope="module")
def taught(corpus, tmp_path_factory):
    """Eight samples."""
    teacher = SimpleNamespace(
        corpus=corpus,
        extractor=SimpleNamespace(sampling_rate=16000),
        model=SimpleNamespace(get_encoder=LevelEncoder),
        inputs=lambda samples: {"input_values": torch.from_numpy(samples)[None]},
    )
    directory = tmp_path_factory.mktemp("taught")
    short = [cut for cut in corpus.train if 0.5 < cut.duration < 1.5][:12]
    return taught_speech(teacher, [short], 8, directory), short, directory


def test_samples_have_the_transcripts_of_recordings(taught):
    cuts, short, _ = taught
    texts = {cut.supervisions[0].text for cut in short}
    for cut in cuts:
        rest = cut.supervisions[0].text
        while rest:
            start = max((one for one in texts if f"{rest} ".startswith(f"{one} ")), key=len)
            rest = rest[len(start) :].strip()


def test_states_are_those_of_the_sample_and_standardised(taught):
    cuts = list(taught[0])
    states = [teacher_states(cut) for cut in cuts]
    for cut, one in zip(cuts, states, strict=True):
        samples = waveform_of(cut, 16000)
        assert abs(len(one) - len(samples) / 320) <= 1
        levels = np.abs(samples[: len(one) * 320].reshape(-1, 320)).max(1)
        assert np.corrcoef(levels, one[:, 0])[0, 1] > 0.9
    every = torch.cat(states)
    assert torch.allclose(every.mean(0), torch.zeros(2), atol=1e-2)
    assert torch.allclose(every.std(0), torch.ones(2), atol=1e-2)


def test_finished_samples_are_opened_without_the_teacher(taught):
    cuts, _, directory = taught
    assert [cut.to_dict() for cut in taught_speech(None, [], 8, directory)] == [cut.to_dict() for cut in cuts]


CONFIG = TrainConfig(steps=60, batch_seconds=8, evaluate_every=60, speeds=(1.0,), noise_probability=0.0)


def trained_error(taught, corpus, weight, out):
    """Error of the best linear map from a trained encoder's hidden states to the teacher's."""
    sizes = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 64, "subsampling_channels": 8}
    recogniser = Recogniser.create(
        alphabet("en"), **sizes, feature_config=FeatureConfig(num_mel_bins=32), dropout=0.0
    )
    names = list(recogniser.model.state_dict())
    train(recogniser, replace(corpus, train=taught[0], dev=[]), replace(CONFIG, teacher_weight=weight), out)
    assert list(recogniser.model.state_dict()) == names
    hidden, states = [], []
    with recogniser.model.encoder.register_forward_hook(lambda _, __, output: hidden.append(output[0][0])):
        for cut in taught[0]:
            recogniser.logits([waveform_of(cut, 8000)])
            one = teacher_states(cut).T[None]
            states.append(nn.functional.interpolate(one, size=len(hidden[-1]), mode="linear")[0].T)
    inputs, targets = torch.cat(hidden), torch.cat(states)
    solution = torch.linalg.lstsq(inputs, targets).solution
    return float((inputs @ solution - targets).square().mean())


def test_the_teacher_shapes_the_hidden_states(taught, corpus, tmp_path):
    without, taught_error = (trained_error(taught, corpus, weight, tmp_path / str(weight)) for weight in (0.0, 5.0))
    assert taught_error < 0.8 * without


def test_a_teacher_of_another_speed_is_refused(taught, corpus, tmp_path):
    recogniser = Recogniser.create(alphabet("en"), num_layers=1, hidden_size=32, subsampling_channels=8)
    config = replace(CONFIG, teacher_weight=1.0, speeds=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"a teacher needs speeds=\(1.0,\)"):
        train(recogniser, replace(corpus, train=taught[0]), config, tmp_path)
