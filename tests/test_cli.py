"""The command line: bad input is one line and exit status 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from tiny_models import SENTENCES, save_bert

from mapreuse import cli
from mapreuse.convert import open_batches, open_model
from mapreuse.measure import analyze


def mapreuse(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["mapreuse", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    written = capsys.readouterr()
    return stopped.value.code, written.out, written.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--corpus", "nonsense"], "no corpus 'nonsense'"),
        (["evaluate", "--model", "/nowhere"], "/nowhere"),
        (["evaluate", "--split", "train"], "--split must be test or dev"),
        (["study", "--preset", "huge"], "--preset must be quick"),
        (["study", "--no-such-option"], "No such option"),
        (["transcribe", "/nowhere.wav"], "/nowhere.wav"),
        (["train", "--out", "x"], "--steps or as --seconds"),
        (["train", "--out", "x", "--steps", "1", "--plan", "4y4"], "character"),
        (["corpus", "librispeech:/nowhere"], "/nowhere"),
        (["analyze", "recogniser", "--out", "x"], "calibration"),
        (["analyze", "recogniser", "--calibration", "/nowhere", "--out", "x"], "no such folder of wav or flac files"),
        (["analyze", "/nowhere", "--calibration", "/nowhere", "--out", "x"], "/nowhere: no such directory"),
        (["frobnicate"], "No such command"),
        ([], "Missing command"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, error = mapreuse(monkeypatch, capsys, *arguments)

    assert status == 2
    assert out == ""
    assert error.startswith("mapreuse: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_text_encoder_is_analyzed_over_a_text_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console())
    directory = save_bert(tmp_path / "model")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    arguments = ["analyze", str(directory), "--calibration", str(tmp_path / "sentences.txt")]
    status, out, error = mapreuse(
        monkeypatch, capsys, *arguments, "--out", str(tmp_path / "found"), "--epsilon", "0.1"
    )
    data = json.loads((tmp_path / "found" / "analysis.json").read_text())

    assert (status, error.strip()) == (0, "")
    assert "Most similar head of the layer before" in out
    assert str(tmp_path / "found" / "index.html") in out.replace("\n", "")
    assert len(data["entropy"]["heads"]) == 3
    assert data["num_queries"] == 1 + 3 + 6 + 8 + 8 + 8
    assert data["concentration"]["epsilon"] == 0.1
    assert data["command"].startswith(f"mapreuse analyze {directory} --calibration ")
    found = analyze(open_model(directory).model, open_batches(open_model(directory), tmp_path / "sentences.txt"))
    assert data["diagonality"]["heads"][2][1] == pytest.approx(found.diagonality.heads[2, 1].item(), abs=1e-4)


def test_the_shipped_recogniser_is_analyzed_over_a_folder_of_recordings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console())
    noise = np.random.default_rng(0).standard_normal(8000) / 10
    for number in range(5):
        soundfile.write(tmp_path / f"{number}.wav", noise[: 4000 + 1000 * number], 8000)
    arguments = ["analyze", "recogniser", "--calibration", str(tmp_path), "--max-batches", "1"]
    status, _, error = mapreuse(monkeypatch, capsys, *arguments, "--out", str(tmp_path / "found"))
    data = json.loads((tmp_path / "found" / "analysis.json").read_text())

    assert (status, error.strip()) == (0, "")
    assert torch.tensor(data["similarity"]["heads"]).shape == (8, 4, 8, 4)
    assert data["num_queries"] == pytest.approx(25 * (0.5 + 0.625 + 0.75 + 0.875 + 1), abs=5)


def test_a_model_without_a_tokenizer_is_refused_on_one_line(tmp_path, monkeypatch, capsys):
    save_bert(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    arguments = ["analyze", str(tmp_path), "--calibration", str(tmp_path / "sentences.txt"), "--out", "x"]
    status, out, error = mapreuse(monkeypatch, capsys, *arguments)

    assert (status, out) == (2, "")
    assert error == f"mapreuse: {tmp_path}: holds no tokenizer; copy it there from where the model came from\n"


def test_a_corpus_is_described_with_its_attribution(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console())
    status, out, _ = mapreuse(monkeypatch, capsys, "corpus", "prompts:en")

    assert status == 0
    assert "8000 Hz" in out
    assert "CC-BY-SA" in out


def test_the_installed_command_reports_bad_input_without_a_traceback():
    command = [sys.executable, "-m", "mapreuse.cli", "frobnicate"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
