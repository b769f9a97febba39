"""GPTQ against a slow float64 elimination loop, and the laws it must keep."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.grid import Grid, QTensor
from crossbit.solvers.gptq import (
    GPTQResult,
    ScaleFit,
    _move_codes,
    _move_scale,
    gptq,
    gptq_many,
)
from crossbit.solvers.hessian import output_error
from crossbit.solvers.rtn import fit_scale, rtn


def problem(rows: int, columns: int, seed: int = 0, count: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the mean x x^T of correlated inputs with an outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = noise @ mixing + 0.2 * noise
    x[:, columns // 3] *= 10
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return weight, x.T @ x / count


def textbook(
    weight: Tensor, hessian: Tensor, grid: Grid, act_order: bool, clip: ScaleFit, damp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Column by column in float64: round one, move the rest to the optimum, eliminate it from H^-1.

    Optimal Brain Surgeon's update, without Cholesky factors and blocks. Returns codes, scales
    and, as a measure of ties, the distance of every quotient to the nearest rounding border.
    """
    rows, columns = weight.shape
    width = columns // grid.groups(columns) if grid.strategy == "group" else columns
    h = hessian.double() + torch.eye(columns, dtype=torch.float64) * damp * hessian.diag().mean()
    order = torch.argsort(hessian.diag(), descending=True, stable=True) if act_order else None
    visit = list(range(columns)) if order is None else order.tolist()
    inverse = torch.linalg.inv(h)
    # 1 / U_jj^2 is 1 / [H^-1]_jj after the columns visited before j were eliminated.
    losses, copy = torch.empty(columns), inverse.clone()
    for j in visit:
        losses[j] = 1 / copy[j, j]
        copy -= torch.outer(copy[:, j], copy[j]) / copy[j, j]
    importance = losses if clip == "hessian" else None
    search = "none" if clip == "none" else "mse"
    work = weight.double().clone()
    scale, zero = fit_scale(weight, grid, clip=search, importance=importance)  # type: ignore[arg-type]
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    border = torch.ones(rows, columns, dtype=torch.float64)
    for j in visit:
        group = j // width
        if not act_order and j % width == 0:
            fitted = fit_scale(work.float(), grid, clip=search, importance=importance)  # type: ignore[arg-type]
            scale[:, group] = fitted[0][:, group]
            if zero is not None and fitted[1] is not None:
                zero[:, group] = fitted[1][:, group]
        s = scale[:, group].double()
        z = torch.zeros(rows, dtype=torch.float64) if zero is None else zero[:, group].double()
        quotient = work[:, j] / s
        code = (quotient.round() + z).clamp(grid.qmin, grid.qmax)
        border[:, j] = (quotient - quotient.floor() - 0.5).abs()
        codes[:, j] = code.to(torch.int8)
        error = (work[:, j] - (code - z) * s) / inverse[j, j]
        work -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0.0
    return codes, scale, border


KINDS = st.sampled_from(["symmetric", "signed", "asymmetric"])


def of_kind(
    kind: str, bits: int, strategy: str, size: int | None, dtype: torch.dtype = torch.bfloat16
) -> Grid:
    symmetric, signed = kind != "asymmetric", kind == "signed"
    return Grid(bits, symmetric, strategy, size, dtype, signed=signed)  # type: ignore[arg-type]


