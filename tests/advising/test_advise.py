"""Advice: which options are measured, what their error is, which one is recommended; times are made up."""

import dataclasses
import functools
import itertools
import json
import shlex

import pytest
import torch
from commands import assert_refused, run_command
from families import build
from rich.console import Console
from tiny_models import SENTENCES, save_bert
from torch.nn import functional

import mapreuse as mr
from mapreuse import cli
from mapreuse.advising import Advice, MeasuredOption, Option
from mapreuse.advising import _advise as internals
from mapreuse.data import open_model
from mapreuse.measure import Latency


def seconds(option):
    """Made-up latency of an option."""
    factor = {"": 1.0, "openvino": 0.5, "onnx": 0.6}[option.runtime] * (0.7 if option.int8 else 1.0)
    factor *= (0.9 if option.optimized else 1.0) * (1 - 0.2 * len(option.dropped))
    return factor * (0.8 if option.shares else 1.0)


@pytest.fixture
def faked(monkeypatch, regular_times):
    """Runtimes run in PyTorch, int8 adds noise, and times are made up."""
    made = {}

    def call(self, model, option):
        run = internals._in_pytorch(model)
        if option.int8:
            exact = run
            run = lambda batch: exact(batch) + 0.1 * torch.randn_like(exact(batch))  # noqa: E731
        own = functools.wraps(run)(lambda batch: run(batch))
        made[own] = option
        return own

    def times(calls, **settings):
        return {name: Latency((seconds(made[one.func]),)) for name, one in calls.items()}

    monkeypatch.setattr(internals._Advisor, "_call", call)
    monkeypatch.setattr(internals, "time_interleaved", times)


@functools.cache
def given():
    model, _ = build("bert")
    torch.manual_seed(1)
    lengths = itertools.islice(itertools.cycle((4, 6, 8)), 12)
    return model, [{"input_ids": torch.randint(3, 50, (2, length))} for length in lengths]


def test_every_option_is_measured_on_held_out_batches(faked):
    model, batches = given()
    advice = mr.advise(model, batches, max_error=0.9, threads=1)
    options = [one.option for one in advice.options]

    assert options[0] == Option()
    for needed in (
        Option(optimized=True),
        Option(runtime="openvino"),
        Option(runtime="openvino", int8=True),
        Option(runtime="onnx"),
        Option(runtime="onnx", int8=True),
        Option(plan=mr.ReusePlan.full(4), optimized=True),
    ):
        assert needed in options
    assert {(len(one.dropped), one.runtime, one.int8) for one in options if one.dropped} >= {
        (1, "openvino", False), (1, "openvino", True), (2, "openvino", True)
    }  # fmt: skip
    assert any(one.shares and one.int8 for one in options)
    for one in advice.options:
        assert one.latency == pytest.approx(seconds(one.option))

    dropped = next(one for one in advice.options if len(one.option.dropped) == 1 and not one.option.int8)
    smaller = mr.drop_layers(build("bert")[0], dropped.option.dropped)
    with torch.no_grad():
        cosines = torch.cat([
            functional.cosine_similarity(smaller(**batch)[0], model(**batch)[0], dim=-1).flatten()
            for batch in batches[1::4]
        ])  # fmt: skip
    assert dropped.error == pytest.approx(1 - cosines.mean().item(), abs=1e-6)
    assert mr.plan_of(model) is None
    assert model.config.num_hidden_layers == 4


def test_the_recommended_option_is_the_fastest_within_the_limit(faked):
    model, batches = given()
    for limit in (0.9, 1e-4):
        advice = mr.advise(model, batches, max_error=limit, threads=1)
        within = [one for one in advice.options if one.error <= limit]
        assert advice.recommended.latency == min(one.latency for one in within)
        assert advice.recommended in advice.pareto
    assert advice.recommended.option == Option(runtime="openvino")  # int8 has too large an error here
    assert "No plan with shared maps is within the limit." in advice.lines()
    assert not any(one.option.int8 and (one.option.dropped or one.option.plan) for one in advice.options)


def test_the_relative_metric_is_the_norm_of_the_difference(faked):
    model, batches = given()
    advice = mr.advise(model, batches, metric="relative", max_error=1e-3, threads=1)
    error = next(one.error for one in advice.options if one.option == Option(runtime="openvino", int8=True))
    with torch.no_grad():
        outputs = torch.cat([model(**batch)[0].flatten() for batch in batches[1::4]])
    assert error == pytest.approx(0.1 / outputs.square().mean().sqrt().item(), rel=0.1)


def made_up(*rows):
    model = torch.nn.Identity()
    options = [MeasuredOption(option, error, latency, latency, model) for option, error, latency in rows]
    return Advice(tuple(options), "cosine", 0.03, 1)


def test_of_equally_fast_options_the_simplest_is_recommended():
    simple, complex_ = Option(optimized=True), Option(runtime="onnx", int8=True)
    original = (Option(), 0.0, 1.0)
    assert made_up(original, (simple, 0.0, 0.51), (complex_, 0.02, 0.5)).recommended.option == simple
    assert made_up(original, (simple, 0.0, 0.55), (complex_, 0.02, 0.5)).recommended.option == complex_
    assert made_up(original, (simple, 0.0, 0.55), (complex_, 0.04, 0.5)).recommended.option == simple
    assert made_up((Option(), 1e-9, 1.0), (simple, 0.0, 1.5)).recommended.option == Option()
    worse = made_up(original, (simple, 0.01, 0.5), (complex_, 0.02, 0.6))
    assert [one.option for one in worse.pareto] == [Option(), simple]


