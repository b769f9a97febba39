"""Choosing a column factor: the formulas, and a search that finds what a slow reference finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import Grid
from crossbit.recipe import AwqScale, CrossFold, Smooth
from crossbit.transforms import awq_scale, cross_fold, smooth
from crossbit.transforms.awq_scale import awq_factor
from crossbit.transforms.cross_fold import cross_factor, weight_balanced
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, normalised, search
from crossbit.transforms.smooth import STRENGTHS, smooth_factor

ROWS, COLUMNS = 48, 32
CHANNEL8, GROUP4 = Grid(8, scale_dtype=torch.float32), Grid(4, True, "group", 16)
A8 = ActivationGrid(8)
positive = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12).map(torch.tensor)


def problem(
    *,
    grids: tuple[Grid | None, ...] = (CHANNEL8, GROUP4),
    activations: ActivationGrid | None = A8,
    shared: Tensor | None = None,
    seed: int = 0,
) -> FoldProblem:
    """Layers of one input with outlier channels, statistics from rows other than the sample."""
    rng = torch.Generator().manual_seed(seed)
    spread = torch.exp(1.5 * torch.randn(COLUMNS, generator=rng))
    x = torch.randn(2 * ROWS, COLUMNS, generator=rng) * spread
    weights = [torch.randn(24 + 8 * i, COLUMNS, generator=rng) for i in range(len(grids))]
    fitting = x[:ROWS].abs()
    return FoldProblem(
        weights, grids, activations, fitting.amax(0), fitting.mean(0), x[ROWS:], shared
    )


# -- a slow reference -----------------------------------------------------------------------------


def rounded(value: float) -> int:
    """Half to even, as the grids round."""
    return round(value)


def slow_weight(weight: Tensor, grid: Grid | None) -> Tensor:
    """Round to nearest, group by group, in Python floats over float32 scales."""
    if grid is None:
        return weight.double()
    out = torch.zeros_like(weight, dtype=torch.float64)
    size = grid.group_size or weight.shape[1]
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            part = weight[i, start : start + size]
            largest = (part.abs().max() / ((2**grid.bits - 1) / 2)).to(grid.scale_dtype)
            for j, value in enumerate(part):
                ratio = float(value / largest.float())
                code = min(max(rounded(ratio), -(2 ** (grid.bits - 1))), 2 ** (grid.bits - 1) - 1)
                out[i, start + j] = code * float(largest)
    return out


def slow_input(x: Tensor, grid: ActivationGrid | None) -> Tensor:
    if grid is None:
        return x.double()
    out = torch.zeros_like(x, dtype=torch.float64)
    for i, row in enumerate(x):
        step = row.abs().max() / ((2**grid.bits - 1) / 2)
        for j, value in enumerate(row):
            code = min(
                max(rounded(float(value / step)), -(2 ** (grid.bits - 1))), 2 ** (grid.bits - 1) - 1
            )
            out[i, j] = code * float(step)
    return out


def slow_error(p: FoldProblem, factor: Tensor) -> float:
    """Relative squared output error of a factor, by the definition."""
    x = slow_input(p.sample / factor, p.activations)
    error = power = 0.0
    for weight, grid in zip(p.weights, p.grids, strict=True):
        target = p.sample.double() @ weight.double().T
        error += float((x @ slow_weight(weight * factor, grid).T - target).square().sum())
        power += float(target.square().sum())
    return error / power


def assert_is_the_best(choice: FoldChoice, p: FoldProblem, factors: dict[str, Tensor]) -> None:
    """The choice is the reference's best, or as good as it up to rounding."""
    slow = {key: slow_error(p, factor) for key, factor in factors.items()}
    assert set(choice.losses) == set(slow)
    for key, loss in choice.losses.items():
        # The search's products may round their factors to bfloat16 where that is faster.
        assert loss == pytest.approx(slow[key], rel=0.05, abs=2e-5)
    label = choice.label
    assert choice.losses[label] == min(choice.losses.values())
    torch.testing.assert_close(choice.factor, factors[label])
    assert slow[label] <= min(slow.values()) * 1.05 + 2e-5