def plain(weight: Tensor, hessian: Tensor, grid: Grid, **options: object) -> GPTQResult:
    settings_: dict[str, object] = {"damping": "mean", "damp": 0.01, "clip": "none", "refine": 0}
    return gptq(weight, hessian, grid, **(settings_ | options))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    kind=KINDS,
    act_order=st.booleans(),
    per_group=st.booleans(),
    block=st.sampled_from([1, 3, 8, 128]),
    clip=st.sampled_from(["none", "mse", "hessian"]),
    seed=st.integers(0, 99),
)
def test_codes_equal_the_slow_loop_except_at_ties(
    rows: int,
    groups: int,
    bits: int,
    kind: str,
    act_order: bool,
    per_group: bool,
    block: int,
    clip: ScaleFit,
    seed: int,
) -> None:
    weight, hessian = problem(rows, 8 * groups, seed)
    size = 8 if per_group else None
    grid = of_kind(kind, bits, "group" if per_group else "channel", size, torch.float32)
    result = plain(weight, hessian, grid, act_order=act_order, clip=clip, block_size=block)
    wanted, scale, border = textbook(weight, hessian, grid, act_order, clip, 0.01)
    for row in range(rows):
        same = torch.equal(result.qtensor.codes[row], wanted[row])
        # A searched scale may fall on either of two candidates that are equal up to rounding.
        other_scale = clip != "none" and not torch.allclose(
            result.qtensor.scale[row], scale[row], rtol=1e-4
        )
        assert same or float(border[row].min()) < 1e-3 or other_scale


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kind", ["symmetric", "signed", "asymmetric"])
def test_searched_scales_agree_with_the_slow_loop(
    clip: ScaleFit, act_order: bool, kind: str
) -> None:
    weight, hessian = problem(24, 64, 1)
    grid = of_kind(kind, 4, "group", 16, torch.bfloat16)
    result = plain(weight, hessian, grid, act_order=act_order, clip=clip)
    wanted, _, _ = textbook(weight, hessian, grid, act_order, clip, 0.01)
    rows_equal = (result.qtensor.codes == wanted).all(1).float().mean()
    assert float(rows_equal) >= 0.9


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
def test_output_error_is_far_below_rounding_on_correlated_inputs(
    act_order: bool, refine: int, clip: ScaleFit
) -> None:
    weight, hessian = problem(32, 96, 2)
    grid = Grid(4, True, "group", 32)
    result = gptq(weight, hessian, grid, act_order=act_order, refine=refine, clip=clip)
    nearest = output_error(weight, rtn(weight, grid).dequantize(), hessian)
    assert result.error < 0.7 * nearest
    assert result.error == pytest.approx(
        output_error(weight, result.qtensor.dequantize(), hessian), rel=1e-6
    )
    assert result.relative_error == pytest.approx(
        result.error / output_error(weight, torch.zeros_like(weight), hessian), rel=1e-5
    )


