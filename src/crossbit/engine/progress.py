"""Progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_PLAIN_SECONDS = 10.0
_STATUS_SECONDS = 30.0


def memory_gib() -> float:
    """Resident memory of this process in GiB."""
    return float(psutil.Process().memory_info().rss) / 2**30


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps freed blocks of up to 32 MB for itself, and a loop of large temporaries of many
    sizes fragments them; elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Reporter:
    """Prints stages and progress; ``quiet`` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._update: Callable[[str], None] | None = None
        self._said = -math.inf

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def status(self, text: str) -> None:
        """What the item in work is doing: beside the live line, else a line now and then."""
        if self._update is not None:
            self._update(text)
        elif not self.quiet and time.monotonic() - self._said >= _STATUS_SECONDS:
            self._said = time.monotonic()
            self.say(text)

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        """Yield the items while showing how many are done, the time left and the memory in use."""
        if self.quiet:
            yield from items
            return
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
                TextColumn("{task.fields[status]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(title, total=total, memory="", status="")

                def update(text: str) -> None:
                    progress.update(task, status=text, memory=f"{memory_gib():.2f} GiB")

                self._update = update
                try:
                    for item in items:
                        yield item
                        progress.update(task, advance=1, memory=f"{memory_gib():.2f} GiB")
                finally:
                    self._update = None
            return
        started = last = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - last >= _PLAIN_SECONDS or done == total:
                left = (now - started) / done * (total - done)
                self.say(
                    f"{title}: {done}/{total}, {now - started:.0f} s, {left:.0f} s left, "
                    f"{memory_gib():.2f} GiB"
                )
                last = now
