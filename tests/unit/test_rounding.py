"""Trained rounding against slow references: where it starts, its gradients, its integers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid, QTensor, grouped, quantize, round_ste
from crossbit.solvers.gptq import gptq
from crossbit.solvers.rounding import (
    FRACTION_MARGIN,
    GAMMA,
    REENTRY,
    ZETA,
    continuous_start,
    fake_weight,
    harden,
    limit,
    pull_back,
    reenter,
    regularisation,
    start_rounding,
)
from crossbit.solvers.rounding_state import Mode, Rounding, RoundingChoice, effective_scale
from crossbit.solvers.rtn import rtn

MODES: tuple[Mode, ...] = ("straight_through", "sigmoid")
CHOICES = [
    RoundingChoice(base, parameter, mode, rank=3, reach=0.5)  # type: ignore[arg-type]
    for base, parameter, mode in itertools.product(("frac", "zero"), ("full", "low_rank"), MODES)
]
NAMES = ["-".join((c.base, c.parameter, c.mode)) for c in CHOICES]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRIDS = [
    Grid(3, True, "tensor", None, torch.float32),
    Grid(4, False, "channel", None, torch.bfloat16),
    Grid(2, True, "group", 4, torch.float16),
    Grid(3, True, "group", 4, torch.bfloat16, signed=True),
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    """A weight [N, K] with an outlier and a dead group, and a grid for it."""
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    kind = draw(st.sampled_from(["symmetric", "signed", "asymmetric"]))
    grid = Grid(
        draw(st.integers(2, 8)),
        kind != "asymmetric",
        strategy,  # type: ignore[arg-type]
        4 if strategy == "group" else None,
        draw(st.sampled_from(DTYPES)),
        signed=kind == "signed",
    )
    return matrix(draw(st.integers(1, 5)), 4 * draw(st.integers(1, 4)), draw(SEEDS)), grid


SEEDS = st.integers(0, 999)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    weight[0, 0] *= 8
    weight[-1, -4:] = 0.0
    return weight


def moved(state: Rounding, seed: int = 0, size: float = 1.0) -> Rounding:
    """The state after some training: every parameter is anywhere near."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in state.parameters.items():
        spread = 0.05 if name == "step" else size
        parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return state


