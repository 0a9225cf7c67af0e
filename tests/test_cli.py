"""The command line: bad input is one line and exit status 2."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from commands import assert_refused, run_command
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import SENTENCES, save_bert, save_llama
from transformers import AutoTokenizer, pipeline

import mapreuse as mr
from mapreuse import cli
from mapreuse import commands as shared_steps
from mapreuse.data import open_batches, open_model
from mapreuse.measure import analyze


def mapreuse(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    for module in (cli, shared_steps):
        monkeypatch.setattr(module, "console", Console(width=1000))
    return run_command(cli.main, "mapreuse", monkeypatch, capsys, *arguments)


@pytest.fixture
def given(tmp_path):
    """A model and its calibration data, as arguments."""
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    return [save_bert(tmp_path / "model"), "--calibration", tmp_path / "sentences.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "/nowhere", "--calibration", "/nowhere", "--out", "x"], "/nowhere: no such directory"),
        (["analyze", "/nowhere", "--out", "x"], "calibration"),
        (["convert", "/nowhere", "--calibration", "x", "--out", "y", "--budget", "speed"], "expected latency<=0.7"),
        (["convert", "/nowhere", "--calibration", "/nowhere", "--out", "x"], "/nowhere: no such directory"),
        (["breakdown", "/nowhere", "--calibration", "/nowhere"], "/nowhere: no such directory"),
        (["bench", "/nowhere"], "calibration"),
        (["bench", "/nowhere", "--calibration", "x", "--device", "abacus"], "--device must be cpu or cuda"),
        (["bench", "/nowhere", "--calibration", "x", "--json", "/proc"], "/proc cannot be written"),
        (["frobnicate"], "No such command"),
        ([], "Missing command"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(mapreuse(monkeypatch, capsys, *arguments), "mapreuse", message)


def test_a_text_encoder_is_analyzed_over_a_text_file(given, tmp_path, monkeypatch, capsys):
    status, out, error = mapreuse(monkeypatch, capsys, "analyze", *given, "--out", tmp_path / "found")
    data = json.loads((tmp_path / "found" / "analysis.json").read_text())

    assert (status, error) == (0, "")
    assert "Most similar head of the layer before" in out
    assert str(tmp_path / "found" / "index.html") in out
    assert len(data["entropy"]["heads"]) == 3
    assert data["num_queries"] == 3 * (1 + 3 + 6 + 8 + 8 + 8)
    assert data["command"].startswith(f"mapreuse analyze {given[0]} --calibration ")
    found = analyze(open_model(given[0]).model, open_batches(open_model(given[0]), given[2]))
    assert data["diagonality"]["heads"][2][1] == pytest.approx(found.diagonality[2, 1].item(), abs=1e-4)


def test_a_converted_directory_opens_in_one_line_and_runs_in_a_pipeline(given, tmp_path, monkeypatch, capsys):
    (given[0] / "README.md").write_text("a card")
    out = tmp_path / "converted"
    options = ["--out", out, "--plan", "[0,0,2]", "--distill-seconds", "2"]
    status, printed, error = mapreuse(monkeypatch, capsys, "convert", *given, *options)
    assert status == 0, error
    converted, original = mr.load(out), open_model(given[0]).model
    tokens = AutoTokenizer.from_pretrained(out)
    (found,) = pipeline("feature-extraction", model=converted, tokenizer=tokens)("maps are alike")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor([found]), converted(**tokens("maps are alike", return_tensors="pt"))[0]
        )
    assert (out / "README.md").read_text() == "a card"
    assert mr.plan_of(converted).reuses(1)
    assert not mr.plan_of(converted).reuses(2)
    for step in ("aligned", "refitted", "distilled"):
        assert f"error, {step}: " in printed
    numbers = [f"{sum(p.numel() for p in model.parameters()):,}" for model in (original, converted)]
    assert f"parameters: {numbers[0]} before, {numbers[1]} after" in printed
    assert "budget" not in printed
    assert not list(tmp_path.glob("*.work"))
    assert f"{out}: open it with mapreuse.load" in printed


def test_an_output_that_is_a_link_to_an_empty_directory_is_written_through_it(given, tmp_path, monkeypatch, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    options = ["--plan", "full", "--out", tmp_path / "link"]
    status, printed, error = mapreuse(monkeypatch, capsys, "convert", *given, *options)
    assert status == 0, error
    assert "The plan shares no map" in printed
    assert "budget" not in printed
    assert mr.plan_of(mr.load(tmp_path / "real")).is_full
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("convert", "/", "/ exists already"),
        ("convert", ".", "exists already"),
        ("convert", "afile", "afile exists already"),
        ("convert", "afile/below", "afile is no"),
        ("analyze", "afile", "afile is not a writable directory"),
        ("analyze", "afile/below", "afile is not a writable directory"),
    ],
)
def test_an_output_that_cannot_be_made_is_refused_in_one_line(
    command, out, message, given, tmp_path, monkeypatch, capsys
):
    (tmp_path / "afile").write_text("mine")
    monkeypatch.chdir(tmp_path)
    plan = ["--plan", "[0,0,2]"] if command == "convert" else []
    status, printed, error = mapreuse(monkeypatch, capsys, command, *given, "--out", out, *plan)
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert message in error
    assert "Errno" not in error
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_sentence_transformers_directory_is_converted_whole(place, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    save_bert(model / place)
    modules = [{"path": place}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    kept = {"1_Pooling/config.json": "{}", "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights"}
    for name, text in kept.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    arguments = ["--calibration", str(tmp_path / "sentences.txt"), "--plan", "[0,0,2]"]
    status, _, error = mapreuse(monkeypatch, capsys, "convert", model, *arguments, "--out", model / "converted")
    assert status == 0, error
    assert {name: (model / "converted" / name).read_text() for name in kept} == kept
    assert mr.plan_of(mr.load(model / "converted")).reuses(1)
    assert not (model / "converted" / "converted.work").exists()

    out = ["--out", tmp_path / "maps"]
    status, _, error = mapreuse(monkeypatch, capsys, "analyze", model / "converted", *arguments[:2], *out)
    assert (status, error) == (0, "")


def test_a_sentence_transformer_runs_with_its_converted_transformer(tmp_path, monkeypatch, capsys):
    transformer = Transformer(str(save_bert(tmp_path / "transformer")))
    with torch.no_grad():
        for parameter in transformer.model.encoder.parameters():
            parameter.mul_(20 if parameter.dim() > 1 else 1)  # maps that are worth aligning
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling, Normalize()]).save(str(tmp_path / "model"))
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    options = ["--calibration", tmp_path / "sentences.txt", "--plan", "[0,0,2]", "--out", tmp_path / "out"]
    status, _, error = mapreuse(monkeypatch, capsys, "convert", tmp_path / "model", *options)
    assert status == 0, error
    encoder = SentenceTransformer(str(tmp_path / "model"))
    before = encoder.encode(SENTENCES, convert_to_tensor=True)
    encoder[0].model = mr.load(tmp_path / "out")
    after = encoder.encode(SENTENCES, convert_to_tensor=True)

    model, tokenizer = mr.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for sentence, found in zip(SENTENCES, after, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(sentence, truncation=True, return_tensors="pt")).last_hidden_state.mean(1)
        torch.testing.assert_close(found, torch.nn.functional.normalize(mean, dim=-1)[0])
    assert (before - after).abs().max() > 1e-3


def test_a_conversion_that_is_interrupted_while_it_is_written_leaves_no_directory(
    given, tmp_path, monkeypatch, capsys
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "converted"
    arguments = ["convert", *given, "--plan", "[0,0,2]"]
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["mapreuse.conversion"], "copy_companions", interrupted)
        status, _, error = mapreuse(monkeypatch, capsys, *arguments, "--out", str(out))
    assert (status, out.exists()) == (130, False)
    assert "interrupted; run the same command again to continue" in error
    assert mapreuse(monkeypatch, capsys, *arguments, "--out", str(out))[0] == 0
    assert mr.load(out)


def test_an_interrupt_says_what_is_kept_and_what_will_be_repeated(given, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    out = tmp_path / "converted"
    arguments = ["convert", *given, "--plan", "[0,0,0]", "--out", out]
    kept = f"mapreuse: interrupted; run the same command again to continue: {out}.work keeps all finished steps; "
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules[mr.convert.__module__].METRICS, "cosine", interrupted)
        note = "the step in progress is repeated"
        assert mapreuse(monkeypatch, capsys, *arguments) == (130, "", f"{kept}{note}\n")
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[mr.refit.__module__], "_refit_layer", interrupted)
        note = "0 refitted layers are kept, layer 1 is repeated"
        assert mapreuse(monkeypatch, capsys, *arguments) == (130, "", f"{kept}{note}\n")


def test_a_latency_budget_that_is_met_without_sharing_shares_no_map(given, tmp_path, monkeypatch, capsys):
    def times(models, batch, **options):
        return {name: 1.0 if mr.plan_of(model) is None else 0.5 for name, model in models.items()}

    monkeypatch.setattr(sys.modules[mr.search.__module__], "_times", times)
    options = ["--out", tmp_path / "out", "--budget", "latency<=5e-1"]
    status, printed, error = mapreuse(monkeypatch, capsys, "convert", *given, *options)
    assert status == 0, error
    assert "The plan shares no map" in printed
    assert "latency: 0.50 times the original's (0.50 without sharing)" in printed


def test_a_conversion_within_a_budget_of_error_keeps_to_it(tmp_path, monkeypatch, capsys, regular_times):
    directory = save_bert(tmp_path / "model")
    original = open_model(directory).model
    with torch.no_grad():  # peaked maps: of nearly uniform ones all plans are as good
        for name, weights in original.named_parameters():
            weights *= 15 if "attention" in name and weights.dim() == 2 else 1
    original.save_pretrained(directory)
    words, draw = sorted({word for sentence in SENTENCES for word in sentence.split()}), random.Random(0)
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(" ".join(draw.choices(words, k=7)) for _ in range(24)))
    tokens = AutoTokenizer.from_pretrained(directory)("maps are alike", return_tensors="pt")
    with torch.inference_mode():
        target = original.eval()(**tokens)[0]

    def convert(budget, out):
        arguments = ["--calibration", str(sentences), "--budget", f"error<={budget}", "--out", str(tmp_path / out)]
        status, printed, error = mapreuse(monkeypatch, capsys, "convert", str(directory), *arguments)
        assert status == 0, error
        with torch.inference_mode():
            difference = (mr.load(tmp_path / out)(**tokens)[0] - target).norm() / target.norm()
        return float(re.search(r"error, refitted: ([0-9.]+)", printed)[1]), difference

    (loose, far), (tight, near) = convert(1, "loose"), convert(0.05, "tight")
    assert tight <= 0.05 < loose
    assert near < far
    arguments = ["--calibration", str(sentences), "--budget", "error<=1", "--out", str(tmp_path / "loose")]
    status, _, error = mapreuse(monkeypatch, capsys, "convert", str(directory), *arguments)
    assert status == 2
    assert "exists already" in error


def test_a_language_model_is_searched_over_share_modes_on_windows_of_text(
    given, tmp_path, monkeypatch, capsys, regular_times
):
    arguments = ["convert", save_llama(tmp_path / "llama"), *given[1:], "--window", 6, "--metric", "perplexity"]

    def convert(name, *options):
        status, printed, error = mapreuse(monkeypatch, capsys, *arguments, "--out", tmp_path / name, *options)
        assert status == 0, error
        assert "error = perplexity divided by the original's, − 1, on held-out" in printed
        return mr.plan_of(mr.load(tmp_path / name)), printed

    searched, printed = convert("searched", "--budget", "cache_bytes<=0.9", "--share", "keys,map", "--keys", 2)
    assert "without sharing: -16.7%" in printed
    assert "map" in [searched.share_of(layer) for layer in range(3)]
    given, _ = convert("given", "--plan", "1x1,2x1", "--share", "keys", "--keys", 2, "--key-window", 3, "--block", 4)
    assert given == mr.ReusePlan.parse("1x1,2x1", share="keys", keys=2, window=3, block=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "[0,0,2]", "--share", "keys,map"], "--plan takes one share mode, got keys, map; a search, by"),
        (["--plan", "[0,0,2]", "--share", "values"], "share must be one of map, keys, corrected, got 'values'"),
        (
            ["--budget", "error<=1", "--share", "map,values"],
            "share must be one of map, keys, corrected, got 'values'",
        ),
        (["--budget", "error<=1", "--metric", "bleu"], "--metric must be one of cosine, perplexity, copying"),
        (["--budget", "cache_bytes<=0.9"], "BertForMaskedLM keeps no cache; give a budget of latency or error"),
    ],
)
def test_share_modes_metrics_and_budgets_that_do_not_fit_are_refused(
    options, message, given, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    arguments = ["convert", *given, "--out", tmp_path / "out", *options]
    assert_refused(mapreuse(monkeypatch, capsys, *arguments), "mapreuse", message)


@pytest.mark.parametrize(("options", "needed"), [([], 8), (["--distill-seconds", "1"], 11)])
def test_the_message_about_too_few_sentences_names_a_number_that_suffices(
    options, needed, given, tmp_path, monkeypatch, capsys
):
    arguments = ["convert", *given, "--out", tmp_path / "out", "--plan", "[0,0,2]", *options]
    lines = (SENTENCES * 2)[:needed]
    given[2].write_text("\n".join(lines[:-1]))
    expected = f"mapreuse: {given[2]}: found {needed - 1} sentences, but at least {needed} are needed\n"
    assert mapreuse(monkeypatch, capsys, *arguments) == (2, "", expected)
    given[2].write_text("\n".join(lines))
    status, _, error = mapreuse(monkeypatch, capsys, *arguments)
    assert status == 0, error


def test_the_installed_command_reports_bad_input_without_a_traceback():
    command = [sys.executable, "-c", "from mapreuse.cli import main; main()", "frobnicate"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
