"""The command line of the lab: bad input is one line and exit status 2."""

import json

import numpy as np
import pytest
import soundfile
import torch
from commands import assert_refused, run_command
from mapreuse_lab import cli
from mapreuse_lab.training import Recogniser
from rich.console import Console

import mapreuse as mr
from mapreuse import commands


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns its exit status, standard output and standard error."""

    def run(*arguments):
        for module in (cli, commands):
            monkeypatch.setattr(module, "console", Console(width=200))
        return run_command(cli.main, "mapreuse-lab", monkeypatch, capsys, *arguments)

    return run


@pytest.fixture
def recordings(tmp_path):
    """A folder of eight recordings of noise."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    noise = np.random.default_rng(0).standard_normal(8000) / 10
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", noise[: 4000 + 500 * number], 8000)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--corpus", "nonsense"], "no corpus 'nonsense'"),
        (["evaluate", "--split", "train"], "--split must be test, dev or all"),
        (["evaluate", "/nowhere"], "/nowhere: neither a model of `mapreuse-lab fetch` nor a directory"),
        (["evaluate", "--plan", "4y4"], "character"),
        (["fetch", "gpt"], "no model 'gpt'; choose one of"),
        (["study", "--preset", "huge"], "--preset must be quick"),
        (["transcribe", "/nowhere.wav"], "/nowhere.wav"),
        (["study", "--out", "/dev/null"], "--out /dev/null cannot be written"),
        (["study", "--preset", "full", "--work", "/dev/null"], "--work /dev/null cannot be written"),
        (["study", "--workers", "2"], "belong to --preset full"),
        (["study", "--preset", "full", "--model", "x"], "belongs to --preset quick"),
        (["study", "--preset", "full", "--workers", "-1"], "--workers must be at least 1"),
        (["train", "--out", "x"], "give either --steps or --seconds"),
        (["train", "--out", "x", "--steps", "1", "--plan", "4y4"], "character"),
        (["train", "--out", "x", "--seconds", "nan"], "seconds must be a finite number"),
        (["corpus", "librispeech:/nowhere"], "/nowhere"),
        (["analyze", "baseline", "--out", "x"], "Missing option '--corpus'"),
        (["analyze", "baseline", "--corpus", "/nowhere", "--out", "x"], "expected a folder of wav or flac files"),
        (["convert", "baseline", "--corpus", "x", "--out", "y", "--budget", "speed"], "expected latency<=0.7"),
        (["convert", "/nowhere", "--corpus", "x", "--out", "y", "--plan", "2x4"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*arguments), "mapreuse-lab", message)


def test_the_help_says_what_the_tool_is_and_lists_its_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "The study behind mapreuse" in out
    for command in ("study", "corpus", "train", "evaluate", "transcribe", "analyze", "convert"):
        assert f" {command} " in out
    status, out, _ = run("--version")
    assert (status, out.split()[0]) == (0, "mapreuse-lab")


def test_a_corpus_is_described_with_its_attribution(run):
    status, out, _ = run("corpus", "prompts:en")
    assert status == 0
    assert "8000 Hz" in out
    assert "CC-BY-SA" in out


def test_a_recogniser_is_analyzed_over_a_folder_of_recordings(run, recordings, tmp_path):
    out = tmp_path / "found"
    status, _, error = run("analyze", "baseline", "--corpus", recordings, "--max-batches", "1", "--out", out)
    data = json.loads((out / "analysis.json").read_text())

    assert (status, error.strip()) == (0, "")
    assert torch.tensor(data["similarity"]["heads"]).shape == (8, 4, 8, 4)
    assert data["num_queries"] == pytest.approx(31.25 * sum(0.5 + 0.0625 * n for n in range(8)), abs=8)
    assert data["command"].startswith("mapreuse-lab analyze baseline ")


def test_eight_recordings_suffice_to_convert_a_recogniser(run, recordings, tmp_path):
    arguments = ["convert", "baseline", "--corpus", recordings, "--plan", "2x4", "--out"]
    status, printed, error = run(*arguments, tmp_path / "out")
    assert status == 0, error
    assert "error, refitted: " in printed
    converted = Recogniser.load(tmp_path / "out")
    assert mr.plan_of(converted.model).reuses(1)
    (recordings / "7.wav").unlink()
    status, _, error = run(*arguments, tmp_path / "again")
    assert status == 2
    assert f"{recordings}: found 7 utterances, but at least 8 are needed" in error
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("command", "split"), [("analyze", "dev"), ("convert", "train")])
def test_a_conversion_reads_the_training_set_and_an_analysis_the_dev_set(command, split, tmp_path, monkeypatch, run):
    """The dev set has too few utterances for a refit."""

    def batches(recogniser, source, *, split="dev", **limits):
        raise ValueError(f"{source}, {split}")

    monkeypatch.setattr("mapreuse_lab.training.speech_batches", batches)
    arguments = [command, "baseline", "--corpus", "prompts:en", "--out", tmp_path / "out"]
    status, _, error = run(*arguments, *(["--plan", "2x4"] if command == "convert" else []))
    assert (status, error) == (2, f"mapreuse-lab: prompts:en, {split}\n")
    assert not (tmp_path / "out").exists()
