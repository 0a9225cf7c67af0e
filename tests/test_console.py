"""Tables, progress bars, and the error handling of commands."""

import doctest
import io
import re
import signal
import sys

import numpy as np
import pytest
import typer
from rich.console import Console

from mapreuse import console
from mapreuse.console import (
    Table,
    check_number,
    check_writable_directory,
    check_writable_file,
    progress_bar,
    show_tables,
    tracked,
)


def run(monkeypatch, capsys, action, *arguments):
    """Exit status and standard error of a program whose command `work` calls `action`."""
    app = typer.Typer()
    app.command("work")(action)
    app.command("rest")(lambda: None)
    monkeypatch.setattr(sys, "argv", ["program", "work", *arguments])
    with pytest.raises(SystemExit) as stopped:
        console.run_command(app, "program", resumable=("work",))
    return stopped.value.code, capsys.readouterr().err


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\nlines"), 2, "program: two lines\n"),
        (OSError("disk full"), 2, "program: disk full\n"),
        (ModuleNotFoundError("No module named 'plotly'"), 2, "pip install 'mapreuse[data,plots]'"),
        (KeyboardInterrupt(), 130, "run the same command again to continue"),
    ],
)
def test_an_expected_error_ends_in_one_line_and_a_status(monkeypatch, capsys, error, status, message):
    found, written = run(monkeypatch, capsys, raising(error))
    assert found == status
    assert message in written
    assert written.count("\n") == 1


def test_a_second_interrupt_does_not_disturb_the_first_ones_end(monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fail, at_the_end = console.sys.exit, []

    def end(status):
        at_the_end.append(signal.getsignal(signal.SIGINT))
        fail(status)

    monkeypatch.setattr(console.sys, "exit", end)
    status, written = run(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert at_the_end == [signal.SIG_IGN]
    assert (status, written) == (130, "program: interrupted; run the same command again to continue\n")


def test_a_wrong_option_names_the_help(monkeypatch, capsys):
    status, written = run(monkeypatch, capsys, lambda: None, "--colour")
    assert status == 2
    assert "--colour" in written
    assert written.endswith("see program work --help\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    app = typer.Typer()
    app.command()(raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        console.run_command(app, "program")


def test_a_table_prints_its_cells_as_they_are_and_its_notes(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, width=80))
    show_tables([Table("Latency", ("plan", "speed-up"), [("[bold]4x4", "1.35×")], ("One [thread].",))])
    for text in ("Latency", "[bold]4x4", "1.35×", "One [thread]."):
        assert text in written.getvalue()


def test_a_table_in_markdown_has_a_header_and_a_separator():
    table = Table("", ("plan", "×"), [("4x4", "1.35")])
    assert table.markdown().splitlines() == ["| plan | × |", "| --- | --- |", "| 4x4 | 1.35 |"]


def test_a_progress_bar_inside_another_is_shown_with_it(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda stderr: Console(file=written, force_terminal=True, width=80))
    with progress_bar("outer") as outer:
        outer("outer 1", 1, 2)
        for _ in tracked("inner", [1, 2]):
            console._running.get().refresh()
    assert "outer 1" in written.getvalue()
    assert "inner" in written.getvalue()
    assert console._running.get() is None


def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable_file(tmp_path / "new" / "results.json")
    check_writable_directory("--out", tmp_path / "new" / "results")
    assert not (tmp_path / "new" / "results").exists()
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable_file(tmp_path)
    with pytest.raises(ValueError, match=r"--out .*file is not a writable directory"):
        check_writable_directory("--out", tmp_path / "file" / "results")


def test_comma_separated_options_are_parsed():
    assert console.comma_separated(" a, b,,") == ("a", "b")
    assert console.comma_separated_integers("--lengths", "2,1,2") == (2, 1)
    with pytest.raises(ValueError, match="--lengths must be integers"):
        console.comma_separated_integers("--lengths", "2,x")


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(console).attempted


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, float("nan"), float("inf"), True, "3", None, [3], 11, 10**30])
def test_a_number_that_is_not_whole_or_not_in_its_range_is_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"size must be a whole number, from 1 to 10, got {value!r}")):
        check_number("size", value, 1, 10, whole=True)


@pytest.mark.parametrize("value", [0, 1, -0.5, float("nan"), float("inf"), np.float32("nan"), True, "0.5", None])
def test_a_number_that_is_not_finite_or_not_between_its_limits_is_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"share must be a finite number, between 0 and 1, got {value!r}")):
        check_number("share", value, 0, 1, exclusive=True)


def test_numbers_of_numpy_are_numbers():
    check_number("size", np.int64(1), 1, 10, whole=True)
    check_number("share", np.float32(0.5), 0, 1, exclusive=True)
    check_number("share", 0, 0)
