"""Calibration batches from corpora and folders of recordings."""

import numpy as np
import pytest
import soundfile
import torch
from mapreuse_lab.training import features, speech_batches


def test_batches_of_a_corpus_are_sorted_by_length(prompts, baseline):
    batches = speech_batches(baseline, "prompts:en", max_batches=2)
    utterances = [cut.load_audio()[0] for cut in list(prompts.dev)[:16]]
    shortest, longest = min(utterances, key=len), max(utterances, key=len)

    assert sum(len(batch["input_features"]) for batch in batches) == 16
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths)
    for found, samples in ((batches[0]["input_features"][0], shortest), (batches[-1]["input_features"][-1], longest)):
        expected = features([samples], baseline.feature_config)[0][0]
        torch.testing.assert_close(found[: len(expected)], expected)
        assert (found[len(expected) :] == 0).all()


def test_recordings_of_a_folder_are_resampled_and_long_ones_are_cut_into_pieces(tiny, tmp_path):
    noise = np.random.default_rng(0).standard_normal(16000 * 70).astype(np.float32) / 10
    (tmp_path / "inside").mkdir()
    soundfile.write(tmp_path / "long.flac", noise, 16000)
    soundfile.write(tmp_path / "short.wav", noise[:16000], 16000)
    soundfile.write(tmp_path / "inside" / "slow.wav", noise[:8000], 8000)
    soundfile.write(tmp_path / "inside" / "both.WAV", noise[:16000].reshape(-1, 2), 8000)
    batches = speech_batches(tiny, tmp_path)
    lengths = [round(int(n) / 100) for batch in batches for n in batch["attention_mask"].sum(1)]

    assert lengths == [1, 1, 1, 35, 35]
    assert [len(batch["input_features"]) for batch in batches] == [3, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda there: there / "nothing", "expected a folder of wav or flac files, or a corpus"),
        (lambda there: there, "contains no wav or flac files"),
        (lambda there: "prompts:tlh", "no such language"),
        (lambda there: tone(there, 0.01), "0.010 s long"),
        (lambda there: tone(there, 1.0), "found 1 utterances, but at least 4 are needed"),
    ],
)
def test_an_unusable_source_is_refused_on_one_line(tiny, tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        speech_batches(tiny, make(tmp_path))

    assert "\n" not in str(refused.value)


def tone(folder, seconds):
    soundfile.write(folder / "tone.wav", 0.1 * np.sin(np.arange(round(seconds * 8000)) / 5), 8000)
    return folder
