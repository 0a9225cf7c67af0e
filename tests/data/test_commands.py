"""The commands convert and analyze on recordings and images."""

import shutil

import numpy as np
import torch
import transformers as tf
from commands import run_command

import mapreuse as mr
from mapreuse import cli
from mapreuse.data import open_batches, open_model


def assert_converted_and_analyzed(monkeypatch, capsys, model, given, out):
    """Convert a model by the command line, analyze it, and return the converted model."""
    for command in (["convert", "--plan", "2x2", "--out", out / "model"], ["analyze", "--out", out / "maps"]):
        status, printed, error = run_command(
            cli.main, "mapreuse", monkeypatch, capsys, command[0], model, *given, *command[1:]
        )
        assert status == 0, error
        assert "error, refitted: " in printed or command[0] == "analyze"
    assert (out / "maps" / "analysis.json").is_file()
    return mr.load(out / "model")


def test_whispers_encoder_is_converted_and_analyzed(whisper, recordings, tmp_path, monkeypatch, capsys):
    for number in range(4):  # a conversion needs eight
        shutil.copy(recordings / "a.wav", recordings / f"{number}.wav")
    given = ["--calibration", recordings, "--stack", "model.encoder"]
    converted = assert_converted_and_analyzed(monkeypatch, capsys, whisper, given, tmp_path)
    assert mr.plan_of(converted.model.encoder).reuses(1)
    extractor = tf.AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    features = extractor(np.zeros(8000), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        assert converted.model.encoder(features).last_hidden_state.shape == (1, 50, 32)


def test_a_vision_transformer_is_converted_and_analyzed(vit, images, tmp_path, monkeypatch, capsys):
    converted = assert_converted_and_analyzed(monkeypatch, capsys, vit, ["--calibration", images], tmp_path)
    assert mr.plan_of(converted).reuses(1)
    assert open_batches(open_model(tmp_path / "model"), images)
