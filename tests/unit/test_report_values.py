"""Numbers as the report's pages show them to people."""

from __future__ import annotations

import math

import pytest

from crossbit.report import values


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (values.show(20.97412, 5), "20.974"),
        (values.show(6533.2), "6,533"),
        (values.show(0.00012, 2), "1.2e-04"),
        (values.show(0), "0"),
        (values.show(math.nan), "not finite"),
        (values.percent(0.0052), "0.52 %"),
        (values.percent(0.000004), "4.0e-04 %"),
        (values.percent(310.5), "31,050 %"),
        (values.size(269_060_552), "269.1 MB"),
        (values.size(999), "999 bytes"),
        (values.duration(59.94), "59.9 s"),
        (values.duration(432), "7 min 12 s"),
        (values.duration(7260), "2 h 1 min"),
        (values.count(134515008), "134,515,008"),
        (values.scheme({"weights": {"bits": 4}}), "W4A16"),
        (values.scheme({}), None),
    ],
)
def test_numbers(shown: str | None, expected: str | None) -> None:
    assert shown == expected
