"""Terminal output: tables, progress bars, and the error handling of commands."""

import contextlib
import importlib.metadata
import json
import math
import operator
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import typer
from rich import table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

INTERRUPTED = 130
"""Exit status of an interrupted command."""

ProgressCallback: TypeAlias = Callable[[str, float, float], object]
"""`callback(description, completed, total)`: reports progress, in any unit."""

_Item = TypeVar("_Item")

console = Console()

_running: ContextVar[Progress | None] = ContextVar("running", default=None)


class Table(NamedTuple):
    """A table of text.

    Attributes:
        title: title above the table.
        header: column names.
        rows: cells, row by row.
        notes: lines printed below the table.
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
        shown = table.Table(title=Text(one.title), title_justify="left")
        for name in one.header:
            shown.add_column(Text(name))
        for row in one.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        for note in one.notes:
            console.print(note, markup=False, highlight=False)


@contextlib.contextmanager
def progress_bar(description: str = "", *, disable: bool = False) -> Iterator[ProgressCallback]:
    """Show a progress bar with the elapsed and the remaining time on standard error.

    The bar disappears at the end. A bar inside another one gets a line of its own below it. Nothing is shown if
    standard error is not a terminal.

    Args:
        description: text before the bar until the first update.
        disable: show nothing.

    Yields:
        The function that updates the bar.

    Examples:
        >>> with progress_bar("Timing") as progress:
        ...     for done in range(1, 4):
        ...         progress(f"Timing plan {done}", done, 3)
    """
    outer = _running.get()
    if outer is not None:
        task = outer.add_task(description, total=None, visible=not disable)
        yield lambda doing, done, total: outer.update(task, description=doing, completed=done, total=total)
        outer.remove_task(task)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=disable or not errors.is_terminal) as bar:
        before = _running.set(bar)
        task = bar.add_task(description, total=None)
        try:
            yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)
        finally:
            _running.reset(before)


def tracked(description: str, items: Iterable[_Item]) -> Iterator[_Item]:
    """The items one by one, with a progress bar."""
    total = operator.length_hint(items)
    with progress_bar(description) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            progress(description, number, max(number, total))


def command_app(name: str, description: str) -> typer.Typer:
    """A command-line program with the option `--version`, to which the caller adds commands.

    Args:
        name: name of the program and of its distribution.
        description: first paragraph of its help.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a warning for each image processor without torchvision
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # two lines on standard error for each pass that is profiled
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=description)

    def print_version(requested: bool) -> None:
        if requested:
            print(f"{name} {importlib.metadata.version(name)}")
            raise typer.Exit

    option = typer.Option("--version", callback=print_version, is_eager=True, help="print the version and exit")

    @app.callback()
    def root(version: Annotated[bool, option] = False) -> None:
        pass

    return app


def command_line(name: str) -> str:
    """The command of this process, as one would type it."""
    return shlex.join([name, *sys.argv[1:]])


def run_command(
    app: typer.Typer,
    name: str,
    *,
    resumable: Sequence[str] = (),
    extras: str = "pip install 'mapreuse[data,plots]'",
) -> None:
    """Run a command-line program and exit.

    Invalid input (`ValueError`, `OSError`), a missing optional dependency or a wrong option prints one line on
    standard error and exits with status 2. An interrupt exits with status 130. Other exceptions are bugs and keep
    their traceback.

    Args:
        app: the program.
        name: name of the program, for messages.
        resumable: commands that continue after an interrupt if they are run again.
        extras: the command that installs optional dependencies.
    """

    def fail(message: str, status: int = 2) -> None:
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(status)

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:  # typer returns this status without a message
            raise KeyboardInterrupt
        sys.exit(status)
    except (typer.Abort, KeyboardInterrupt) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second interrupt would print a traceback at the end
        continues = any(command in resumable for command in sys.argv[1:2])
        message = "interrupted; run the same command again to continue" if continues else "interrupted"
        fail(f"{message}: {stop}" if str(stop) else message, INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = f"{name} {context.info_name}" if context is not None and context.parent is not None else name
        fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except ModuleNotFoundError as error:
        fail(str(error) if "pip install" in str(error) else f"{error}; install the optional dependencies: {extras}")
    except (ValueError, OSError) as error:
        fail(str(error))


@contextlib.contextmanager
def continuing_from(place: str) -> Iterator[None]:
    """Let an interrupt of this block print what is kept in a place and what will be repeated: its notes."""
    try:
        yield
    except KeyboardInterrupt as stop:
        notes = getattr(stop, "__notes__", ["the step in progress is repeated"])
        raise typer.Abort(f"{place} keeps all finished steps; {'; '.join(notes)}") from None


def check_writable_file(file: Path | None) -> None:
    """Make the directory of an output file, if one is given.

    Raises:
        ValueError: if the file cannot be written.
    """
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: choose a file in a directory that you can write to")


def check_writable_directory(option: str, directory: Path) -> None:
    """Check that an output directory can be written or made, without making it.

    Raises:
        ValueError: if it cannot. The message names the option.
    """
    existing = next(one for one in (directory, *directory.absolute().parents) if one.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {directory} cannot be written: {existing} is not a writable directory")


def check_new_directory(out: Path) -> None:
    """Raise `ValueError` if `out` cannot become a new directory. An empty directory may be there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another directory or delete it")
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; choose a new directory in it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out} cannot be made: {above} is not a writable directory")


def write_json(file: Path | None, data: dict[str, Any]) -> None:
    """Write JSON to a file, if one is given."""
    if file is not None:
        file.write_text(json.dumps(data, indent=1) + "\n")


def check_device(device: str) -> None:
    """Raise `ValueError` unless the value of `--device` is cpu, or cuda on a machine with a GPU."""
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA GPU; leave the option out to run on the CPU")


def comma_separated(text: str | None) -> tuple[str, ...]:
    """Split the value of a comma-separated option."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def comma_separated_integers(option: str, text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of integers and drop duplicates.

    Raises:
        ValueError: if a part is not an integer. The message names the option.
    """
    try:
        return tuple(dict.fromkeys(int(word) for word in comma_separated(text)))
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, such as 1000,2000, got {text!r}") from None


def check_number(
    name: str,
    value: Any,
    minimum: float,
    maximum: float = math.inf,
    *,
    whole: bool = False,
    exclusive: bool = False,
) -> None:
    """Raise `ValueError` unless an argument is a finite number in a range.

    Args:
        name: of the argument, for the message.
        value: a truth value is not a number.
        minimum, maximum: the range.
        whole: require an integer.
        exclusive: exclude both ends of the range.
    """
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if (
        is_number
        and math.isfinite(value)
        and minimum <= value <= maximum
        and not (exclusive and value in (minimum, maximum))
    ):
        return
    above = f"greater than {minimum}" if exclusive else f"at least {minimum}"
    within = f"between {minimum} and {maximum}" if exclusive else f"from {minimum} to {maximum:,}"
    kind = "a whole number" if whole else "a finite number"
    raise ValueError(f"{name} must be {kind}, {above if maximum == math.inf else within}, got {value!r}")


def one_line(error: Exception) -> str:
    """The message of an exception on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def refused_in_one_line(message: str) -> Iterator[None]:
    """Turn what another library raises into a `ValueError` of one line that starts with `message`.

    Libraries raise exceptions of any class. What mapreuse itself raises in their calls passes unchanged.
    """
    try:
        yield
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        raiser = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
        if raiser.split(".")[0] == "mapreuse":
            raise
        raise ValueError(f"{message}{one_line(error)}") from None
