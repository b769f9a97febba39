"""Round to nearest and its scale search against slow loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.grid import Grid, grouped
from crossbit.solvers.rtn import Clip, fit_scale, rtn


def make(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator)
    return plain * torch.rand(1, columns, generator=generator) + 0.1


def grid_of(bits: int, symmetric: bool, strategy: str, dtype: torch.dtype) -> Grid:
    if strategy == "group":
        return Grid(bits, symmetric, "group", 8, dtype)
    return Grid(bits, symmetric, "tensor" if strategy == "tensor" else "channel", None, dtype)


def group_loss(values: list[float], low: float, high: float, costs: list[float], g: Grid) -> float:
    """Weighted squared error of a group rounded with the range [low, high]: a scalar loop."""
    span = max(-low, high) / g.effective_divisor if g.symmetric else (high - low) / g.steps
    span = max(span, torch.finfo(g.scale_dtype).tiny)
    scale = float(torch.tensor(span).to(g.scale_dtype).float())
    zero = 0 if g.symmetric else min(max(round(g.qmin - low / scale), g.qmin), g.qmax)
    total = 0.0
    for value, cost in zip(values, costs, strict=True):
        code = min(max(round(value / scale) + zero, g.qmin), g.qmax)
        total += cost * ((code - zero) * scale - value) ** 2
    return total


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_search_is_never_worse_than_the_extremes(
    bits: int,
    symmetric: bool,
    strategy: str,
    dtype: torch.dtype,
    rows: int,
    groups: int,
    weighted: bool,
    seed: int,
) -> None:
    weight, grid = make(rows, 8 * groups, seed), grid_of(bits, symmetric, strategy, dtype)
    importance = make(1, 8 * groups, seed + 1)[0].abs() if weighted else None
    cost = torch.ones(8 * groups) if importance is None else importance

    def loss(clip: str) -> float:
        q = rtn(weight, grid, "mse" if clip == "mse" else "none", importance)
        assert q.scale.dtype == dtype
        return float(((q.dequantize() - weight).double().square() * cost).sum())

    assert loss("mse") <= loss("none") * (1 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    groups=st.integers(1, 4),
    weighted=st.booleans(),
    limited=st.booleans(),
    seed=st.integers(0, 99),
)
def test_signed_scales_are_never_worse_in_any_group(
    bits: int,
    strategy: str,
    dtype: torch.dtype,
    groups: int,
    weighted: bool,
    limited: bool,
    seed: int,
) -> None:
    """Than the unsigned grid's search, and than the extremes of either."""
    weight, grid = make(5, 8 * groups, seed), grid_of(bits, True, strategy, dtype)
    signed = replace(grid, signed=True)
    importance = make(1, 8 * groups, seed + 1)[0].abs() if weighted else None
    cost = torch.ones(8 * groups) if importance is None else importance
    limit = 0.8 * grouped(weight, grid).abs().amax(-1) if limited else None

    def losses(of: Grid, clip: Clip) -> Tensor:
        q = rtn(weight, of, clip, importance, limit)
        return grouped((q.dequantize() - weight).double().square() * cost, grid).sum(-1)

    best = losses(signed, "mse")
    for others in (losses(grid, "mse"), losses(grid, "none"), losses(signed, "none")):
        assert bool((best <= others * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_negating_a_weight_negates_its_signed_scales_and_nothing_else(
    clip: Clip, strategy: str
) -> None:
    weight = make(9, 32, 8)
    weight[3, 8:16] = 0.0
    grid = replace(grid_of(3, True, strategy, torch.bfloat16), signed=True)
    one, other = rtn(weight, grid, clip), rtn(-weight, grid, clip)
    assert torch.equal(one.codes, other.codes)
    used = grouped(weight, grid).abs().amax(-1) > 0
    assert torch.equal(one.scale[used], -other.scale[used])
    assert bool((one.scale < 0).any()) or strategy == "tensor"
    assert one.dequantize()[3, 8:16].abs().max() < 0.2 * (strategy != "group") + 1e-6


def test_the_search_finds_a_positive_extreme_at_once() -> None:
    """Two bits: -2, -1, 0, 1 times -0.5 holds the weight exactly, no positive scale does."""
    weight = torch.tensor([[1.0, 0.5, 0.0, -0.5]])
    grid = Grid(2, True, "channel", None, torch.float32)
    signed = rtn(weight, replace(grid, signed=True), "mse")
    assert torch.equal(signed.dequantize(), weight)
    assert signed.codes.tolist() == [[-2, -1, 0, 1]]
    assert float((rtn(weight, grid, "mse").dequantize() - weight).abs().max()) > 0.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_finds_the_least_loss_of_a_slow_search(
    symmetric: bool, strategy: str, weighted: bool
) -> None:
    weight, grid = make(6, 32, 3), grid_of(4, symmetric, strategy, torch.bfloat16)
    cost = make(1, 32, 4)[0].abs() if weighted else torch.ones(32)
    q = rtn(weight, grid, "mse", cost if weighted else None)
    width = {"tensor": 192, "channel": 32, "group": 8}[strategy]
    groups = weight.reshape(-1, width)
    costs = cost.expand(6, 32).reshape(-1, width)
    found = ((q.dequantize() - weight).square() * cost).reshape(-1, width).double().sum(1)
    for values, price, loss in zip(groups, costs, found.tolist(), strict=True):
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        coarse = [1.0, *(1.08 - 0.06 * i for i in range(13))]
        pairs = (values.tolist(), price.tolist())

        def at(ratio: float, pairs: tuple[list[float], ...], low: float, high: float) -> float:
            return group_loss(pairs[0], low * ratio, high * ratio, pairs[1], grid)

        centre = min(coarse, key=lambda r: at(r, pairs, low, high))
        fine = [centre + offset for offset in (0.0, 0.04, 0.02, -0.02, -0.04)]
        assert loss <= min(at(r, pairs, low, high) for r in fine) * (1 + 1e-4)


def test_clip_none_is_plain_rounding_of_the_extremes() -> None:
    grid = Grid(4, True, "group", 4, torch.float32, divisor=7.0)
    q = rtn(torch.tensor([[0.11, -0.7, 0.26, 0.0, 0.0, 0.0, 0.0, 0.0]]), grid)
    assert float(q.scale[0, 0]) == pytest.approx(0.1)
    assert q.codes.tolist() == [[1, -7, 3, 0, 0, 0, 0, 0]]


def test_importance_moves_the_error_to_where_it_costs_little() -> None:
    weight, grid = make(16, 32, 5), Grid(3, True, "channel", None, torch.float32)
    importance = torch.ones(32)
    importance[:4] = 1e4
    plain = (rtn(weight, grid, "mse").dequantize() - weight)[:, :4].square().sum()
    guided = (rtn(weight, grid, "mse", importance).dequantize() - weight)[:, :4].square().sum()
    assert guided < 0.5 * plain


def test_limit_bounds_the_scale() -> None:
    weight, grid = make(4, 16, 6), Grid(4, True, "group", 8, torch.float32)
    limit = weight.reshape(4, 2, 8).abs().amax(-1) * 0.6
    scale, _ = fit_scale(weight, grid, limit=limit)
    assert torch.allclose(scale, limit / 7.5)
    loose, _ = fit_scale(weight, grid, limit=limit * 100)
    assert torch.equal(loose, fit_scale(weight, grid)[0])


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = make(37, 32, 7), Grid(4, False, "group", 8)
    whole = rtn(weight, grid, "mse")
    monkeypatch.setattr("crossbit.solvers.rtn._CHUNK_ELEMENTS", 33)
    parts = rtn(weight, grid, "mse")
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


def test_bad_input_is_refused() -> None:
    grid = Grid(4, True, "channel")
    with pytest.raises(WorkError, match="not finite"):
        rtn(torch.tensor([[1.0, math.nan]]), grid)
    with pytest.raises(InputError, match="two dimensions"):
        rtn(torch.zeros(3), grid)
    with pytest.raises(InputError, match="importance"):
        rtn(torch.zeros(2, 3), grid, "mse", torch.ones(2))
    with pytest.raises(InputError, match="limit"):
        rtn(torch.zeros(2, 3), grid, limit=torch.ones(2, 3))
    with pytest.raises(InputError, match="clip"):
        rtn(torch.zeros(2, 3), grid, "nonsense")  # type: ignore[arg-type]
