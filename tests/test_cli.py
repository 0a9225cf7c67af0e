"""The command line: bad input is one line and exit status 2."""

import subprocess
import sys

import pytest
from rich.console import Console

from mapreuse import cli


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
