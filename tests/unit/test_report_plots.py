"""Plots of the report: whole SVG, the same each time, with labels, and true to the data."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from crossbit.report import plots

DRAWN: dict[str, Callable[[], str]] = {
    "kernel_by_layer": lambda: plots.kernel_by_layer(
        [{"role": r, "block": b, "t": 0.1, "c": None} for r in "abcde" for b in range(2)],
        {"t": "per token", "c": "cross"},
    ),
    "kernel_over_alpha": lambda: plots.kernel_over_alpha({"8 bits": [(0.15, 0.1), (1, 0.2)]}),
    "remove_kernel": lambda: plots.remove_kernel_curve(
        [{"proportion": p, "perplexity": math.exp(9 * p)} for p in (0.5, 0.0, 0.2)],
        original=0.9,
        threshold=0.12,
        tolerance=0.01,
        marks={"A8 per token": 0.1},
    ),
    "alpha_histogram": lambda: plots.alpha_histogram([("q", "0.5"), ("q", "fitted"), ("o", "0.5")]),
    "alpha_losses": lambda: plots.alpha_losses([("0.5", 0.01), ("searched", 0.009)], "a $loss_x$"),
    "block_errors": lambda: plots.block_errors([{"block": 1, "relative_error": 0.5}]),
    "window_losses": lambda: plots.window_losses([{"window": 0, "before": 0.5, "after": 0.4}]),
    "outlier_ratios": lambda: plots.outlier_ratios([{"block": 0, "ratio": 30.0}]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_plots_are_inline_svg_the_same_each_time(name: str) -> None:
    svg = DRAWN[name]()
    assert svg == DRAWN[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("aria-label")
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "metadata" not in svg
    assert "<style" not in svg
    for target in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg):
        assert f'id="{"".join(target)}"' in svg


def texts(svg: str) -> str:
    return " ".join(t for e in ElementTree.fromstring(svg).iter() for t in [e.text or ""]).strip()


def test_plots_label_axes_units_and_series() -> None:
    assert "rounded to zero (%)" in texts(DRAWN["kernel_by_layer"]())
    assert "per token" in texts(DRAWN["kernel_by_layer"]())
    shown = texts(DRAWN["remove_kernel"]())
    for words in ("perplexity", "original, 0.9", "loss passes 1 % at 12 %", "A8 per token, 10 %"):
        assert words in shown
    assert "a $loss_x$" in texts(DRAWN["alpha_losses"]())  # text, never mathematics


def test_plots_show_the_data() -> None:
    """The highest of three points must lie highest: SVG's y grows downwards."""
    svg = plots.block_errors([{"block": b, "relative_error": v} for b, v in enumerate((1, 3, 2))])
    uses = re.findall(r'<use href="#(\w+)" x="([\d.]+)" y="([\d.]+)" style="fill: #0072b2"', svg)
    assert len(uses) == 3
    xs, ys = [float(u[1]) for u in uses], [float(u[2]) for u in uses]
    assert xs == sorted(xs)
    assert ys[1] < ys[2] < ys[0]
    base = ys[0] + (ys[0] - ys[1]) / 2  # where 0 lies, from the values 1 and 3
    assert (base - ys[2]) / (base - ys[0]) == pytest.approx(2, rel=1e-3)
