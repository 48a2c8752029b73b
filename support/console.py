"""What people see while long work runs: tables, and progress that is a bar on a terminal and plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
console = Console(soft_wrap=True)
_LINE_EVERY_S = 10.0


def say(message: str) -> None:
    """Print one line for the user (markup off: messages carry file names and brackets)."""
    console.print(printable(message), markup=False, highlight=False)


def printable(text: str) -> str:
    """Text that may be a stranger's, without what would steer the terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


class Meter:
    """One running progress display; `advance` it, with a short note on the present state."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._started, self._printed, self._first = time.monotonic(), time.monotonic(), done
        self._bar: Progress | None = None
        if console.is_terminal:
            columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._printed > _LINE_EVERY_S:
            self._printed = time.monotonic()
            say(f"{self.title} {self.done}/{self.total}, {self._time_left()} left  {note}".rstrip())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self) -> str:
        done = max(self.done - self._first, 1)
        seconds = (time.monotonic() - self._started) / done * (self.total - self.done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


@contextmanager
def meter(title: str, total: int, done: int = 0) -> Iterator[Meter]:
    running = Meter(title, total, done)
    try:
        yield running
    finally:
        running.close()


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress display."""
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with meter(title, count) as running:
        for item in items:
            yield item
            running.advance()


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is left, the others right aligned."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(file=sys.stdout, width=None if console.is_terminal else 160).print(table)
