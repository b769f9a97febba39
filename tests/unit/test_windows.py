"""The schedule of windows: laws over all small schedules, and schedules written out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossbit.errors import InputError
from crossbit.windows import Expand, Window, schedule, visits


@st.composite
def settings_of(draw: Any, *expands: Expand) -> tuple[int, int, int, Expand, int | None]:
    blocks = draw(st.integers(1, 14))
    size = draw(st.integers(1, blocks))
    overlap = draw(st.integers(0, size - 1))
    expand = draw(st.sampled_from(expands or ("none", "first", "last", "ends")))
    largest = None
    if expand != "none":
        largest = draw(st.none() | st.integers(size, blocks))
    return blocks, size, overlap, expand, largest


def make(setting: tuple[int, int, int, Expand, int | None]) -> list[Window]:
    blocks, size, overlap, expand, largest = setting
    return schedule(blocks, size, overlap, expand=expand, largest=largest)


def spans(windows: list[Window]) -> list[tuple[int, int]]:
    return [(w.start, w.stop) for w in windows]


@settings(max_examples=400, deadline=None)
@given(setting=settings_of())
def test_every_block_leaves_once_in_order_from_the_last_window_with_it(setting: Any) -> None:
    windows = make(setting)
    left = [(block, w.index) for w in windows for block in w.hardened]
    assert [block for block, _ in left] == list(range(setting[0]))
    for block, index in left:
        assert index == max(w.index for w in windows if block in w.blocks)


@settings(max_examples=400, deadline=None)
@given(setting=settings_of())
def test_windows_are_distinct_numbered_and_inside_the_model(setting: Any) -> None:
    windows, blocks = make(setting), setting[0]
    assert [w.index for w in windows] == list(range(len(windows)))
    assert len(set(spans(windows))) == len(windows)
    assert all(0 <= w.start < w.stop <= blocks and 0 <= w.leaving <= len(w.blocks) for w in windows)
    assert windows[0].start == 0
    assert windows[-1].stop == blocks
    assert windows[-1].leaving == len(windows[-1].blocks)
    assert min(visits(windows, blocks)) >= 1


@settings(max_examples=400, deadline=None)
@given(setting=settings_of())
def test_each_window_starts_where_hardened_blocks_end(setting: Any) -> None:
    hardened = 0
    for window in make(setting):
        assert window.start == hardened
        hardened += window.leaving


@settings(max_examples=300, deadline=None)
@given(setting=settings_of("none"))
def test_plain_windows_are_full_and_overlap_as_asked(setting: Any) -> None:
    blocks, size, overlap, _, _ = setting
    windows = make(setting)
    assert all(len(w.blocks) == size for w in windows)
    shared = [a.stop - b.start for a, b in pairwise(windows)]
    assert shared[:-1] == [overlap] * len(shared[:-1])
    assert all(overlap <= n < size for n in shared[-1:])
    # No window more than needed to get to the end.
    assert len(windows) == 1 + -(-(blocks - size) // (size - overlap))


@settings(max_examples=300, deadline=None)
@given(setting=settings_of("none"))
def test_each_block_is_trained_in_the_expected_number_of_windows(setting: Any) -> None:
    blocks, size, overlap, _, _ = setting
    stride = size - overlap
    starts = [*range(0, blocks - size, stride), blocks - size]
    expected = [sum(s <= b < s + size for s in starts) for b in range(blocks)]
    assert visits(make(setting), blocks) == expected


@given(blocks=st.integers(1, 40))
def test_windows_of_one_block_are_plain_block_reconstruction(blocks: int) -> None:
    assert schedule(blocks, 1) == [Window(b, b, b + 1, 1) for b in range(blocks)]


@given(size=st.integers(1, 8))
def test_a_window_of_the_whole_model_is_one_window(size: int) -> None:
    assert schedule(size, size, size - 1) == [Window(0, 0, size, size)]


@given(blocks=st.integers(3, 40))
def test_two_by_one_trains_inner_blocks_twice(blocks: int) -> None:
    windows = schedule(blocks, 2, 1)
    assert visits(windows, blocks) == [1, *[2] * (blocks - 2), 1]
    assert [w.leaving for w in windows] == [*[1] * (blocks - 2), 2]


@settings(max_examples=300, deadline=None)
@given(setting=settings_of("first", "ends"))
def test_windows_grow_a_block_at_a_time_and_nothing_leaves_meanwhile(setting: Any) -> None:
    blocks, size, overlap, expand, largest = setting
    windows = make(setting)
    largest = largest or min(size + 1, blocks)
    grown = windows[:largest]
    assert spans(grown) == [(0, stop) for stop in range(1, largest + 1)]
    assert all(w.leaving == 0 for w in grown[:-1])
    assert grown[-1].leaving > 0
    if expand == "first":
        assert all(len(w.blocks) == size for w in windows[largest:])
        if largest + size - overlap <= blocks:
            assert windows[largest].start == largest - overlap


@settings(max_examples=300, deadline=None)
@given(setting=settings_of("last", "ends"))
def test_windows_shrink_a_block_at_a_time_and_each_hardens_what_it_drops(setting: Any) -> None:
    blocks, size, _, _, largest = setting
    largest = largest or min(size + 1, blocks)
    tail = make(setting)[-largest:]
    assert spans(tail) == [(start, blocks) for start in range(blocks - largest, blocks)]
    assert all(w.leaving == 1 for w in tail)


@settings(max_examples=300, deadline=None)
@given(setting=settings_of("ends"))
def test_the_middle_of_expanding_ends_keeps_size_and_overlap(setting: Any) -> None:
    blocks, size, overlap, _, largest = setting
    windows = make(setting)
    largest = largest or min(size + 1, blocks)
    middle = windows[largest - 1 : len(windows) - largest + 1]  # with the largest on both sides
    assert all(len(w.blocks) == size for w in middle[1:-1])
    shared = [a.stop - b.start for a, b in pairwise(middle)]
    assert all(n >= overlap for n in shared)
    if len(middle) > 2:
        # Both joints are as asked; only the last sliding window may share more.
        assert [n for i, n in enumerate(shared) if i != len(shared) - 2] == [overlap] * (
            len(shared) - 1
        )


@given(blocks=st.integers(8, 40), largest=st.integers(2, 4))
def test_size_two_with_expanding_ends_is_slider_quants_schedule(blocks: int, largest: int) -> None:
    expected = [(0, stop) for stop in range(1, largest + 1)]
    expected += [(s, s + 2) for s in range(largest - 1, blocks - largest)]
    expected += [(start, blocks) for start in range(blocks - largest, blocks)]
    assert spans(schedule(blocks, 2, 1, expand="ends", largest=largest)) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ((5, 2, 0, "none", None), ["01/2", "23/1", "34/2"]),
        ((7, 3, 1, "none", None), ["012/2", "234/2", "456/3"]),
        ((8, 3, 1, "none", None), ["012/2", "234/2", "456/1", "567/3"]),
        ((6, 2, 1, "first", None), ["0/0", "01/0", "012/2", "23/1", "34/1", "45/2"]),
        ((6, 2, 1, "last", None), ["01/1", "12/1", "23/1", "345/1", "45/1", "5/1"]),
        ((6, 2, 1, "ends", 2), ["0/0", "01/1", "12/1", "23/1", "34/1", "45/1", "5/1"]),
        ((6, 2, 1, "ends", 3), ["0/0", "01/0", "012/2", "23/1", "345/1", "45/1", "5/1"]),
        # The whole model grows and shrinks through one window.
        ((3, 2, 1, "ends", 3), ["0/0", "01/0", "012/1", "12/1", "2/1"]),
        # Too few blocks before the tail for a full window: it reaches into the tail.
        ((5, 4, 1, "last", 4), ["0123/1", "1234/1", "234/1", "34/1", "4/1"]),
        ((1, 1, 0, "ends", None), ["0/1"]),
    ],
)
def test_schedules_written_out(setting: Any, expected: list[str]) -> None:
    found = [f"{''.join(map(str, w.blocks))}/{w.leaving}" for w in make(setting)]
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 0), {}, "size: 0 is not a positive"),
        ((4, 5), {}, "size: 5 is more than the model's 4 blocks"),
        ((4, 2, 2), {}, "overlap: 2 .* choose 0 to 1"),
        ((4, 2, -1), {}, "overlap: -1"),
        ((4, 2), {"expand": "both"}, "'both' is unknown; use none, first, last, ends"),
        ((4, 2), {"expand": "ends", "largest": 1}, r"largest: 1 is outside 2 .* to 4"),
        ((4, 2), {"expand": "first", "largest": 5}, r"largest: 5 is outside 2 .* to 4"),
        ((4, 2), {"largest": 3}, "largest: 3 needs windows that expand"),
    ],
)
def test_numbers_that_are_no_schedule(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        schedule(*arguments, **options)
    assert "\n" not in str(error.value)