def test_defaults_beat_the_textbook() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4000, 128, generator=generator)
    x = noise @ torch.randn(128, 128, generator=generator) / 128**0.5 + 0.2 * noise
    x[:, 40] *= 10
    weight = torch.randn(48, 128, generator=generator)
    hessian, unseen = x[:2000].T @ x[:2000] / 2000, x[2000:].T @ x[2000:] / 2000
    grid = Grid(4, True, "group", 32)
    ordered = plain(weight, hessian, grid, act_order=True)
    ours = gptq(weight, hessian, grid)
    assert ours.error < 0.9 * ordered.error
    held_out = output_error(weight, ours.qtensor.dequantize(), unseen)
    assert held_out < 0.9 * output_error(weight, ordered.qtensor.dequantize(), unseen)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_diagonal_hessian_is_round_to_nearest(
    act_order: bool, symmetric: bool, clip: ScaleFit
) -> None:
    weight, hessian = problem(9, 48, 4)
    grid = Grid(3, symmetric, "group", 16)
    result = gptq(
        weight, torch.diag(hessian.diag()), grid, act_order=act_order, clip=clip, refine=0
    )
    nearest = rtn(weight, grid, clip)  # type: ignore[arg-type]
    assert torch.equal(result.qtensor.codes, nearest.codes)
    assert torch.equal(result.qtensor.scale, nearest.scale)
    if nearest.zero_point is not None and result.qtensor.zero_point is not None:
        assert torch.equal(result.qtensor.zero_point, nearest.zero_point)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_blocks_and_row_chunks_do_not_change_the_result(
    act_order: bool, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(12, 64, 5)
    grid = Grid(4, False, "group", 16) if strategy == "group" else Grid(4, False, strategy)  # type: ignore[arg-type]
    whole = gptq(weight, hessian, grid, act_order=act_order, block_size=64)
    columns = gptq(weight, hessian, grid, act_order=act_order, block_size=5)
    monkeypatch.setattr("crossbit.solvers.gptq.ROWS", 5)
    chunks = gptq(weight, hessian, grid, act_order=act_order, block_size=64)
    for other in (columns, chunks):
        assert float((whole.qtensor.codes == other.qtensor.codes).float().mean()) > 0.99
        assert other.error == pytest.approx(whole.error, rel=2e-2)
        assert other.qtensor.scale.shape == whole.qtensor.scale.shape


def test_act_order_is_the_plain_order_of_permuted_columns() -> None:
    weight, hessian = problem(10, 40, 6)
    order = torch.argsort(hessian.diag(), descending=True, stable=True)
    assert not torch.equal(order, torch.arange(40))
    grid = Grid(4, True, "channel", None, torch.float32)
    ordered = plain(weight, hessian, grid, act_order=True)
    permuted = plain(weight[:, order], hessian[order][:, order], grid, act_order=False)
    assert torch.equal(ordered.qtensor.codes[:, order], permuted.qtensor.codes)


@settings(deadline=None, max_examples=12)
@given(
    bits=st.integers(2, 6),
    kind=KINDS,
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_refinement_never_raises_the_error_and_stays_on_the_grid(
    bits: int, kind: str, strategy: str, dtype: torch.dtype, seed: int
) -> None:
    weight, hessian = problem(5, 48, seed)
    grid = of_kind(kind, bits, strategy, 16 if strategy == "group" else None, dtype)
    hessian += 1e-3 * torch.diag(hessian.diag())  # well conditioned, so that no damping is needed
    # With no damping, what is minimised is the error itself.
    errors = []
    for sweeps in (0, 1, 2, 5):
        result = gptq(weight, hessian, grid, damp=0.0, refine=sweeps, block_size=11)
        assert result.damp_used == 0.0
        assert result.qtensor.scale.dtype == dtype
        assert ((result.qtensor.scale != 0) if grid.signed else result.qtensor.scale > 0).all()
        assert int(result.qtensor.codes.min()) >= grid.qmin
        assert int(result.qtensor.codes.max()) <= grid.qmax
        errors.append(result.error)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_scales_lower_the_output_error(bits: int) -> None:
    weight, hessian = problem(64, 64, 13)
    weight[:, 7] = 0.4  # the largest of its group in every row, and positive
    grid = Grid(bits, True, "group", 16)
    unsigned, signed = (gptq(weight, hessian, g) for g in (grid, replace(grid, signed=True)))
    assert bool((signed.qtensor.scale < 0).any())
    assert signed.error < 0.95 * unsigned.error


@pytest.mark.parametrize("refine", [0, 2])
def test_a_weight_turned_over_is_solved_alike(refine: int) -> None:
    weight, hessian = problem(16, 64, 14)
    grid = Grid(3, True, "group", 16, signed=True)
    one, other = (gptq(w, hessian, grid, refine=refine).qtensor for w in (weight, -weight))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, -other.scale)
    assert 0.2 < float((one.scale < 0).float().mean()) < 0.8


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_steps_of_the_refinement_report_the_moves_they_made(sign: float) -> None:
    weight, hessian = problem(6, 16, 12)
    grid = Grid(4, True, "channel", None, torch.float32)
    scale = weight.abs().amax(1) / 9 * sign
    values = (weight / scale[:, None]).round().clamp(-8, 7).T.contiguous()
    target, before = weight.T, (values * scale).double()
    pull = hessian @ (target - values * scale)
    moves = torch.zeros_like(pull)
    _move_scale(values, scale, pull, moves, hessian, torch.float32)
    after = (values * scale).double()
    assert torch.allclose(moves.double(), after - before, atol=1e-6)
    assert float(moves.abs().max()) > 0
    wanted = hessian.double() @ (target.double() - after)
    assert torch.allclose(pull.double(), wanted, atol=1e-5 * float(wanted.abs().max()))
    # The scale is at its minimum: the error does not depend on it to first order.
    slope = (values.double() * wanted).sum(0).abs()
    assert (slope < 1e-4 * (values.double() * wanted).abs().sum(0)).all()
    steps = _move_codes(
        values, scale, None, pull.clone(), hessian, torch.diagonal(hessian).tolist(), grid
    )
    assert torch.allclose(steps.double(), (values * scale).double() - after, atol=1e-6)
    assert float(steps.abs().max()) > 0


def test_after_many_sweeps_no_single_code_can_be_improved() -> None:
    weight, hessian = problem(4, 32, 7)
    grid = Grid(3, True, "group", 8, torch.float32)
    q = gptq(weight, hessian, grid, damp=0.0, refine=60).qtensor
    scale = q.scale.double().repeat_interleave(8, dim=1)
    difference = weight.double() - q.codes.double() * scale
    gradient = difference @ hessian.double()
    for step in (-1, 1):
        moved = q.codes.double() + step
        allowed = (moved >= grid.qmin) & (moved <= grid.qmax)
        change = -2 * step * scale * gradient + (step * scale) ** 2 * hessian.double().diag()
        assert float(change[allowed].min()) > -1e-6 * float(change.abs().max())


@settings(deadline=None, max_examples=30)
@given(
    columns=st.integers(1, 24),
    count=st.integers(0, 3),
    act_order=st.booleans(),
    seed=st.integers(0, 99),
    spread=st.sampled_from([1.0, 1e6]),
)
def test_singular_hessians_never_fail(
    columns: int, count: int, act_order: bool, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) * spread
    weight = torch.randn(3, columns, generator=generator)
    result = gptq(weight, x.T @ x, Grid(4, True, "channel"), act_order=act_order, damp=0.0)
    assert torch.isfinite(result.qtensor.dequantize()).all()
    assert result.damp_used >= 0
    if count == 0:
        assert result.dead.numel() == columns
        assert torch.equal(result.qtensor.codes, gptq_of_identity(weight).codes)


def gptq_of_identity(weight: Tensor) -> QTensor:
    return gptq(weight, torch.eye(weight.shape[1]), Grid(4, True, "channel"), damp=0.0).qtensor


def test_an_indefinite_hessian_falls_back_to_rounding() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    hopeless = torch.full((3, 3), 1e15)
    hopeless.fill_diagonal_(4.0)
    grid = Grid(4, True, "channel")
    result = gptq(weight, hopeless, grid, clip="none")
    assert result.damp_used == math.inf
    assert torch.equal(result.qtensor.codes, rtn(weight, grid).codes)


def test_dead_columns_are_rounded_to_nearest_and_reported() -> None:
    weight, hessian = problem(6, 32, 8)
    hessian[[3, 20], :] = 0.0
    hessian[:, [3, 20]] = 0.0
    result = plain(weight, hessian, Grid(4, True, "channel"), act_order=True)
    assert result.dead.tolist() == [3, 20]
    q = result.qtensor
    wanted = (weight / q.scale.float()).round().clamp(-8, 7).to(torch.int8)
    assert torch.equal(q.codes[:, [3, 20]], wanted[:, [3, 20]])


@pytest.mark.parametrize("strategy", ["tensor", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_share_inputs_are_solved_as_if_alone(strategy: str, symmetric: bool) -> None:
    weight, hessian = problem(15, 32, 9)
    grid = Grid(4, symmetric, "group", 16) if strategy == "group" else Grid(4, symmetric, "tensor")
    parts = list(torch.split(weight, [4, 1, 10]))
    for part, joint in zip(parts, gptq_many(parts, hessian, grid), strict=True):
        alone = gptq(part, hessian, grid)
        assert joint.qtensor.codes.shape == part.shape
        assert joint.qtensor.scale.shape == alone.qtensor.scale.shape
        assert float((joint.qtensor.codes == alone.qtensor.codes).float().mean()) > 0.98
        assert joint.error == pytest.approx(alone.error, rel=5e-2)
        assert joint.relative_error == pytest.approx(alone.relative_error, rel=5e-2)


def test_same_input_same_bytes() -> None:
    weight, hessian = problem(20, 64, 10)
    first, second = (gptq(weight, hessian, Grid(4, True, "group", 32)) for _ in range(2))
    assert torch.equal(first.qtensor.codes, second.qtensor.codes)
    assert torch.equal(first.qtensor.scale, second.qtensor.scale)


def test_input_is_left_alone_and_bad_input_refused() -> None:
    weight, hessian = problem(4, 16, 11)
    before = weight.clone(), hessian.clone()
    grid = Grid(4, True, "group", 8)
    gptq(weight, hessian, grid)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    with pytest.raises(WorkError, match="not finite"):
        gptq(weight, hessian * math.nan, grid)
    with pytest.raises(WorkError, match="not finite"):
        gptq(weight * math.inf, hessian, grid)
    with pytest.raises(InputError, match="does not go with"):
        gptq(weight, torch.eye(8), grid)
    with pytest.raises(InputError, match="does not divide"):
        gptq(weight, hessian, Grid(4, True, "group", 5))
    for wrong in ({"clip": "x"}, {"block_size": 0}, {"damp": -1.0}, {"refine": -1}):
        with pytest.raises(InputError):
            gptq(weight, hessian, grid, **wrong)
    with pytest.raises(InputError):
        gptq_many([], hessian, grid)
    with pytest.raises(InputError):
        gptq_many([weight, weight[:, :8]], hessian, grid)