def test_commands_make_the_option_step_by_step():
    shared = mr.ReusePlan.parse("2x2")
    option = Option(plan=shared, runtime="onnx", int8=True)
    convert, export = map(shlex.split, option.commands("a model", "data.txt", "out"))
    assert convert[:7] == ["mapreuse", "convert", "a model", "--calibration", "data.txt", "--out", "out-pytorch"]
    assert mr.ReusePlan.parse(convert[-1]) == shared
    assert export[:3] == ["mapreuse", "export", "out-pytorch"]
    assert export[-3:] == ["--runtime", "onnx", "--int8"]
    (drop, opened) = Option(dropped=(1, 2), optimized=True).commands("m")
    assert drop == "mapreuse drop m --layers 1,2 --out OUT"
    assert opened == "in Python: model = mapreuse.optimize(AutoModel.from_pretrained('OUT'))"
    (line,) = Option(plan=mr.ReusePlan.full(2), optimized=True).commands("m")
    assert "mapreuse.apply(AutoModel.from_pretrained('m'), mapreuse.ReusePlan.full(2))" in line
    assert made_up((Option(), 0.0, 1.0), (dataclasses.replace(option), 0.0, 0.5)).lines()[1].startswith("  mapreuse")


def test_an_interrupt_keeps_what_was_measured(faked, monkeypatch):
    call, (model, batches) = internals._Advisor._call, given()

    def interrupting(self, part, option):
        if option.runtime == "onnx":
            raise KeyboardInterrupt
        return call(self, part, option)

    monkeypatch.setattr(internals._Advisor, "_call", interrupting)
    advice = mr.advise(model, batches, threads=1)
    assert advice.interrupted
    assert {one.option.runtime for one in advice.options} == {"", "openvino"}
    assert "Interrupted: some options are missing." in advice.table().notes
    assert not any("shared maps" in line for line in advice.lines()), "no plan was tried"


def test_options_that_cannot_run_are_named_with_the_reason(faked, monkeypatch):
    call, (model, batches) = internals._Advisor._call, given()

    def refusing(self, part, option):
        if option.runtime == "openvino":
            raise ModuleNotFoundError("exporting needs the package openvino: pip install 'mapreuse[export]'")
        if option.runtime == "onnx" and option.int8:
            raise ValueError("an operator\nis missing")
        return call(self, part, option)

    monkeypatch.setattr(internals._Advisor, "_call", refusing)
    advice = mr.advise(model, batches, threads=1)
    assert advice.notes[:2] == (
        "exporting needs the package openvino: pip install 'mapreuse[export]'",
        "ONNX Runtime int8: an operator is missing",
    )
    assert advice.recommended.option.runtime == "onnx"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "speed"}, "metric must be one of cosine, relative, got 'speed'"),
        ({"max_error": 0}, "max_error must be a finite number, greater than 0"),
        ({"repeats": 0}, "repeats must be"),
        ({"batches": given()[1][:7]}, "advise needs at least 8 calibration batches, got 7"),
        ({"model": mr.apply(build("bert")[0], mr.ReusePlan.parse("2x2"))}, "already"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    model, batches = given()
    with pytest.raises(ValueError, match=message):
        mr.advise(**{"model": model, "batches": batches} | change)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `mapreuse` on a saved model; returns the status and what was printed."""
    save_bert(tmp_path / "model")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 6))
    monkeypatch.setattr(cli, "console", Console(width=1000))
    return lambda *words: run_command(cli.main, "mapreuse", monkeypatch, capsys, *words)


def test_the_command_prints_a_table_and_writes_the_recommended_model(faked, command, tmp_path, monkeypatch):
    words = ["advise", tmp_path / "model", "--calibration", tmp_path / "sentences.txt", "--threads", "1"]
    monkeypatch.setattr(internals, "RUNTIMES", {})
    options = ["--max-error", "0.9", "--out", tmp_path / "out", "--json", tmp_path / "advice.json"]
    status, out, error = command(*words, *options)
    assert status == 0, error
    described = json.loads((tmp_path / "advice.json").read_text())["options"]
    (chosen,) = (one for one in described if one["recommended"])
    assert f"Recommended at an error of at most 0.9: {chosen['name']}" in out
    opened = open_model(tmp_path / "out").model
    assert opened.config.num_hidden_layers == 3 - len(chosen["dropped"])
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_interrupted_command_prints_the_table_and_status_130(faked, command, tmp_path, monkeypatch):
    monkeypatch.setattr(internals._Advisor, "_drop", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    status, out, error = command(
        "advise", tmp_path / "model", "--calibration", tmp_path / "sentences.txt", "--threads", "1"
    )
    assert status == 130
    assert "Interrupted: some options are missing." in out
    assert "interrupted" in error


def test_layers_are_dropped_on_the_command_line(command, tmp_path, monkeypatch):
    status, _, error = command("drop", tmp_path / "model", "--layers", "1", "--out", tmp_path / "smaller")
    assert status == 0, error
    expected = mr.drop_layers(open_model(tmp_path / "model").model, [1])
    found = open_model(tmp_path / "smaller").model
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids)[0], expected(ids)[0])
    assert (tmp_path / "smaller" / "tokenizer.json").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_refused(
        command("drop", tmp_path / "model", "--layers", "7", "--out", "x"), "mapreuse", "layers must be indices"
    )
