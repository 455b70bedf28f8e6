"""Progress bars for work that takes more than a moment: on stderr, never on stdout, silent unless asked for.

    with shown():                                # the command line does this; a library call stays silent
        for layer in steps(layers, "rounding"):
            ...

A bar appears once its work has taken `PATIENCE` seconds. On a terminal it moves; elsewhere (a log file) a
line is written every `LOG_EVERY` seconds. Drawing happens inside the steps themselves: no thread is started.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
PATIENCE = 2.0  # seconds before a bar is drawn
LOG_EVERY = 10.0  # seconds between the lines of a log


@dataclass
class Screen:
    """Where bars are drawn, and what is drawn there now."""

    stream: TextIO
    patience: float = PATIENCE
    bars: Progress | None = None
    active: int = 0


@dataclass
class Work:
    """One loop: its title, how many steps it has (None: nobody knows) and how many are done."""

    title: str
    total: int | None
    screen: Screen
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    logged: float | None = None
    task: int | None = None

    def advance(self, count: int = 1) -> None:
        """`count` more steps are done."""
        self.done += count
        if time.monotonic() - self.started >= self.screen.patience:
            _draw(self)


_SCREEN: ContextVar[Screen | None] = ContextVar("netweight_progress", default=None)


@contextlib.contextmanager
def shown(stream: TextIO | None = None, *, patience: float = PATIENCE) -> Iterator[None]:
    """Inside this block, work that takes over `patience` seconds shows its progress on `stream` (stderr)."""
    screen = Screen(stream or sys.stderr, patience)
    token = _SCREEN.set(screen)
    try:
        yield
    finally:
        _SCREEN.reset(token)
        if screen.bars is not None:
            screen.bars.stop()


def steps(iterable: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, one step each; the number of steps is its length, or `total`, or unknown."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with doing(title, total) as advance:
        for item in iterable:
            yield item
            advance()


@contextlib.contextmanager
def doing(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Work that is not one loop: gives a function to call as `advance(count=1)` when steps are done."""
    screen = _SCREEN.get()
    if screen is None:
        yield _silent
        return
    work = Work(title, total, screen)
    screen.active += 1
    try:
        yield work.advance
    finally:
        screen.active -= 1
        _end(work)


def _silent(count: int = 1) -> None:
    """What `doing` gives where nothing is shown."""


def _draw(work: Work) -> None:
    """Show the work as it stands: a bar on a terminal, now and then a line elsewhere."""
    screen, now = work.screen, time.monotonic()
    if not screen.stream.isatty():
        if work.logged is None or now - work.logged >= LOG_EVERY:
            work.logged = now
            _log(work)
        return
    if screen.bars is None:
        screen.bars = _bars(screen.stream)
        screen.bars.start()
    if work.task is None:
        work.task = screen.bars.add_task(work.title, total=work.total)
    screen.bars.update(work.task, completed=work.done)  # type: ignore[arg-type]
    if work.logged is None or now - work.logged >= 0.1:
        work.logged = now
        screen.bars.refresh()


def _end(work: Work) -> None:
    """Take the bar away, or write the last line of a log."""
    screen = work.screen
    if work.task is not None and screen.bars is not None:
        screen.bars.remove_task(work.task)  # type: ignore[arg-type]
        if not screen.active:
            screen.bars.stop()
            screen.bars = None
    elif work.logged is not None:
        _log(work)


def _log(work: Work) -> None:
    seconds = time.monotonic() - work.started
    of = "" if work.total is None else f"/{work.total}"
    work.screen.stream.write(f"{work.title}: {work.done}{of} in {seconds:.0f} s\n")
    work.screen.stream.flush()


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream, force_terminal=True),
        auto_refresh=False,
        transient=True,
    )