def wide(per_group: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """[N', G] -> the shape of the weight."""
    return per_group.unsqueeze(-1).expand(grouped(weight, grid).shape).reshape(weight.shape)


def zeros_of(state: Rounding) -> Tensor:
    return torch.zeros_like(state.scale) if state.zero is None else state.zero


# -- where training starts ------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(problems(), st.sampled_from(MODES), st.sampled_from(["full", "low_rank"]))
def test_untrained_it_is_round_to_nearest(
    problem: tuple[Tensor, Grid], mode: Mode, parameter: Any
) -> None:
    weight, grid = problem
    nearest = rtn(weight, grid)
    state = start_rounding(weight, nearest, RoundingChoice("frac", parameter, mode))
    ratio = weight / wide(nearest.scale.float(), weight, grid)
    hard = harden(state)
    assert torch.equal(hard.scale, nearest.scale)
    if mode == "straight_through":
        assert torch.equal(hard.codes, nearest.codes)
        assert torch.equal(fake_weight(state, torch.float32), nearest.dequantize())
        return
    tie = (ratio - ratio.floor() - 0.5).abs() < 1e-5  # nearest rounds half to even, h = 0.5 up
    assert torch.equal(hard.codes[~tie], nearest.codes[~tie])
    # Soft weights are the weights themselves, to the margin and where the grid reaches.
    on_grid = ratio + wide(zeros_of(state), weight, grid)
    inside = (on_grid >= grid.qmin) & (on_grid <= grid.qmax)
    step = wide(effective_scale(state), weight, grid)
    distance = (fake_weight(state, torch.float32) - weight).abs() / step.abs()
    assert bool((distance[inside] <= FRACTION_MARGIN + 1e-4).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_extremes_of_a_symmetric_grid_are_ties_that_go_to_their_code(bits: int) -> None:
    """max|w| / ((2^bits - 1) / 2) is the step: the extreme lies half way between two codes."""
    weight = torch.randn(256, 16, generator=torch.Generator().manual_seed(bits))
    nearest = rtn(weight, Grid(bits, True, "channel", None, torch.float32))
    state = start_rounding(weight, nearest, RoundingChoice(mode="sigmoid"))
    assert torch.equal(harden(state).codes, nearest.codes)


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(["full", "low_rank"]))
def test_without_the_fraction_everything_is_undecided_and_rounds_up(
    problem: tuple[Tensor, Grid], parameter: Any
) -> None:
    weight, grid = problem
    nearest = rtn(weight, grid)
    step = wide(nearest.scale.float(), weight, grid)
    soft = start_rounding(weight, nearest, RoundingChoice("zero", parameter, "sigmoid"))
    zero = wide(zeros_of(soft), weight, grid)
    floor = (weight / step).floor() + zero
    up = (floor + 1).clamp(grid.qmin, grid.qmax)
    half = ((floor + 0.5).clamp(grid.qmin, grid.qmax) - zero) * step
    torch.testing.assert_close(fake_weight(soft, torch.float32), half, rtol=1e-6, atol=0)
    assert regularisation(soft, 2.0) == pytest.approx(1.0, abs=1e-6)
    hard = start_rounding(weight, nearest, RoundingChoice("zero", parameter, "straight_through"))
    for state in (soft, hard):
        assert torch.equal(harden(state).codes, up.to(torch.int8))


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_a_weight_turned_over_trains_alike(choice: RoundingChoice) -> None:
    """On a signed grid -W has the codes of W, and the gradients at What change sign only."""
    weight = matrix(6, 8, 4)
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    states = [
        moved(start_rounding(w, rtn(w, GRIDS[3], "mse"), choice), 2) for w in (weight, -weight)
    ]
    # A dead group's scale is positive either way.
    for state in states:
        state.scale[-1, -1] = state.scale[0, 0]
    one, other = states
    assert bool((one.scale < 0).any())
    assert torch.equal(fake_weight(one, torch.float32), -fake_weight(other, torch.float32))
    assert torch.equal(harden(one).codes, harden(other).codes)
    assert torch.equal(harden(one).scale, -harden(other).scale)
    found, turned = pull_back(one, gradient), pull_back(other, -gradient)
    for name, value in found.items():
        torch.testing.assert_close(value, turned[name], rtol=1e-6, atol=1e-9)


def coordinate_optimum(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """The vertex of each element's parabola of the row's error, from three points, in float64."""
    best = torch.empty(weight.shape, dtype=torch.float64)
    for n, j in itertools.product(*map(range, weight.shape)):
        errors = []
        for delta in (-1.0, 0.0, 1.0):
            row = rounded[n].double()
            row[j] += delta
            difference = row - weight[n].double()
            errors.append(float(difference @ hessian.double() @ difference))
        low, middle, high = errors
        best[n, j] = (low - high) / (2 * (low - 2 * middle + high))
    return best


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_the_continuous_start_is_the_coordinate_optimum(grid: Grid) -> None:
    weight = matrix(4, 12, 3)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    x[:, 1:] += x[:, :-1]
    hessian = x.T @ x / 50
    tensor = grid.strategy == "tensor"
    qtensor = rtn(weight, grid) if tensor else gptq(weight, hessian, grid).qtensor
    start = continuous_start(weight, qtensor, hessian)
    step = wide(qtensor.scale.float(), weight, grid)
    best = coordinate_optimum(weight, qtensor.dequantize(), hessian) / step
    found = (start - qtensor.dequantize()) / step
    torch.testing.assert_close(found.double(), best.clamp(-0.499, 0.499), rtol=1e-3, atol=1e-3)
    assert float(found.std()) > 0.05


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(MODES), st.booleans())
def test_the_continuous_start_rounds_back(
    problem: tuple[Tensor, Grid], mode: Mode, dead: bool
) -> None:
    """Whatever the codes are, saturated ones and columns without input included."""
    weight, grid = problem
    columns = weight.shape[1]
    generator = torch.Generator().manual_seed(columns)
    nearest = rtn(weight, grid)
    codes = torch.randint(grid.qmin, grid.qmax + 1, weight.shape, generator=generator)
    qtensor = QTensor(codes.to(torch.int8), nearest.scale, nearest.zero_point, grid)
    x = torch.randn(2 * columns, columns, generator=generator)
    x[:, 0] *= 0.0 if dead else 1e4
    start = continuous_start(weight, qtensor, x.T @ x)
    assert bool(torch.isfinite(start).all())
    assert torch.equal(quantize(start, qtensor.scale, qtensor.zero_point, grid), qtensor.codes)
    state = start_rounding(start, qtensor, RoundingChoice(mode=mode))
    assert torch.equal(harden(state).codes, qtensor.codes)


def test_nothing_is_known_of_inputs_that_are_all_zero() -> None:
    qtensor = rtn(matrix(3, 8), GRIDS[1])
    start = continuous_start(matrix(3, 8), qtensor, torch.zeros(8, 8))
    assert torch.equal(start, qtensor.dequantize())


def test_low_rank_starts_at_zero_and_can_leave_it() -> None:
    weight = matrix(6, 8)
    choice = RoundingChoice(parameter="low_rank", rank=99)
    one, same, other = (
        start_rounding(weight, rtn(weight, GRIDS[1]), choice, seed=s).parameters for s in (0, 0, 1)
    )
    assert (one["a1"].shape, one["a2"].shape) == ((6, 6), (6, 8))
    assert torch.equal(one["a1"], same["a1"])
    assert not torch.equal(one["a1"], other["a1"])
    assert float(one["a2"].abs().max()) == 0.0
    assert float(one["a1"].abs().min()) > 0.0


# -- gradients ------------------------------------------------------------------------------------


def slow_weight(state: Rounding, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What and h, by autograd; the leaf "scale" stands for the stored steps."""
    weight, choice, grid = state.weight, state.choice, state.grid
    step = wide(leaves["scale"], weight, grid)
    zero = wide(zeros_of(state), weight, grid)
    offset = leaves["offset"] if choice.parameter == "full" else leaves["a1"] @ leaves["a2"]
    h = torch.zeros_like(weight)
    if choice.mode == "straight_through":
        if choice.parameter == "low_rank":
            offset = offset.clamp(-choice.reach, choice.reach)
        value = weight / step
        if choice.base == "frac":
            codes = round_ste(value + offset)
        else:
            codes = value + offset
            codes = codes + (value.floor() + (1.0 + offset).floor() - codes).detach()
    else:
        value = weight / wide(state.scale, weight, grid)
        start = torch.zeros_like(weight)
        if choice.base == "frac":
            fraction = (value - value.floor()).clamp(FRACTION_MARGIN, 1 - FRACTION_MARGIN)
            start = torch.logit((fraction - GAMMA) / (ZETA - GAMMA))
        h = (torch.sigmoid(start + offset) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        codes = value.floor() + h
    codes = (codes + zero).clamp(grid.qmin, grid.qmax) - zero
    return codes * step, h


@settings(deadline=None, max_examples=120)
@given(
    problems(),
    st.sampled_from(CHOICES),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([2.0, 3.5, 20.0]),
    SEEDS,
)
def test_gradients_are_those_of_autograd(
    problem: tuple[Tensor, Grid], choice: RoundingChoice, regulariser: float, beta: float, seed: int
) -> None:
    """With a saturated part, trained steps, offsets beyond the reach, and the regulariser."""
    weight, grid = problem
    clipped = rtn(weight, grid, limit=0.6 * grouped(weight, grid).abs().amax(-1).clamp(min=1e-3))
    state = moved(start_rounding(weight, clipped, choice, seed=seed), seed)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1))
    leaves = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    leaves["scale"] = effective_scale(state).requires_grad_()
    slow, h = slow_weight(state, leaves)
    torch.testing.assert_close(fake_weight(state, torch.float32), slow.detach(), rtol=1e-5, atol=0)
    loss = (slow * gradient).sum()
    if choice.mode == "sigmoid" and regulariser:
        loss = loss + regulariser * (1 - (2 * h - 1).abs().pow(beta)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    found = pull_back(state, gradient, regulariser=regulariser, beta=beta)
    assert found.keys() == state.parameters.keys()
    # What the steps' gradient is multiplied with to become that of their logarithm.
    step_gradient = leaves["scale"].grad
    assert step_gradient is not None
    wanted = {n: leaves[n].grad for n in found} | {"step": step_gradient * leaves["scale"].detach()}
    for name, value in found.items():
        expected = wanted[name]
        assert expected is not None
        size = max(1e-6, float(expected.abs().max()))
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * size, msg=name)


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_gradients_are_float32_and_the_given_one_stays(choice: RoundingChoice) -> None:
    weight = matrix(4, 8)
    state = moved(start_rounding(weight, rtn(weight, GRIDS[1]), choice))
    gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    given_ = gradient.clone()
    full, half = pull_back(state, gradient), pull_back(state, gradient.bfloat16())
    assert torch.equal(gradient, given_)
    assert all(torch.equal(half[n], full[n]) for n in full)
    assert {g.dtype for g in half.values()} == {torch.float32}


# -- steps and integers ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(-300, 300), SEEDS)
def test_trained_steps_are_what_is_stored(
    problem: tuple[Tensor, Grid], shift: float, seed: int
) -> None:
    weight, grid = problem
    nearest = rtn(weight, grid)
    state = moved(start_rounding(weight, nearest, RoundingChoice()), seed)
    state.parameters["step"][0, 0] = shift  # far beyond any training
    scale = effective_scale(state)
    assert torch.equal(scale, scale.to(grid.scale_dtype).float())
    assert torch.equal(scale.sign(), nearest.scale.sign().float())
    assert bool((scale != 0).all())
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(harden(state).scale.float(), scale)


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(CHOICES), st.sampled_from(DTYPES), SEEDS)
def test_what_is_trained_is_what_is_stored(
    problem: tuple[Tensor, Grid], choice: RoundingChoice, dtype: torch.dtype, seed: int
) -> None:
    weight, grid = problem
    state = moved(start_rounding(weight, rtn(weight, grid), choice), seed)
    before = {n: p.clone() for n, p in state.parameters.items()}
    hard = harden(state)
    assert hard.codes.dtype == torch.int8
    assert int(hard.codes.min()) >= grid.qmin
    assert int(hard.codes.max()) <= grid.qmax
    assert hard.scale.dtype == grid.scale_dtype
    assert (hard.zero_point is None) == grid.symmetric
    soft = fake_weight(state, dtype)
    if choice.mode == "straight_through":
        assert torch.equal(soft, hard.dequantize().to(dtype))
    else:
        step = wide(effective_scale(state), weight, grid).abs()
        assert bool(((soft.float() - hard.dequantize()).abs() <= 0.51 * step + 1e-2).all())
    assert torch.equal(state.weight, weight)
    assert all(torch.equal(before[n], p) for n, p in state.parameters.items())


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_chunks_do_not_matter(
    grid: Grid, choice: RoundingChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix(7, 8, 2)
    gradient = torch.randn(7, 8, generator=torch.Generator().manual_seed(4))

    def everything() -> list[Tensor]:
        state = moved(start_rounding(weight, rtn(weight, grid), choice), 5)
        gradients = pull_back(state, gradient, regulariser=0.1, beta=3.0)
        found = [fake_weight(state, torch.float32), harden(state).codes.float()]
        found += [gradients[n] for n in sorted(gradients)]
        found.append(torch.tensor(regularisation(state, 3.0)))
        reenter(state)
        return found + [p.clone() for p in state.parameters.values()]

    whole = everything()
    for size in (1, 17):
        monkeypatch.setattr("crossbit.solvers.rounding._CHUNK_ELEMENTS", size)
        for one, other in zip(whole, everything(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- the regulariser, windows that overlap --------------------------------------------------------


def test_the_regulariser_is_zero_where_everything_is_decided() -> None:
    weight = matrix(5, 8, 1)
    state = start_rounding(weight, rtn(weight, GRIDS[1]), RoundingChoice("zero", mode="sigmoid"))
    sign = torch.where(torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1)
    offset = state.parameters["offset"]
    offset.copy_(9 * sign)
    assert regularisation(state, 2.0) == regularisation(state, 20.0) == 0.0
    assert torch.equal(harden(state).dequantize(), fake_weight(state, torch.float32))
    offset[2, 3] = 1.0
    h = (ZETA - GAMMA) / (1 + math.exp(-1.0)) + GAMMA
    for beta in (2.0, 20.0):
        wanted = (1 - (2 * h - 1) ** beta) / 40
        assert regularisation(state, beta) == pytest.approx(wanted, rel=1e-5)
        assert wanted > 0


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(["frac", "zero"]), st.sampled_from([0.5, 10.0]), SEEDS)
def test_a_second_window_can_move_what_the_first_decided(
    problem: tuple[Tensor, Grid], base: Any, size: float, seed: int
) -> None:
    weight, grid = problem
    choice = RoundingChoice(base, "full", "sigmoid")
    state = moved(start_rounding(weight, rtn(weight, grid), choice), seed, size)
    codes = harden(state).codes
    reenter(state)
    assert torch.equal(harden(state).codes, codes)
    # V itself, from a base of zero that has the same offset.
    plain = start_rounding(weight, rtn(weight, grid), RoundingChoice("zero", "full", "sigmoid"))
    ratio = weight / wide(state.scale, weight, grid)
    fraction = (ratio - ratio.floor()).clamp(FRACTION_MARGIN, 1 - FRACTION_MARGIN)
    start = torch.logit((fraction - GAMMA) / (ZETA - GAMMA)) if base == "frac" else torch.zeros(())
    plain.parameters["offset"].copy_(start + state.parameters["offset"])
    assert float(plain.parameters["offset"].abs().max()) <= REENTRY + 1e-5
    again = {n: p.clone() for n, p in state.parameters.items()}
    reenter(state)
    torch.testing.assert_close(again, state.parameters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_limit_and_reentry_touch_their_own_parameters_alone(choice: RoundingChoice) -> None:
    weight = matrix(5, 8)
    state = moved(start_rounding(weight, rtn(weight, GRIDS[1]), choice), 1, 9.0)
    before = {n: p.clone() for n, p in state.parameters.items()}
    limit(state)
    full = choice.parameter == "full"
    if full and choice.mode == "straight_through":
        before["offset"] = before["offset"].clamp(-choice.reach, choice.reach)
    torch.testing.assert_close(state.parameters, before, rtol=0, atol=0)
    if not (full and choice.mode == "sigmoid"):
        reenter(state)
        torch.testing.assert_close(state.parameters, before, rtol=0, atol=0)


def test_beyond_the_reach_no_code_moves_further() -> None:
    weight = matrix(5, 8, 6)
    nearest = rtn(weight, Grid(8, True, "channel", None, torch.float32))
    for parameter in ("full", "low_rank"):
        choice = RoundingChoice(parameter=parameter, reach=0.5)
        state = moved(start_rounding(weight, nearest, choice), 2, 50.0)
        state.parameters["step"].zero_()
        limit(state)
        assert int((harden(state).codes.int() - nearest.codes.int()).abs().max()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0 .*use 1 or more"),
        ({"rank": -3}, "rank: -3"),
        ({"reach": 0.0}, "reach: 0.0 is not positive"),
        ({"reach": -1.0}, "reach: -1.0"),
        ({"reach": math.nan}, "reach: nan"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RoundingChoice(**options)
    assert "\n" not in str(caught.value)
