"""Command lines that a test runs in its own process."""

import sys
from pathlib import Path

import pytest


def run_command(main, command, monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of `main` called as `command` with these arguments."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    capsys.readouterr()  # what the test wrote before
    with pytest.raises(SystemExit) as stopped:
        main()
    written = capsys.readouterr()
    return stopped.value.code, written.out, written.err


def assert_refused(result, command, message):
    """The command ended with one line of error, wrote nothing, and left the working directory empty."""
    status, out, error = result
    assert status == 2
    assert out == ""
    assert error.startswith(f"{command}: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(Path().iterdir()) == []
