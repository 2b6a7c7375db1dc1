"""Consoles and progress bars that every command shares."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

output = Console()
errors = Console(stderr=True)


def print_error(message: str, *, label: str = "error:") -> None:
    """Prints one line on the error stream; nothing in ``message`` is taken as markup."""
    errors.print(f"[red]{label}[/red] {escape(message)}".rstrip(), soft_wrap=True, highlight=False)


def print_table(table: Table) -> None:
    """Prints a table as wide as it is where no terminal limits it, so that no number is cut."""
    (output if output.is_terminal else Console(file=output.file, width=240)).print(table)


def progress_bar() -> Progress:
    """A bar with counts and times on the error stream, so that results can be piped; none without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


class StageProgress:
    """One bar for each stage that reports ``(stage, done, total)``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, object] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)  # type: ignore[arg-type]


def percent(value: float | None) -> str:
    """A fraction as a percentage with two digits, or a dash."""
    return "-" if value is None else f"{100 * value:.2f} %"


def size(count: int) -> str:
    """A number of bytes in a unit that reads well."""
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
