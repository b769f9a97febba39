"""Roundings of weights that move: the integers, when a weight is made, what goes together."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.moving import (
    DTYPES,
    EXPANSIONS,
    GRIDS,
    LIMITS,
    PARAMETERS,
    draw,
    matrix,
    slow_inner,
    slow_moved,
    start,
    states,
    trained,
)
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import grouped, quantize
from crossbit.solvers.expansion import ExpansionChoice, expand
from crossbit.solvers.rounding import fake_weight, harden, held, pull_back, start_rounding
from crossbit.solvers.rounding_state import (
    EXPANSION,
    Rounding,
    RoundingChoice,
    effective_grid,
    effective_scale,
    forget_moved,
    moved_weight,
)

# -- folded or not, the integers are the same ------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(states(), st.sampled_from(DTYPES))
def test_folded_then_rounded_it_is_what_was_trained(state: Rounding, dtype: torch.dtype) -> None:
    """Code for code: the moved weight, rounded plainly on the grid in force."""
    before = {n: p.clone() for n, p in state.parameters.items()}
    hard = harden(state)
    scale, zero = effective_grid(state)
    assert torch.equal(hard.scale.float(), scale)
    assert hard.scale.dtype == state.grid.scale_dtype
    assert (hard.zero_point is None) == (zero is None) == state.grid.symmetric
    assert torch.equal(fake_weight(state, dtype), hard.dequantize().to(dtype))
    if state.choice.parameter == "none":
        folded = moved_weight(state).clone()
        codes = quantize(folded, hard.scale, hard.zero_point, state.grid)
        assert torch.equal(hard.codes, codes)
        # Folded, it is a weight that stays: training on from there begins with the same integers.
        plain = start_rounding(folded, hard, RoundingChoice())
        assert torch.equal(harden(plain).codes, hard.codes)
    assert all(torch.equal(before[n], p) for n, p in state.parameters.items())


@pytest.mark.parametrize("factors", [(), ("rows", "columns")])
@pytest.mark.parametrize("expansion", EXPANSIONS[1:], ids=lambda e: e.kind)
@pytest.mark.parametrize("limits", LIMITS)
def test_where_b_is_zero_nothing_has_moved(
    limits: Any, expansion: ExpansionChoice, factors: tuple[str, ...]
) -> None:
    """Bit for bit, the signs of zeros included, whatever else has been trained; so with ones."""
    for grid, parameter in itertools.product(GRIDS, PARAMETERS):
        weight = matrix(6, 8, 1)
        weight[-1, -4:] = torch.tensor([0.0, -0.0, 0.0, -0.0])
        still = RoundingChoice(parameter=parameter, limits=limits)  # type: ignore[arg-type]
        moving = replace(still, expansion=expansion)
        one, other = (trained(start(weight, grid, c), 3) for c in (still, moving))
        for name, parameter_ in one.parameters.items():
            other.parameters[name].copy_(parameter_)
        for name in EXPANSION:
            if name in other.parameters:
                other.parameters[name].zero_()
        if factors:
            other.rows, other.columns = torch.ones(6), torch.ones(8)
        bits = [moved_weight(state).view(torch.int32) for state in (one, other)]
        assert torch.equal(*bits)
        hard, moved = harden(one), harden(other)
        assert torch.equal(hard.codes, moved.codes)
        assert torch.equal(hard.scale, moved.scale)


def test_the_gradient_at_b_zero_moves_every_number_of_the_mask() -> None:
    for expansion in EXPANSIONS[1:]:
        assert expansion is not None
        choice = RoundingChoice(parameter="none", expansion=expansion)
        state = start(matrix(8, 8, 2), GRIDS[1], choice)
        found = pull_back(state, draw(8, 8, seed=1))
        assert state.basis is not None
        r = state.basis.s.numel()
        ones = {n: torch.ones_like(p) for n, p in state.parameters.items()}
        if expansion.kind == "square":
            ones["square"].fill_diagonal_(0)
        wanted = int(slow_inner(expansion, ones, r).count_nonzero())
        assert sum(int(found[n].count_nonzero()) for n in EXPANSION if n in found) == wanted


# -- a moved weight is made once, and made anew ----------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry each time a weight is moved."""
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return expand(*args)

    monkeypatch.setattr("crossbit.solvers.rounding_state.expand", counted)
    return calls


def state_of_everything() -> Rounding:
    choice = RoundingChoice(limits="range", expansion=ExpansionChoice("square", 3))
    return trained(start(matrix(6, 8), GRIDS[1], choice), 1, ("rows", "columns"))


def ask(state: Rounding) -> Tensor:
    """All that a step asks for."""
    fake_weight(state, torch.float32)
    harden(state)
    pull_back(state, torch.ones_like(state.weight))
    return moved_weight(state)


def test_a_weight_is_moved_once_between_two_steps(made: list[int]) -> None:
    state = state_of_everything()
    first = moved_weight(state)
    assert len(made) == 1
    fake_weight(state, torch.float32)
    assert moved_weight(state) is first
    # What does not move it makes it no other.
    for name in ("offset", "low", "high"):
        state.parameters[name].mul_(0.5)
    fake_weight(state, torch.bfloat16)
    harden(state)
    effective_scale(state)
    assert moved_weight(state) is first
    assert len(made) == 1
    forget_moved(state)
    assert torch.equal(moved_weight(state), first)
    assert len(made) == 2


