"""The terminal: one progress bar, one table, one way for commands to end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import typer
from rich import table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERRUPTED = 130
"""Exit status of a command that was interrupted."""

ProgressCallback: TypeAlias = Callable[[str, float, float], object]
"""Called with a description, the work done so far, and all of it, in any one unit."""

console = Console()


class Table(NamedTuple):
    """A table of text.

    Attributes:
        title: its headline.
        header: names of the columns.
        rows: the cells, row by row.
        notes: lines below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown, without title and notes."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables on standard output."""
    for one in tables:
        shown = table.Table(*one.header, title=one.title, title_justify="left")
        for row in one.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in one.notes:
            console.print(note, markup=False, highlight=False)


@contextlib.contextmanager
def progress_bar(description: str = "", *, disable: bool = False) -> Iterator[ProgressCallback]:
    """A progress bar with the remaining time on standard error; yields the function that updates it.

    Nothing is shown where standard error is not a terminal, or with `disable`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=disable or not errors.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


def run_command(app: typer.Typer, name: str, *, resumable: Sequence[str] = ()) -> None:
    """Run a command line: bad input ends in one line on standard error and exit status 2, never in a traceback.

    Args:
        app: the commands.
        name: of the program, for messages.
        resumable: commands that continue where they were interrupted.
    """

    def fail(message: str, status: int = 2) -> None:
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(status)

    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:  # typer returns this status without a message
            raise KeyboardInterrupt
        sys.exit(status)
    except (typer.Abort, KeyboardInterrupt):
        continues = any(command in resumable for command in sys.argv[1:2])
        fail("interrupted; run the same command again to continue" if continues else "interrupted", INTERRUPTED)
    except typer.TyperException as error:
        fail(f"{error.format_message().rstrip('.')}; see {name} --help")
    except ModuleNotFoundError as error:
        fail(f"{error}; the docs' installation page lists the extras, such as pip install 'mapreuse[data,plots]'")
    except (ValueError, OSError) as error:
        fail(str(error))


def check_writable_file(file: Path | None) -> None:
    """Make the directory of an output file. Raises `ValueError` where the file cannot be written."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: give a file in a directory that you can write to")


def check_writable_directory(option: str, directory: Path) -> None:
    """Raises `ValueError` where an output directory cannot be written or made; makes nothing yet."""
    existing = next(one for one in (directory, *directory.absolute().parents) if one.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {directory} cannot be written: {existing} is not a writable directory")


def comma_separated(text: str | None) -> tuple[str, ...]:
    """The words of a comma-separated option."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def comma_separated_integers(option: str, text: str) -> tuple[int, ...]:
    """The integers of a comma-separated option, each once. Raises `ValueError`, naming the option."""
    try:
        return tuple(dict.fromkeys(int(word) for word in comma_separated(text)))
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, such as 1000,2000; got {text!r}") from None
