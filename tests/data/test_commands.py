"""The commands convert and analyze on recordings and images."""

import shutil
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from rich.console import Console
from tiny_models import SENTENCES

import mapreuse as mr
from mapreuse import cli
from mapreuse.data import open_batches, open_model


def command(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(cli, "console", Console())
    monkeypatch.setattr(sys, "argv", ["mapreuse", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    written = capsys.readouterr()
    return stopped.value.code, written.out, written.err


def test_whispers_encoder_is_converted_and_analyzed(whisper, recordings, tmp_path, monkeypatch, capsys):
    for number in range(4):  # a conversion needs eight
        shutil.copy(recordings / "a.wav", recordings / f"{number}.wav")
    given = [whisper, "--calibration", recordings, "--stack", "model.encoder"]
    out = tmp_path / "converted"
    status, printed, error = command(monkeypatch, capsys, "convert", *given, "--plan", "2x2", "--out", out)
    assert status == 0, error
    assert "error, refitted: " in printed
    converted = mr.load(out)
    assert mr.plan_of(converted.model.encoder).reuses(1)
    extractor = tf.AutoFeatureExtractor.from_pretrained(out)
    features = extractor(np.zeros(8000), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        assert converted.model.encoder(features).last_hidden_state.shape == (1, 50, 32)

    status, _, error = command(monkeypatch, capsys, "analyze", *given, "--out", tmp_path / "maps")
    assert status == 0, error
    assert (tmp_path / "maps" / "analysis.json").is_file()


def test_a_vision_transformer_is_converted_and_analyzed(vit, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "converted"
    given = [vit, "--calibration", images]
    status, printed, error = command(monkeypatch, capsys, "convert", *given, "--plan", "2x2", "--out", out)
    assert status == 0, error
    assert "error, refitted: " in printed
    assert mr.plan_of(mr.load(out)).reuses(1)
    assert open_batches(open_model(out), images)

    status, _, error = command(monkeypatch, capsys, "analyze", *given, "--out", tmp_path / "maps")
    assert status == 0, error
    assert (tmp_path / "maps" / "analysis.json").is_file()


@pytest.mark.parametrize("command_name", ["convert", "analyze"])
def test_a_decoder_that_attends_to_an_encoder_is_refused(bart, tmp_path, monkeypatch, capsys, command_name):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 2))
    given = [bart, "--calibration", tmp_path / "sentences.txt", "--out", tmp_path / "out"]
    given += ["--plan", "2x2"] if command_name == "convert" else []
    status, _, error = command(monkeypatch, capsys, command_name, *given, "--stack", "decoder")

    assert status == 2
    assert error.startswith(
        "mapreuse: BartDecoder attends to the hidden states of an encoder, which calibration data does not contain"
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