# -- formulas -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(positive, st.floats(0, 1))
def test_cross_factor(c: Tensor, alpha: float) -> None:
    f = cross_factor(c, alpha)
    wanted = [float(v) ** (1 - alpha) for v in c]
    middle = math.sqrt(max(wanted) * min(wanted))
    assert f.dtype == torch.float32
    assert f.tolist() == pytest.approx([w / middle for w in wanted], rel=1e-5)
    assert math.sqrt(float(f.max()) * float(f.min())) == pytest.approx(1, rel=1e-5)
    assert torch.equal(cross_factor(c, 1.0), torch.ones_like(c))


def test_dead_channels_take_the_median() -> None:
    c = torch.tensor([0.0, 1.0, 4.0, 9.0, 0.0])
    f = cross_factor(c, 0.5)
    assert (f / f[2]).tolist() == pytest.approx([1, 0.5, 1, 1.5, 1])
    assert torch.equal(cross_factor(torch.zeros(4), 0.3), torch.ones(4))


def test_weight_balanced_factor() -> None:
    p = problem()
    f = weight_balanced(cross_factor(p.column_maximum, 0.4), p, 0.4)
    largest = torch.cat(list(p.weights)).abs().amax(0).double()
    wanted = p.column_maximum.double() ** 0.6 / largest**0.4
    torch.testing.assert_close((f / f[0]).double(), wanted / wanted[0], rtol=1e-5, atol=0)
    dead = FoldProblem(
        [torch.zeros(3, 4)], [None], None, torch.ones(4), torch.ones(4), torch.zeros(0, 4)
    )
    assert torch.equal(weight_balanced(torch.full((4,), 2.0), dead, 0.5), torch.full((4,), 2.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1), st.floats(0, 1))
def test_smooth_factor_is_equation_4(pairs: list[tuple[float, float]], strength: float) -> None:
    c, w = (torch.tensor(side) for side in zip(*pairs, strict=True))
    wanted = [max(x**strength / y ** (1 - strength), 1e-5) for x, y in pairs]
    assert smooth_factor(c, w, strength).tolist() == pytest.approx(wanted, rel=1e-4)


