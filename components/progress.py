"""Progress of long work on stderr: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 5.0
Advance = Callable[[int, int, str], None]
"""advance(done, total, note): so far `done` of `total`; `note` is shown beside it."""


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Show how far the work in this block has come."""
    if sys.stderr.isatty():
        with _bar(title) as advance:
            yield advance
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def _lines(title: str) -> Advance:
    started = shown = time.monotonic()

    def advance(done: int, total: int, note: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= LINE_EVERY_S or done == total:
            shown = now
            print(f"{title}: {done}/{total} after {now - started:.0f} s {note}", file=sys.stderr, flush=True)

    return advance
