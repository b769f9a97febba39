"""Activation quantizers against definitions written out element by element, and their laws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.activations.grid import ActivationGrid, ActivationKind
from crossbit.activations.quantize import (
    TINY,
    column_maximum,
    cross_step,
    fake_quantize_activation,
    per_token_codes,
    rescaled_step,
    row_scale,
)
from crossbit.errors import InputError

KINDS: tuple[ActivationKind, ...] = (
    "per_token",
    "per_token_clip",
    "per_tensor_static",
    "cross_dynamic",
    "cross_static",
    "cross_static_clip",
)
STATIC_KINDS = [k for k in KINDS if k != "cross_dynamic"]
CROSS_KINDS = [k for k in KINDS if k.startswith("cross")]


def activations(
    seed: int, tokens: int = 21, channels: int = 19, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal values, an outlier channel, a massive token, a dead channel and a row of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=g)
    x[:, 3] *= 40
    x[0, 5] = 3000.0
    x[:, 7] = 0
    x[tokens // 2] = 0
    return x.to(dtype)


def calibrated(seed: int, channels: int = 19) -> Tensor:
    """Column maxima of another text: some of them too small, one of them 0."""
    columns = column_maximum(activations(seed + 1000, channels=channels)).flatten()
    columns[2] *= 0.01
    return columns


def fake(x: Tensor, grid: ActivationGrid, columns: Tensor | None = None) -> Tensor:
    step = torch.tensor(0.05) if grid.kind == "per_tensor_static" else None
    return fake_quantize_activation(x, grid, static_scale=step, columns=columns)


def reference_steps(
    x: Tensor, grid: ActivationGrid, columns: Tensor | None = None
) -> list[list[float]]:
    """The definitions in Python's float64, one element at a time."""
    values = x.double().abs().tolist()
    d, a = grid.effective_divisor, grid.alpha
    if grid.kind == "cross_dynamic":
        c = [max(row[j] for row in values) for j in range(x.shape[1])]
    else:
        c = [] if columns is None else columns.double().tolist()
    steps = []
    for row in values:
        if grid.kind.startswith("per_token"):
            steps.append([max(row) / d] * len(row))
        elif grid.kind == "cross_static":
            f = [m ** (1 - a) for m in c]
            scale = max(
                v / w if w else (math.inf if v else 0.0) for v, w in zip(row, f, strict=True)
            )
            steps.append([scale * w / d for w in f])
        else:
            steps.append([max(row) ** a * m ** (1 - a) / d for m in c])
    return steps


# -- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "low", "high", "divisor"), [(8, -128, 127, 127.5), (4, -8, 7, 7.5)]
)
def test_grid_is_that_of_the_exports_readers(
    bits: int, low: int, high: int, divisor: float
) -> None:
    grid = ActivationGrid(bits)
    assert (grid.qmin, grid.qmax, grid.effective_divisor) == (low, high, divisor)
    assert ActivationGrid(bits, divisor=high).effective_divisor == high


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_runtime_executes_is_research(kind: ActivationKind) -> None:
    research = kind.startswith("cross") or kind == "per_token_clip"
    assert ActivationGrid(kind=kind).research == research


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_outside_the_range_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"activation bits: {bits} is outside 2\.\.8"):
        ActivationGrid(bits)


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan])
def test_alpha_outside_the_range_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        ActivationGrid(alpha=alpha)


# -- values --------------------------------------------------------------------------------------


@given(
    data=st.data(),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    exponent=st.integers(-20, 20),
)
@settings(deadline=None, max_examples=60)
def test_per_token_equals_a_slow_loop_exactly(
    data: st.DataObject, bits: int, exponent: int
) -> None:
    """Rows whose step is a power of two: every float32 operation is exact, ties included."""
    q = 2 ** (bits - 1) - 1
    quarters = data.draw(
        st.lists(
            st.lists(st.integers(-4 * q, 4 * q), min_size=5, max_size=5), min_size=1, max_size=4
        )
    )
    for row in quarters:
        row[0] = data.draw(st.sampled_from([-4 * q, 4 * q]))
    step = 2.0**exponent
    x = torch.tensor(quarters, dtype=torch.float64) * step / 4
    expected = [[round(v / 4) * step for v in row] for row in quarters]  # half to even, as torch
    got = fake(x.float(), ActivationGrid(bits, divisor=q))
    assert got.tolist() == expected


