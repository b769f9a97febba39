"""Progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

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


class Stage:
    """How far a stage of some items is, and how long the rest of it will take.

    Args:
        title: of the stage.
        weights: of its items in order, their work relative to each other.
    """

    def __init__(self, title: str, weights: Sequence[float]) -> None:
        self._title, self._weights = title, weights
        self._done, self._share, self._before = 0, 0.0, 0.0
        self._began = time.monotonic()

    def at(self, share: float, *, before: bool = False) -> None:
        """``share`` of the item in work is done; with ``before``, by an earlier run."""
        self._share = share
        if before:
            self._before = self.reached

    def finish(self) -> None:
        """The item in work is done."""
        self._done, self._share = self._done + 1, 0.0

    @property
    def reached(self) -> float:
        """Weight of all that is done."""
        part = self._share * self._weights[self._done] if self._share else 0.0
        return sum(self._weights[: self._done]) + part

    @property
    def total(self) -> float:
        """Weight of all items."""
        return sum(self._weights)

    @property
    def finished(self) -> bool:
        """True if no item is left."""
        return self._done == len(self._weights)

    @property
    def count(self) -> str:
        """How many items are done, and of how many."""
        return f"{self._done}/{len(self._weights)}"

    @property
    def left(self) -> str:
        """The time left at the pace of this run, as h:mm:ss; "?" while none is known.

        None is while less than a hundredth of an item is done: what comes once, before all steps,
        would be taken for the pace of the first.
        """
        own = self.reached - self._before
        if own <= 0 or own < 0.01 * self.total / len(self._weights):
            return "?"
        elapsed = time.monotonic() - self._began
        return _clock(elapsed / own * (self.total - self.reached))

    def line(self, text: str = "") -> str:
        """All of it in a line, with what ``text`` says of the item in work."""
        elapsed = _clock(time.monotonic() - self._began)
        line = f"{self._title}: {self.count}, {elapsed}, {self.left} left, {_memory()}"
        return f"{line}; {text}" if text else line


class Reporter:
    """Prints stages and progress; ``quiet`` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._stage: Stage | None = None
        self._display: _Display | None = None
        self._said = -math.inf
        self._outcome = ""

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def status(self, text: str, share: float | None = None) -> None:
        """What the item in work is doing: below the live line, else a line now and then.

        Args:
            text: that.
            share: of the item, how much is done, None if that is not known.
        """
        if self._stage is not None and share is not None:
            self._stage.at(share)
        if self._display is not None:
            self._display.show(text)
        elif not self.quiet and time.monotonic() - self._said >= _STATUS_SECONDS:
            self._said = time.monotonic()
            self.say(text if self._stage is None else self._stage.line(text))

    def resumed(self, share: float) -> None:
        """So much of the item in work was done by an earlier run."""
        if self._stage is not None:
            self._stage.at(share, before=True)

    def outcome(self, text: str) -> None:
        """What came of the item in work: a line of its own, or a part of the item's."""
        if self._stage is None or self._display is not None:
            self.say(text)
        else:
            self._outcome = text

    def track(
        self, items: Iterable[T], title: str, total: int, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yield the items while showing how many are done, the time left and the memory in use.

        Args:
            items: in order; no other stage is tracked meanwhile.
            title: of what is done with them.
            total: how many they are.
            weights: of each, its work relative to the others', None if they are alike.
        """
        if self.quiet:
            yield from items
            return
        self._stage = stage = Stage(title, [1.0] * total if weights is None else weights)
        try:
            # Colours may be forced upon a pipe, where a live line would be a line every moment.
            if self.console.is_interactive and self.console.file.isatty():
                with _Display(self.console, stage, title) as self._display:
                    for item in items:
                        yield item
                        stage.finish()
                        self._display.show()
            else:
                yield from self._in_lines(items, stage)
        finally:
            self._stage = self._display = None

    def _in_lines(self, items: Iterable[T], stage: Stage) -> Iterator[T]:
        last = time.monotonic()
        for item in items:
            yield item
            stage.finish()
            now = time.monotonic()
            if self._outcome or stage.finished or now - last >= _PLAIN_SECONDS:
                self.say(stage.line(self._outcome))
                self._outcome, last = "", now


class _Display(Progress):
    """A live line, and below it what the item in work is doing."""

    def __init__(self, console: Console, stage: Stage, title: str) -> None:
        self._stage, self._doing = stage, ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("{task.fields[memory]}"),
            console=console,
        )
        self._task = self.add_task(title, total=stage.total, **self._fields())

    def get_renderables(self) -> Iterable[RenderableType]:
        """The line, and what is below it."""
        yield from super().get_renderables()
        if self._doing:
            yield Text(self._doing)

    def show(self, doing: str = "") -> None:
        """Show how far the stage is, and what the item in work is doing."""
        self._doing = doing
        self.update(self._task, completed=self._stage.reached, **self._fields())

    def _fields(self) -> dict[str, Any]:
        return {"count": self._stage.count, "left": self._stage.left, "memory": _memory()}


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _memory() -> str:
    return f"{memory_gib():.2f} GiB"
