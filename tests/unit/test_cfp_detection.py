"""CFP's detection of outliers, against a loop over the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.outlying import planted, spread_out
from torch import Tensor

from crossbit.errors import WorkError
from crossbit.transforms.cfp import best_split, detect, quartiles, truncate

magnitudes = st.lists(st.floats(0, 1e4, width=32), max_size=60).map(torch.tensor)
# Whole numbers: sums and scaled values are exact, so that no rounding decides.
whole = st.lists(st.integers(0, 1000), min_size=1, max_size=60).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


# -- a slow reference ------------------------------------------------------------------------------


def slow_merit(candidates: list[float], bulk: float, spread: float, reserved: int) -> float:
    """M of one split, by the definition."""
    kept = candidates[:reserved]
    gap = candidates[reserved] - (kept[-1] if kept else bulk)
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    variance = math.fsum((v - mean) ** 2 for v in kept) / len(kept) if kept else 0.0
    return gap * gap - spread * variance


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1.5, 1e4, width=32), min_size=1, max_size=40),
    st.floats(0.1, 1.5, exclude_max=True),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
)
def test_split_is_that_of_the_definition(values: list[float], bulk: float, spread: float) -> None:
    values = sorted(values)
    found = best_split(torch.tensor(values, dtype=torch.float64), bulk, spread)
    merits = [slow_merit(values, bulk, spread, k) for k in range(len(values))]
    # Rounding is relative to the size of the terms, not to their difference.
    allowed = 1e-11 * (values[-1] - bulk) ** 2
    assert merits[found] >= max(merits) - allowed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(11, 60), min_size=1, max_size=12), st.integers(1, 10))
def test_of_equal_splits_the_one_with_fewest_outliers(values: list[int], bulk: int) -> None:
    """Differences of whole numbers tie often."""
    numbers = [float(v) for v in sorted(values)]
    merits = [slow_merit(numbers, bulk, 0.0, k) for k in range(len(numbers))]
    wanted = max(k for k, m in enumerate(merits) if m == max(merits))
    assert best_split(torch.tensor(numbers, dtype=torch.float64), bulk, 0.0) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=50).map(torch.tensor))
def test_quartiles_are_those_of_torch(values: Tensor) -> None:
    wanted = torch.quantile(values.double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert quartiles(values) == pytest.approx(wanted.tolist(), rel=1e-12)


# -- detection -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(30, 300),
    st.lists(st.floats(50, 1000, width=32), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_planted_outliers_are_found(count: int, sizes: list[float], seed: int) -> None:
    """Far above a bulk that has no candidates, with gaps among them smaller than the one below."""
    bulk = spread_out(count, seed)
    outliers = torch.tensor(sizes) % 40 + 50  # in [50, 90): the gap below is the largest
    x = torch.cat((bulk, outliers))
    found = detect(x)
    assert found.outliers == found.candidates == len(sizes)
    assert found.limit == float(bulk.max())


def test_fine_detection_keeps_moderate_candidates() -> None:
    found = detect(planted())
    assert (found.candidates, found.outliers) == (4, 2)
    assert found.limit == pytest.approx(4.1)
    assert 2 < found.threshold < 4


def test_spread_and_fence_have_their_meaning() -> None:
    c = planted()
    assert detect(c, fence=200.0).outliers == 0
    # Reserving 45 pays while the gap to 100 is the larger one; the variance takes that back.
    c[5] = 45.0
    assert detect(c, spread=0.0).outliers == 1
    assert detect(c, spread=100.0).outliers == 2
    assert detect(c, spread=1e6).outliers == 4  # even 4.0 and 4.1 vary too much


@settings(max_examples=150, deadline=None)
@given(magnitudes, st.booleans(), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_decision_survives_permutation_and_powers_of_two(
    x: Tensor, gap: bool, exponent: int, random: Any
) -> None:
    x = x.where(x > 1e-6, 0.0)  # away from underflow
    order = list(range(x.numel()))
    random.shuffle(order)
    found = detect(x, gap=gap)
    assert detect(x[torch.tensor(order, dtype=torch.int64)], gap=gap) == found
    scaled = detect(x * 2.0**exponent, gap=gap)
    assert (scaled.candidates, scaled.outliers) == (found.candidates, found.outliers)
    assert scaled.limit == found.limit * 2.0**exponent
    assert scaled.threshold == found.threshold * 2.0**exponent


@settings(max_examples=150, deadline=None)
@given(whole, st.sampled_from([3.0, 7.0, 10.0, 1000.0, 4099.0]))
def test_decision_survives_scaling(x: Tensor, by: float) -> None:
    found, scaled = detect(x), detect(x * by)
    assert (scaled.candidates, scaled.outliers) == (found.candidates, found.outliers)
    assert scaled.limit == found.limit * by


@pytest.mark.parametrize("by", [0.1, 1 / 3, 1e-20, 1e20, math.pi])
def test_decision_survives_inexact_scaling(by: float) -> None:
    found = detect(planted() * by)
    assert (found.candidates, found.outliers) == (4, 2)
    assert found.limit == pytest.approx(4.1 * by, rel=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0),
        torch.zeros(5),
        torch.tensor([3.0]),
        torch.tensor([0.0, 0.0, 7.0]),  # one magnitude: nothing to compare it with
        torch.full((9,), 2.0),
        spread_out(50),
    ],
)
def test_nothing_stands_out(x: Tensor) -> None:
    found = detect(x)
    assert (found.candidates, found.outliers, found.limit) == (0, 0, math.inf)


@pytest.mark.parametrize("size", [1, 4])
def test_a_lone_candidate_and_equal_ones_are_outliers(size: int) -> None:
    """The reserved set is empty then; the bulk stands in for it."""
    x = torch.cat((spread_out(40), torch.full((size,), 9.0)))
    found = detect(x)
    assert (found.candidates, found.outliers) == (size, size)
    assert found.limit == float(x[:40].max())
    flat = torch.cat((torch.ones(40), torch.full((size,), 9.0)))  # an IQR of 0
    assert detect(flat).outliers == size
    assert detect(flat).limit == 1.0


def test_zeros_take_no_part() -> None:
    """With the quartiles of pruned weights all of what is left would be an outlier."""
    x = planted()
    assert detect(torch.cat((x, torch.zeros(1000)))) == detect(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_magnitudes_are_refused(bad: float) -> None:
    with pytest.raises(WorkError, match="finite and not negative"):
        detect(torch.tensor([1.0, bad]))


def test_more_values_than_torch_quantile_takes() -> None:
    x = torch.linspace(1, 2, (1 << 24) + 9)
    x[123] = 50.0
    found = detect(x)
    assert (found.outliers, found.limit) == (1, 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert detect(planted().to(dtype)).outliers == 2


def test_a_tail_without_gaps_has_no_outliers_where_a_gap_is_asked_for() -> None:
    """M alone calls every candidate of a thinning tail an outlier."""
    quantile = torch.linspace(0.5, 1, 20001, dtype=torch.float64)[:-1]
    tail = torch.special.ndtri(quantile)  # half a normal distribution
    plain, gap = detect(tail), detect(tail, gap=True)
    assert plain.outliers > 0.9 * plain.candidates > 0
    assert (gap.candidates, gap.outliers, gap.limit) == (plain.candidates, 0, math.inf)
    spiked = torch.cat((tail, torch.tensor([20.0, 21.0, -0.0], dtype=torch.float64)))
    assert detect(spiked, gap=True).outliers == 2
    assert truncate(tail.reshape(100, -1)).limit is None
    assert truncate(tail.reshape(100, -1), gap=False).fraction > 0.01


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(11, 200), min_size=1, max_size=30), st.integers(1, 10))
def test_asking_for_a_gap_only_leaves_splits_out(values: list[int], bulk: int) -> None:
    numbers = [float(v) for v in sorted(values)]
    candidates = torch.tensor(numbers, dtype=torch.float64)
    found = best_split(candidates, bulk, 1.0, gap=True)
    below = [bulk, *numbers]
    wide = [
        k
        for k in range(len(numbers))
        if (numbers[k] - below[k]) ** 2 > float(candidates.var(correction=0))
    ]
    assert (found in wide) if wide else found == len(numbers)
    if wide:
        merits = {k: slow_merit(numbers, bulk, 1.0, k) for k in wide}
        assert merits[found] == pytest.approx(max(merits.values()), rel=1e-9, abs=1e-6)