@pytest.mark.parametrize("divisor", [None, 127.0, 7.0])
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 0.85])
@pytest.mark.parametrize("kind", ["per_token", *CROSS_KINDS])
@pytest.mark.parametrize("bits", [8, 4])
def test_values_follow_the_definition(
    kind: ActivationKind, bits: int, alpha: float, divisor: float | None
) -> None:
    x, columns = activations(1), calibrated(1).clamp(min=1e-3)
    grid = ActivationGrid(bits, kind, divisor, alpha)
    got = fake(x, grid, columns).double()
    checked = 0
    for i, steps in enumerate(reference_steps(x, grid, columns)):
        for j, step in enumerate(steps):
            value = float(x[i, j])
            if value == 0 or step == 0:
                assert float(got[i, j]) == 0
                continue
            position = value / step
            if abs(position - math.floor(position) - 0.5) < 1e-4:
                continue  # so near a tie that float32 may round it either way
            code = min(max(round(position), grid.qmin), grid.qmax)
            assert float(got[i, j]) == pytest.approx(code * step, rel=1e-5, abs=1e-30)
            checked += 1
    assert checked > 300


@pytest.mark.parametrize("kind", CROSS_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_alpha_one_is_per_token_bit_for_bit(
    kind: ActivationKind, bits: int, dtype: torch.dtype
) -> None:
    x = activations(2, dtype=dtype)
    for divisor in (None, 2 ** (bits - 1) - 1):
        plain = ActivationGrid(bits, "per_token", divisor)
        cross = fake(x, replace(plain, kind=kind, alpha=1.0), calibrated(2))
        assert torch.equal(cross, fake(x, plain))


def test_per_tensor_static_uses_one_step_and_saturates() -> None:
    x = torch.tensor([[0.024, 0.026, -0.075, 6.0, -9.0]])
    got = fake(x, ActivationGrid(8, "per_tensor_static"))
    expected = torch.tensor([[0, 1, -2, 120, -128]]) * 0.05
    # -0.075 / 0.05 is just above or below -1.5 in float32: both neighbours are right.
    assert torch.equal(got[0, [0, 1, 3]], expected[0, [0, 1, 3]])
    assert float(got[0, 4]) == float(expected[0, 4])
    assert float(got[0, 2]) in (pytest.approx(-0.1), pytest.approx(-0.05))


@pytest.mark.parametrize("kind", KINDS)
def test_result_has_the_inputs_dtype_and_shape(kind: ActivationKind) -> None:
    x = activations(3, dtype=torch.bfloat16).reshape(3, 7, 19)
    got = fake(x, ActivationGrid(8, kind, alpha=0.3), calibrated(3))
    assert got.dtype == torch.bfloat16
    assert got.shape == x.shape


# -- laws ----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    alpha=st.floats(0.0, 1.0),
    bits=st.integers(2, 8),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(deadline=None, max_examples=60)
def test_dynamic_never_clips(seed: int, alpha: float, bits: int, scale: float) -> None:
    x = activations(seed, 9, 8) * scale
    grid = ActivationGrid(bits, "cross_dynamic", 2 ** (bits - 1) - 1, alpha)
    step = cross_step(x, column_maximum(x), grid)
    assert float((x.abs() / step).max()) <= grid.qmax * (1 + 1e-5)
    error = (fake(x, grid) - x).abs()
    assert bool((error <= step / 2 * (1 + 1e-3)).all())


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.1, 1.0), bits=st.integers(2, 8))
@settings(deadline=None, max_examples=60)
def test_rescaled_rows_never_clip_whatever_was_calibrated(
    seed: int, alpha: float, bits: int
) -> None:
    x = activations(seed, 9, 8)
    g = torch.Generator().manual_seed(seed)
    columns = torch.rand(8, generator=g) * torch.tensor([1e-3, 1e-2, 1, 1, 1, 1, 1, 1e3])
    grid = ActivationGrid(bits, "cross_static", 2 ** (bits - 1) - 1, alpha)
    step = rescaled_step(x, columns, grid)
    ratio = (x.abs() / step).amax(1)
    used = x.abs().amax(1) > 0
    assert torch.allclose(ratio[used], torch.full_like(ratio[used], grid.qmax), rtol=1e-4)
    error = (fake(x, grid, columns) - x).abs()
    assert bool((error <= step / 2 * (1 + 1e-3)).all())


def test_clipping_saturates_above_the_calibrated_maximum() -> None:
    x = torch.tensor([[1.0, 8.0, 0.5]])
    columns = torch.tensor([1.0, 1.0, 1.0])
    clip = ActivationGrid(8, "cross_static_clip", 127, 0.5)
    # Step sqrt(8) / 127: what exceeds sqrt(8) ends there; the rescaled row reaches 8.
    assert float(fake(x, clip, columns)[0, 1]) == pytest.approx(math.sqrt(8), rel=1e-6)
    rescaled = replace(clip, kind="cross_static")
    assert float(fake(x, rescaled, columns)[0, 1]) == pytest.approx(8.0, rel=1e-6)