def test_smooth_factor_survives_dead_channels() -> None:
    f = smooth_factor(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert bool(torch.isfinite(f).all())
    assert bool((f > 0).all())


@settings(max_examples=50, deadline=None)
@given(positive, st.floats(0.05, 1))
def test_awq_factor(mean: Tensor, ratio: float) -> None:
    wanted = [float(v) ** ratio for v in mean]
    middle = math.sqrt(max(wanted) * min(wanted))
    assert awq_factor(mean, ratio).tolist() == pytest.approx([w / middle for w in wanted], rel=1e-5)


def test_awq_factor_ends() -> None:
    assert torch.equal(awq_factor(torch.tensor([3.0, 0.0]), 0.0), torch.ones(2))
    f = awq_factor(torch.tensor([1.0, 0.0]), 0.5)
    assert float(f[0] / f[1]) == pytest.approx(100)  # a floor of 1e-4 under the mean


@settings(max_examples=30, deadline=None)
@given(positive, st.floats(1e-3, 1e3))
def test_normalised_does_not_depend_on_scale(f: Tensor, by: float) -> None:
    torch.testing.assert_close(normalised(f * by), normalised(f), rtol=1e-4, atol=0)


# -- ties -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 10)), min_size=1, max_size=20))
def test_tied_channels_take_their_largest(pairs: list[tuple[int, float]]) -> None:
    shared = torch.tensor([index for index, _ in pairs])
    f = torch.tensor([value for _, value in pairs])
    p = FoldProblem([], [], None, f, f, torch.zeros(0, len(pairs)), shared)
    wanted = [max(v for i, v in pairs if i == index) for index, _ in pairs]
    assert p.tie(f).tolist() == pytest.approx(wanted)


def test_without_ties_the_factor_is_itself() -> None:
    p = problem()
    f = torch.rand(COLUMNS)
    assert p.tie(f) is f


# -- the search -----------------------------------------------------------------------------------

SHARED = torch.arange(COLUMNS) // 8 * 4 + torch.arange(COLUMNS) % 4
PROBLEMS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "weight only": {"activations": None, "grids": (GROUP4, Grid(4))},
    "a4": {"activations": ActivationGrid(4), "grids": (GROUP4,)},
    "a layer in float": {"grids": (CHANNEL8, None)},
    "grouped heads": {"shared": SHARED},
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_cross_fold_search(case: str) -> None:
    p = problem(**PROBLEMS[case])
    alphas = (0.15, 0.5, 0.8, 1.0)
    factors = {f"{a:g}": p.tie(cross_factor(p.column_maximum, a)) for a in alphas}
    plain = cross_fold.choose(p, CrossFold(alphas=alphas, weight_term=False))
    assert_is_the_best(plain, p, factors)
    for a in alphas[:-1]:
        balanced = weight_balanced(cross_factor(p.column_maximum, a), p, a)
        factors[f"{a:g} with weights"] = p.tie(balanced)
    assert_is_the_best(cross_fold.choose(p, CrossFold(alphas=alphas)), p, factors)


def test_fixed_alpha_is_not_searched() -> None:
    p = problem()
    choice = cross_fold.choose(p, CrossFold(alpha=0.3))
    assert choice.parameter == 0.3
    assert set(choice.losses) == {"0.3"}
    assert torch.equal(choice.factor, cross_factor(p.column_maximum, 0.3))


@pytest.mark.parametrize("case", ["w8a8", "weight only"])
def test_awq_search(case: str) -> None:
    p = problem(**PROBLEMS[case])
    factors = {f"{i / 4:g}": awq_factor(p.column_mean, i / 4) for i in range(4)}
    plain = awq_scale.choose(p, AwqScale(points=4, weight_term=False))
    assert_is_the_best(plain, p, factors)
    assert min(plain.losses.values()) <= plain.losses["0"]
    share = awq_scale.weight_magnitude(p.weights, p.grids)
    for i in range(4):
        raw = p.column_mean ** (i / 4) / (share ** (1 - i / 4) + 1e-4)
        factors[f"{i / 4:g} with weights"] = raw / (raw.max() * raw.min()).sqrt()
    assert_is_the_best(awq_scale.choose(p, AwqScale(points=4)), p, factors)


def test_smooth_search() -> None:
    p = problem()
    largest = torch.cat(list(p.weights)).abs().amax(0)
    factors = {f"{s:g}": smooth_factor(p.column_maximum, largest, s) for s in STRENGTHS}
    assert_is_the_best(smooth.choose(p, Smooth(strength="search")), p, factors)
    fixed = smooth.choose(p, Smooth(strength=0.5))
    assert torch.equal(fixed.factor, factors["0.5"])


@pytest.mark.parametrize("kind", ["per_tensor_static", "cross_static", "cross_static_clip"])
def test_calibrated_activations_are_searched_too(kind: Any) -> None:
    """Their scales are those of the folded input: the maxima divided by the factor."""
    grid = ActivationGrid(8, kind, alpha=0.5)
    p = problem(grids=(None,), activations=grid)
    f = smooth_factor(p.column_maximum, p.weights[0].abs().amax(0), 0.8)
    c = (p.column_maximum / f).double()
    x = (p.sample / f).double()
    t = x.abs().amax(1, keepdim=True)
    step = {
        "per_tensor_static": c.amax().expand_as(x),
        "cross_static": (x / c.sqrt()).abs().amax(1, keepdim=True) * c.sqrt(),
        "cross_static_clip": t.sqrt() * c.sqrt(),
    }[kind] / 127.5
    rounded_x = (x / step).round().clamp(-128, 127) * step
    difference = (rounded_x - x) @ (p.weights[0] * f).double().T
    target = p.sample.double() @ p.weights[0].double().T
    wanted = float(difference.square().sum() / target.square().sum())
    found = search(p, [Candidate(0.8, f)]).losses["0.8"]
    assert found == pytest.approx(wanted, rel=0.05, abs=2e-5)


def test_outliers_make_folding_worth_it() -> None:
    """One channel 100 times the others: per token loses the others, a fold does not."""
    p = problem(grids=(CHANNEL8,), activations=ActivationGrid(4))
    choice = cross_fold.choose(p, CrossFold())
    assert choice.parameter < 1.0
    assert min(choice.losses.values()) < 0.5 * choice.losses["1"]


def test_the_earliest_wins_a_tie() -> None:
    p = problem()
    same = torch.ones(COLUMNS)
    candidates = [Candidate(3, same), Candidate(1, same.clone()), Candidate(2, same * 2)]
    assert search(p, candidates).parameter == 3
    assert search(p, candidates[::-1]).parameter == 2
