"""Roundings of weights that move: values and gradients, by definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.moving import (
    EXPANSIONS,
    FACTORS,
    GRIDS,
    LIMITS,
    PARAMETERS,
    SEEDS,
    SIGNS,
    draw,
    make_grid,
    matrix,
    slow_moved,
    start,
    states,
    trained,
)
from torch import Tensor

from crossbit.grid import Grid, fit_minmax, grouped, round_ste
from crossbit.solvers.expansion import ExpansionChoice
from crossbit.solvers.rounding import fake_weight, harden, pull_back
from crossbit.solvers.rounding_state import (
    WHOLE,
    Rounding,
    RoundingChoice,
    effective_grid,
    effective_scale,
    moved_weight,
)


def wide(per_group: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """[N', G] -> the shape of the weight."""
    return per_group.unsqueeze(-1).expand(grouped(like, grid).shape).reshape(like.shape)


# -- forward and gradients, by definition ----------------------------------------------------------


def slow_grid(state: Rounding, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Steps, straight through their rounding to the stored dtype, and zero points."""
    grid = state.grid
    info = torch.finfo(grid.scale_dtype)
    if state.choice.limits == "step":
        stored = state.scale * state.parameters["step"].exp()
        trained = (leaves["step"] - state.parameters["step"]).exp()
        if state.rows is not None and grid.strategy != "tensor":
            stored = stored * state.rows[:, None]  # a row's steps follow its factor
            trained = trained * (leaves["rows"] / state.rows)[:, None]
        stored = stored.sign() * stored.abs().clamp(min=info.tiny, max=info.max)
        stored = stored.to(grid.scale_dtype).float()
        zero = torch.zeros_like(stored) if state.zero is None else state.zero
        return stored * trained, zero
    view = grouped(moved_weight(state), grid)  # a constant: the range's extremes have no gradient
    low = torch.sigmoid(leaves["low"]) * view.amin(-1).clamp(max=0)
    high = torch.sigmoid(leaves["high"]) * view.amax(-1).clamp(min=0)
    if grid.symmetric:
        upper = (high > -low).detach()
        size = torch.where(upper, high, -low) / grid.effective_divisor
    else:
        size = (high - low) / grid.steps
    stored = size.detach().clamp(min=info.tiny).to(grid.scale_dtype).float()
    step = size + (stored - size).detach()
    zero = torch.zeros_like(stored)
    if grid.symmetric and grid.signed:
        step = torch.where(upper, -step, step)
    if not grid.symmetric:
        zero = (grid.qmin - low.detach() / stored).round().clamp(grid.qmin, grid.qmax)
    return step, zero


def slow_weight(state: Rounding, leaves: dict[str, Tensor]) -> Tensor:
    """What by autograd; the moved weight's value is the state's, so that no tie falls apart."""
    grid, choice = state.grid, state.choice
    moved = slow_moved(state, leaves)
    known = moved_weight(state)
    torch.testing.assert_close(known.double(), moved.detach(), rtol=1e-5, atol=1e-6)
    moved = moved + (known.double() - moved).detach()
    step, zero = (wide(t, known, grid).double() for t in slow_grid(state, leaves))
    offset = torch.zeros_like(known)
    if choice.parameter == "full":
        offset = leaves["offset"]
    elif choice.parameter == "low_rank":
        offset = (leaves["a1"] @ leaves["a2"]).clamp(-choice.reach, choice.reach)
    # In float64, where a dead group's step has a square; rounded where the code rounds.
    value = moved / step + offset
    exact = known / step.float() + offset
    value = value + (exact.double() - value).detach()
    codes = (round_ste(value) + zero).clamp(grid.qmin, grid.qmax) - zero
    return (codes * step).float()


def differs(
    name: str, found: Tensor, expected: Tensor, rtol: float, atol: float = 0.0
) -> list[str]:
    """How far one float32 tensor is from another, in a line; none where it is near enough."""
    if not found.dtype == expected.dtype == torch.float32 or found.shape != expected.shape:
        return [f"{name}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"]
    far = ~torch.isclose(found, expected, rtol=rtol, atol=atol)
    if not bool(far.any()):
        return []
    error = float((found - expected).abs().max())
    return [f"{name}: {int(far.sum())} of {far.numel()} elements, by up to {error:.3g}"]


def unlike_autograd(state: Rounding, seed: int) -> list[str]:
    """Where forward and gradients are not those of the reference; the gradient is left alone."""
    gradient = draw(*state.weight.shape, seed=seed + 9)
    leaves = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    for name in ("rows", "columns"):
        factor = getattr(state, name)
        if factor is not None:
            leaves[name] = factor.clone().requires_grad_()
    slow = slow_weight(state, leaves)
    wrong = differs("forward", fake_weight(state, torch.float32), slow.detach(), 1e-5)
    (slow * gradient).sum().backward()  # type: ignore[no-untyped-call]
    given_ = gradient.clone()
    found = pull_back(state, gradient)
    if not torch.equal(gradient, given_):
        wrong.append("what comes in was changed")
    if found.keys() != leaves.keys():
        wrong.append(f"gradients of {[*found]}, not of {[*leaves]}")
    for name, value in found.items():
        expected = leaves[name].grad if name in leaves else None
        if expected is None:
            wrong.append(f"{name}: no gradient is expected")
            continue
        size = max(1e-6, float(expected.abs().max()))
        wrong += differs(name, value, expected, 1e-3, 1e-4 * size)
    return wrong


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.describe()} {g.signed}")
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("limits", LIMITS)
def test_forward_and_gradients_are_those_of_autograd(
    limits: Any, parameter: Any, grid: Grid
) -> None:
    """Every expansion, with every set of factors."""
    for seed, (expansion, factors) in enumerate(itertools.product(EXPANSIONS, FACTORS)):
        choice = RoundingChoice(
            parameter=parameter, rank=3, reach=0.5, limits=limits, expansion=expansion
        )
        rows, columns = ((6, 8), (9, 8), (7, 12))[seed % 3]
        state = trained(start(matrix(rows, columns, seed), grid, choice, seed), seed, factors)
        assert unlike_autograd(state, seed) == []


@settings(deadline=None, max_examples=60)
@given(states(), SEEDS)
def test_gradients_of_any_state(state: Rounding, seed: int) -> None:
    assert unlike_autograd(state, seed) == []


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.describe()} {g.signed}")
def test_chunks_do_not_matter(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = RoundingChoice(limits="range", expansion=ExpansionChoice("band", 2))
    gradient = draw(7, 8, seed=3)

    def everything() -> list[Tensor]:
        state = trained(start(matrix(7, 8, 2), grid, choice), 5, ("rows", "columns"))
        found = pull_back(state, gradient)
        hard = harden(state)
        return [fake_weight(state, torch.float32), hard.codes.float(), *found.values()]

    whole = everything()
    monkeypatch.setattr("crossbit.solvers.rounding._CHUNK_ELEMENTS", 9)
    for one, other in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.describe()} {g.signed}")
def test_ranges_begin_at_nearly_all_of_the_extremes(grid: Grid) -> None:
    weight = matrix(6, 8, 3)
    state = start(weight, grid, RoundingChoice(parameter="none", limits="range"))
    share = 1 / (1 + math.exp(-WHOLE))
    assert share == pytest.approx(0.982, abs=1e-3)
    whole, _ = fit_minmax(weight, replace(grid, scale_dtype=torch.float32))
    near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[grid.scale_dtype]
    found, zero = effective_grid(state)
    live = whole.abs() > 1e-30
    torch.testing.assert_close(found[live], share * whole[live], rtol=near, atol=0)
    assert (zero is None) == grid.symmetric


@settings(deadline=None, max_examples=60)
@given(states())
def test_steps_are_finite_and_as_they_are_stored(state: Rounding) -> None:
    for name in ("low", "high"):
        if name in state.parameters:
            state.parameters[name][0, 0] = -300.0  # a share of nothing
    scale, zero = effective_grid(state)
    assert torch.equal(scale, effective_scale(state))
    assert torch.equal(scale, scale.to(state.grid.scale_dtype).float())
    assert bool(torch.isfinite(scale).all())
    assert bool((scale != 0).all())
    assert bool((scale > 0).all()) or state.grid.signed
    if zero is not None:
        assert bool(((zero >= state.grid.qmin) & (zero <= state.grid.qmax)).all())
        assert torch.equal(zero, zero.round())
    assert bool(torch.isfinite(fake_weight(state, torch.float32)).all())
    gradients = pull_back(state, torch.ones_like(state.weight))
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())


@pytest.mark.parametrize("sign", SIGNS)
def test_a_smaller_range_clips(sign: str) -> None:
    """Half the range: nothing beyond it is left, and what is inside has half the step."""
    grid = make_grid(4, sign, "channel")
    weight = torch.linspace(-1, 1, 64).repeat(3, 1) * torch.tensor([[1.0], [2.0], [5.0]])
    state = start(weight, grid, RoundingChoice(parameter="none", limits="range"))
    whole = effective_scale(state).abs()
    for name in ("low", "high"):
        state.parameters[name].fill_(0.0)
    share = 1 / (1 + math.exp(-WHOLE))
    torch.testing.assert_close(effective_scale(state).abs(), whole * 0.5 / share)
    value = fake_weight(state, torch.float32)
    bound = 0.5 * weight.abs().amax(1) + effective_scale(state).abs().squeeze(1)
    assert bool((value.abs().amax(1) <= bound).all())
    inside = weight.abs() < 0.4 * weight.abs().amax(1, keepdim=True)
    error = (value - weight).abs() / effective_scale(state).abs()
    assert float(error[inside].max()) <= 0.501
    assert float(error[~inside].max()) > 5


def test_only_the_side_that_makes_the_step_is_trained() -> None:
    """Of a symmetric grid; an asymmetric one has both."""
    weight = draw(6, 8, seed=4)
    for sign in SIGNS:
        grid = make_grid(3, sign, "channel")
        state = start(weight, grid, RoundingChoice(parameter="none", limits="range"))
        found = pull_back(state, draw(6, 8, seed=5))
        used = torch.stack([found["low"] != 0, found["high"] != 0])
        assert bool((used.sum(0) == (2 if sign == "asymmetric" else 1)).all())
        if sign != "asymmetric":
            upper = weight.amax(1) > -weight.amin(1)
            assert torch.equal(used[1].squeeze(1), upper)


def test_groups_of_zeros_stay_zero() -> None:
    for grid, parameter in itertools.product(GRIDS, ("none", "low_rank")):
        weight = matrix(6, 8, 5)
        weight[2] = 0.0
        if grid.strategy == "tensor":
            weight.zero_()
        choice = RoundingChoice(parameter=parameter, limits="range")  # type: ignore[arg-type]
        state = start(weight, grid, choice)
        assert not bool(harden(state).dequantize()[2].any())
        gradients = pull_back(state, torch.ones(6, 8))
        dead = grouped(weight, grid).abs().amax(-1) == 0
        for name in ("low", "high"):
            assert not bool(gradients[name][dead].any())