@pytest.mark.parametrize("name", ["expansion", "square", "rows", "columns"])
def test_whatever_moves_it_makes_it_anew(name: str, made: list[int]) -> None:
    state = state_of_everything()

    def source() -> Tensor:
        found: Tensor = state.parameters[name] if name in EXPANSION else getattr(state, name)
        return found

    def set_aside() -> None:
        """Another tensor in its place, of the same version."""
        other = source() * 1.5
        while other._version < source()._version:
            other.add_(0.01)
        if name in EXPANSION:
            state.parameters[name] = other
        else:
            setattr(state, name, other)

    kept = source().clone()
    changes = (
        lambda: source().add_(0.25),
        lambda: source().copy_(kept * 2),
        set_aside,
        lambda: torch.optim.SGD([source()], lr=0.5).step(),
    )
    for change in changes:
        before = ask(state).clone()
        count = len(made)
        source().grad = torch.ones_like(source())
        change()
        source().grad = None
        after = moved_weight(state)
        assert len(made) == count + 1
        assert not torch.equal(before, after)
        forget_moved(state)
        assert torch.equal(moved_weight(state), after)


def test_fused_steps_are_told_of() -> None:
    """They leave no version, which ``forget_moved`` is for."""
    state = state_of_everything()
    before = ask(state).clone()
    parameter = state.parameters["expansion"]
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    forget_moved(state)
    after = moved_weight(state)
    assert not torch.equal(before, after)
    leaves = {**state.parameters, "rows": state.rows, "columns": state.columns}
    slow = slow_moved(state, {n: t for n, t in leaves.items() if t is not None})
    torch.testing.assert_close(after.double(), slow, rtol=1e-5, atol=1e-6)


def test_what_does_not_move_is_not_copied() -> None:
    state = start(matrix(6, 8), GRIDS[1], RoundingChoice(limits="range"))
    assert not state.moves
    assert moved_weight(state) is state.weight
    assert state.expansion_rate == 1.0


@pytest.mark.parametrize(
    ("expansion", "rate"),
    [
        (ExpansionChoice("diagonal"), 1.0),
        (ExpansionChoice("band", 1), math.sqrt(8 / 22)),
        (ExpansionChoice("full"), math.sqrt(1 / 8)),
    ],
)
def test_wider_masks_learn_slower(expansion: ExpansionChoice, rate: float) -> None:
    state = start(matrix(8, 12), GRIDS[1], RoundingChoice(expansion=expansion))
    assert state.expansion_rate == pytest.approx(rate)


# -- what goes together ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"mode": "sigmoid"}, {"base": "zero"}])
@pytest.mark.parametrize(
    "moves", [{"limits": "range"}, {"expansion": ExpansionChoice()}, {"parameter": "none"}]
)
def test_integers_of_a_weight_that_stays_do_not_go_with_moves(
    moves: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(
        InputError, match=r"does not go with .*; use mode straight_through"
    ) as found:
        RoundingChoice(**moves, **change)
    assert "\n" not in str(found.value)
    RoundingChoice(**moves)
    RoundingChoice(**change)


def test_parameters_are_those_of_the_choice() -> None:
    weight = matrix(6, 8)
    steps = {"step": {"step"}, "range": {"low", "high"}}
    offsets = {"full": {"offset"}, "low_rank": {"a1", "a2"}, "none": set()}
    for limits, parameter, expansion in itertools.product(LIMITS, PARAMETERS, EXPANSIONS):
        choice = RoundingChoice(
            parameter=parameter,  # type: ignore[arg-type]
            limits=limits,  # type: ignore[arg-type]
            expansion=expansion,
        )
        state = start(weight, GRIDS[2], choice)
        inner = set() if expansion is None else {"expansion"}
        if expansion is not None and expansion.kind == "square":
            inner |= {"square"}
        assert set(state.parameters) == steps[limits] | offsets[parameter] | inner
        assert (state.basis is None) == (expansion is None) == (not state.moves)
        assert {p.dtype for p in state.parameters.values()} == {torch.float32}


# -- codes that are held ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(states())
def test_held_codes_stay_while_their_steps_are_trained(state: Rounding) -> None:
    hard = harden(state)
    kept = held(state)
    again = harden(kept)
    assert torch.equal(again.codes, hard.codes)
    assert torch.equal(again.scale, hard.scale)
    assert kept.parameters.keys() == {"step"}
    kept.parameters["step"].add_(draw(*kept.scale.shape, seed=1) * 0.1)
    moved = harden(kept)
    assert torch.equal(moved.codes, hard.codes)
    # What is the code times the step, and so is its slope.
    gradient = draw(*state.weight.shape, seed=2)
    found = pull_back(kept, gradient)
    weight = fake_weight(kept, torch.float32)
    wanted = grouped(weight * gradient, state.grid).sum(-1)
    torch.testing.assert_close(found["step"], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, moved.dequantize())
