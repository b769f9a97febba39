"""Weights that move below their rounding, ranges that are trained: against slow references."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid, fit_minmax, grouped, quantize, round_ste
from crossbit.solvers.expansion import ExpansionChoice, expand
from crossbit.solvers.rounding import fake_weight, harden, pull_back, start_rounding
from crossbit.solvers.rounding_state import (
    EXPANSION,
    WHOLE,
    Rounding,
    RoundingChoice,
    effective_grid,
    effective_scale,
    forget_moved,
    moved_weight,
)
from crossbit.solvers.rtn import rtn

LIMITS = ("step", "range")
PARAMETERS = ("full", "low_rank", "none")
EXPANSIONS: tuple[ExpansionChoice | None, ...] = (
    None,
    ExpansionChoice("diagonal"),
    ExpansionChoice("band", 2),
    ExpansionChoice("blocks", 4),
    ExpansionChoice("square", 3),
    ExpansionChoice("full", rank=5),
)
FACTORS = ((), ("rows",), ("columns",), ("rows", "columns"))
STRATEGIES = ("tensor", "channel", "group")
SIGNS = ("signed", "unsigned", "asymmetric")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 999)


def make_grid(bits: int, sign: str, strategy: Any, dtype: torch.dtype = torch.float32) -> Grid:
    size = 4 if strategy == "group" else None
    return Grid(bits, sign != "asymmetric", strategy, size, dtype, signed=sign == "signed")


GRIDS = [
    make_grid(3, sign, strategy, dtype)
    for (sign, strategy), dtype in zip(
        itertools.product(SIGNS, STRATEGIES), itertools.cycle(DTYPES), strict=False
    )
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight with an outlier and a dead group."""
    weight = draw(rows, columns, seed=seed) * 0.1
    weight[0, 0] *= 8
    weight[-1, -4:] = 0.0
    return weight


def start(weight: Tensor, grid: Grid, choice: RoundingChoice, seed: int = 0) -> Rounding:
    """From a scale that lets some codes saturate."""
    limit = 0.7 * grouped(weight, grid).abs().amax(-1).clamp(min=1e-3)
    return start_rounding(weight, rtn(weight, grid, limit=limit), choice, seed=seed)


def trained(
    state: Rounding, seed: int = 0, factors: tuple[str, ...] = (), size: float = 1.0
) -> Rounding:
    """The state after some training: every parameter is anywhere near, padding of B included."""
    spread = {"step": 0.05, "low": 2.0, "high": 2.0, "expansion": 0.03, "square": 0.03}
    for number, (name, parameter) in enumerate(sorted(state.parameters.items())):
        noise = draw(*parameter.shape, seed=seed * 31 + number)
        parameter.add_(noise * spread.get(name, 0.7) * size)
    rows, columns = state.weight.shape
    if "rows" in factors:
        state.rows = (draw(rows, seed=seed + 1) * 0.3).exp()
    if "columns" in factors:
        state.columns = (draw(columns, seed=seed + 2) * 0.3).exp()
    return state


def wide(per_group: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """[N', G] -> the shape of the weight."""
    return per_group.unsqueeze(-1).expand(grouped(like, grid).shape).reshape(like.shape)


# -- forward and gradients, by definition ---------------------------------------------------------


def slow_inner(choice: ExpansionChoice, leaves: dict[str, Tensor], r: int) -> Tensor:
    """B [r, r], entry by entry."""
    p, b = leaves["expansion"], choice.width
    found = torch.zeros(r, r, dtype=p.dtype)
    for i, j in itertools.product(range(r), range(r)):
        if choice.kind == "full":
            found[i, j] = p[i, j]
        elif choice.kind == "blocks" and i // b == j // b:
            found[i, j] = p[i // b, i % b, j % b]
        elif choice.kind == "band" and abs(i - j) <= b:
            found[i, j] = p[j - i + b, i]
        elif choice.kind in ("diagonal", "square") and i == j:
            found[i, j] = p[0, i]
        elif choice.kind == "square" and i < b and j < b:
            found[i, j] = leaves["square"][i, j]
    return found


def slow_moved(state: Rounding, leaves: dict[str, Tensor]) -> Tensor:
    moved = state.weight.double()
    if state.choice.expansion is not None:
        assert state.basis is not None
        inner = slow_inner(state.choice.expansion, leaves, state.basis.s.numel())
        moved = moved + state.basis.u.double() @ inner.double() @ state.basis.vt.double()
    if "rows" in leaves:
        moved = leaves["rows"].double().unsqueeze(1) * moved
    if "columns" in leaves:
        moved = moved * leaves["columns"].double()
    return moved


def slow_grid(state: Rounding, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Steps, straight through their rounding to the stored dtype, and zero points."""
    grid = state.grid
    info = torch.finfo(grid.scale_dtype)
    if state.choice.limits == "step":
        stored = state.scale * state.parameters["step"].exp()
        stored = stored.sign() * stored.abs().clamp(min=info.tiny, max=info.max)
        stored = stored.to(grid.scale_dtype).float()
        zero = torch.zeros_like(stored) if state.zero is None else state.zero
        return stored * (leaves["step"] - state.parameters["step"]).exp(), zero
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


def check(state: Rounding, seed: int) -> None:
    """Forward and every gradient equal those of the reference."""
    gradient = draw(*state.weight.shape, seed=seed + 9)
    leaves = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    for name in ("rows", "columns"):
        factor = getattr(state, name)
        if factor is not None:
            leaves[name] = factor.clone().requires_grad_()
    slow = slow_weight(state, leaves)
    torch.testing.assert_close(fake_weight(state, torch.float32), slow.detach(), rtol=1e-5, atol=0)
    (slow * gradient).sum().backward()  # type: ignore[no-untyped-call]
    given_ = gradient.clone()
    found = pull_back(state, gradient)
    assert torch.equal(gradient, given_)
    assert found.keys() == leaves.keys()
    for name, value in found.items():
        expected = leaves[name].grad
        assert expected is not None, name
        assert value.dtype == torch.float32
        size = max(1e-6, float(expected.abs().max()))
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * size, msg=name)


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
        check(state, seed)


@st.composite
def states(draw_: st.DrawFn) -> Rounding:
    """A state in training, of any size, bits, dtype of scales and combination."""
    bits, dtype = draw_(st.integers(2, 8)), draw_(st.sampled_from(DTYPES))
    grid = make_grid(bits, draw_(st.sampled_from(SIGNS)), draw_(st.sampled_from(STRATEGIES)), dtype)
    rows, columns, seed = draw_(st.integers(4, 9)), 4 * draw_(st.integers(1, 3)), draw_(SEEDS)
    expansion = draw_(st.sampled_from(EXPANSIONS))
    if expansion is not None and expansion.rank is not None:
        expansion = replace(expansion, rank=draw_(st.integers(1, min(rows, columns))))
    choice = RoundingChoice(
        parameter=draw_(st.sampled_from(PARAMETERS)),
        limits=draw_(st.sampled_from(LIMITS)),
        expansion=expansion,
    )
    state = start(matrix(rows, columns, seed), grid, choice, seed)
    return trained(state, seed, draw_(st.sampled_from(FACTORS)))


@settings(deadline=None, max_examples=60)
@given(states(), SEEDS)
def test_gradients_of_any_state(state: Rounding, seed: int) -> None:
    check(state, seed)


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


# -- folded or not, the integers are the same -----------------------------------------------------


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


# -- ranges ---------------------------------------------------------------------------------------


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


# -- a moved weight is made once, and made anew ---------------------------------------------------


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


# -- what goes together ---------------------------------------------------------------------------


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