def test_dynamic_windows_do_not_mix_and_are_not_causal() -> None:
    a, b = activations(4), activations(5)
    grid = ActivationGrid(4, "cross_dynamic", alpha=0.15)
    both = fake(torch.stack((a, b)), grid)
    assert torch.equal(both[0], fake(a, grid))
    assert torch.equal(both[1], fake(b, grid))
    # The label "not causal" is deserved: a later token changes an earlier one.
    assert not torch.equal(fake(a[:10], grid), fake(a, grid)[:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STATIC_KINDS)
def test_static_results_do_not_depend_on_batch_or_chunks(
    kind: ActivationKind, dtype: torch.dtype
) -> None:
    a, b = activations(6, dtype=dtype), activations(7, dtype=dtype)
    grid, columns = ActivationGrid(8, kind, alpha=0.15), calibrated(6)
    whole = fake(torch.stack((a, b)), grid, columns)
    assert torch.equal(whole[0], fake(a, grid, columns))  # batch neighbours
    pieces = [fake(part, grid, columns) for part in (a[:1], a[1:5], a[5:])]
    assert torch.equal(torch.cat(pieces), whole[0])  # chunked prefill
    decoded = [fake(a[i : i + 1].unsqueeze(0), grid, columns)[0] for i in range(len(a))]
    assert torch.equal(torch.cat(decoded), whole[0])  # token by token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("divisor", [None, 127.0])
def test_integer_codes_equal_the_fake_path(
    dtype: torch.dtype, bits: int, divisor: float | None
) -> None:
    # More elements than one chunk holds.
    x = activations(8, tokens=700, channels=600, dtype=dtype)
    grid = ActivationGrid(bits, divisor=divisor)
    codes, scale = per_token_codes(x, grid, torch.int8)
    assert codes.dtype == torch.int8
    assert (int(codes.min()), int(codes.max())) >= (grid.qmin, 0)
    assert torch.equal(scale, row_scale(x, grid))
    assert torch.equal((codes.float() * scale).to(dtype), fake(x, grid))
    floats, _ = per_token_codes(x, grid, torch.float32)
    assert torch.equal(floats, codes.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_leave_their_input_alone(dtype: torch.dtype) -> None:
    x = activations(9, dtype=dtype)
    before = x.clone()
    per_token_codes(x, ActivationGrid(), torch.int8)
    for kind in KINDS:
        fake(x, ActivationGrid(kind=kind, alpha=0.5), calibrated(9))
    assert torch.equal(x, before)


# -- degenerate input ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_and_dead_channels_give_zeros(kind: ActivationKind, alpha: float) -> None:
    """A row of zeros on a channel calibrated as dead: the step underflowed to 0 / 0."""
    x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, -1.0]])
    columns = torch.tensor([2.0, 0.0, TINY])
    for columns_ in (columns, torch.zeros(3)):
        got = fake(x, ActivationGrid(8, kind, alpha=alpha), columns_)
        assert bool(got.isfinite().all())
        assert got[0].tolist() == [0, 0, 0]
        assert float(got[1, 1]) == 0
    if kind in ("per_token", "cross_dynamic"):
        assert got[1, [0, 2]].tolist() == pytest.approx([2.0, -1.0], rel=0.01)


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per_token", "cross_dynamic", "cross_static"])
def test_straight_through_gradient_is_the_identity_where_nothing_clips(
    kind: ActivationKind,
) -> None:
    x = activations(10).requires_grad_()
    grid = ActivationGrid(8, kind, 127, alpha=0.4)
    columns = calibrated(10).clamp(min=1e-3)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((fake(x, grid, columns) * weights).sum(), x)
    # The one element a row (and column) that lands on the last code may round past it by one ulp.
    inside = (x.detach().abs() < 0.999 * step_of(x.detach(), grid, columns) * 127) | (x == 0)
    assert int(inside.sum()) > 0.8 * x.numel()
    assert torch.allclose(gradient[inside], weights[inside], rtol=1e-5)


def step_of(x: Tensor, grid: ActivationGrid, columns: Tensor) -> Tensor:
    if grid.kind == "per_token":
        return row_scale(x, grid).expand(x.shape)
    if grid.kind == "cross_dynamic":
        return cross_step(x, column_maximum(x), grid)
    return rescaled_step(x, columns, grid)


def test_gradient_is_zero_where_the_code_saturates() -> None:
    x = torch.tensor([[0.5, 8.0, -9.0, 1.0]], requires_grad=True)
    grid = ActivationGrid(8, "cross_static_clip", 127, 0.0)
    (gradient,) = torch.autograd.grad(fake(x, grid, torch.ones(4)).sum(), x)
    assert gradient[0, :3].tolist() == [1.0, 0.0, 0.0]
