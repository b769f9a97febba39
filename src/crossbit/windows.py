"""Which blocks are reconstructed together: the schedule of sliding windows.

Windows of ``size`` blocks that share ``overlap`` blocks are the cross-block dependency of CBQ
(arXiv 2312.07950); windows that grow at the first blocks and shrink at the last ones are those of
SliderQuant (arXiv 2603.25284). For 6 blocks, size 2, overlap 1, largest 3, a window a line:

    none     first    last     ends
    01....   0.....   01....   0.....
    .12...   01....   .12...   01....
    ..23..   012...   ..23..   012...
    ...34.   ..23..   ...345   ..23..
    ....45   ...34.   ....45   ...345
             ....45   .....5   ....45
                               .....5

A block is trained in every window that holds it and hardened ("leaves") when the last of them is
done. Starts never decrease, so blocks leave in order, and each window is entered with what the
hardened blocks before it produce. Numbers alone: no model, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from crossbit.errors import InputError

Expand = Literal["none", "first", "last", "ends"]


@dataclass(frozen=True)
class Window:
    """Blocks that are trained together.

    Args:
        index: position in the schedule.
        start: the first block.
        stop: one past the last block.
        leaving: how many blocks, counted from ``start``, are hardened when the window is done; 0
            while windows grow.
    """

    index: int
    start: int
    stop: int
    leaving: int

    @property
    def blocks(self) -> range:
        """The blocks that are trained."""
        return range(self.start, self.stop)

    @property
    def hardened(self) -> range:
        """The blocks that leave when the window is done; the next window starts after them."""
        return range(self.start, self.start + self.leaving)


def schedule(
    blocks: int,
    size: int,
    overlap: int = 0,
    *,
    expand: Expand = "none",
    largest: int | None = None,
) -> list[Window]:
    """The windows over a model's blocks, in the order in which they are trained.

    Consecutive windows share ``overlap`` blocks. Where the stride does not lead to the end, the
    last sliding window is moved back and shares more: it is never shorter than the others, and no
    block is skipped. Every block leaves once, in order, from the last window that contains it.

    Args:
        blocks: blocks of the model.
        size: blocks of a window, 1 to ``blocks``; 1 is plain block-wise reconstruction.
        overlap: blocks shared by consecutive windows, 0 to ``size - 1``.
        expand: "first": windows [0, 1), [0, 2) ... [0, largest) come first, from the last of
            which the slide goes on. "last": the slide ends with [n - largest, n),
            [n - largest + 1, n) ... [n - 1, n). "ends": both.
        largest: blocks of the largest window at such an end, ``size`` to ``blocks``. None means
            ``size + 1``, or ``blocks`` where the model has no more.

    Raises:
        InputError: a number out of its range, an unknown ``expand``, ``largest`` without it.
    """
    largest = _checked(blocks, size, overlap, expand, largest)
    grow, shrink = expand in ("first", "ends"), expand in ("last", "ends")
    # What comes before the shrinking windows shares the overlap with the first of them, too.
    tail = blocks - largest if shrink else blocks
    end = max(tail + overlap, size) if shrink else blocks

    spans = [(0, stop) for stop in range(1, largest + 1)] if grow else []
    if not grow and tail > 0:
        spans = [(0, size)]
    if tail > 0:
        while spans[-1][1] < end:
            stop = min(spans[-1][1] + size - overlap, end)
            spans.append((stop - size, stop))
    if shrink:
        # Where one window is the whole model, it both grew to it and shrinks from it.
        spans += [(start, blocks) for start in range(tail, blocks) if (start, blocks) not in spans]

    starts = [start for start, _ in spans[1:]] + [blocks]
    return [
        Window(index, start, stop, after - start)
        for index, ((start, stop), after) in enumerate(zip(spans, starts, strict=True))
    ]


def visits(windows: Iterable[Window], blocks: int) -> list[int]:
    """In how many of ``windows`` each of the model's ``blocks`` is trained."""
    counts = [0] * blocks
    for window in windows:
        for block in window.blocks:
            counts[block] += 1
    return counts


def _checked(blocks: int, size: int, overlap: int, expand: str, largest: int | None) -> int:
    """``largest``, filled in; InputError for numbers that are no schedule."""
    if size < 1:
        raise InputError(f"window size: {size} is not a positive number; 1 is one block at a time")
    if size > blocks:
        raise InputError(
            f"window size: {size} is more than the model's {blocks} blocks; "
            f"choose a size of at most {blocks}"
        )
    if not 0 <= overlap < size:
        raise InputError(
            f"window overlap: {overlap} does not go with windows of {size} blocks; "
            f"choose 0 to {size - 1}"
        )
    if expand not in get_args(Expand):
        raise InputError(f"window expand: {expand!r} is unknown; use {', '.join(get_args(Expand))}")
    if largest is None:
        return min(size + 1, blocks)
    if expand == "none":
        raise InputError(
            f"window largest: {largest} needs windows that expand; "
            "leave it out, or set expand to first, last or ends"
        )
    if not size <= largest <= blocks:
        raise InputError(
            f"window largest: {largest} is outside {size} (the window size) to {blocks} "
            "(the model's blocks); choose a number between them"
        )
    return largest
