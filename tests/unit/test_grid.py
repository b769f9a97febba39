"""Number grids against slow scalar references in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import (
    Grid,
    QTensor,
    auto_group_size,
    dequantize,
    fake_quantize,
    fit_minmax,
    fit_range,
    group_sizes,
    grouped,
    quantize,
    round_ste,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
HALF_ULP = {FP32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-8}  # half the spacing, relative to 2^e
F32 = 2.0**-22  # slack for the float32 operations between the input and the code

grids = st.builds(
    lambda bits, kind, strategy, dtype: Grid(
        bits,
        kind != "asymmetric",
        strategy,
        4 if strategy == "group" else None,
        dtype,
        signed=kind == "signed",
    ),
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "signed", "asymmetric"]),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from(DTYPES),
)


@st.composite
def weights(draw: Any) -> Tensor:
    """[N, 4 G] of mixed magnitudes, now and then one-sided or with groups of zeros."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    weight = torch.randn(rows, 4 * groups, generator=generator)
    weight *= 10 ** draw(st.floats(-2, 3)) * torch.rand(rows, 1, generator=generator)
    kind = draw(st.sampled_from(["plain", "positive", "negative", "zeros"]))
    if kind == "positive":
        weight = weight.abs() + 0.1
    elif kind == "negative":
        weight = -weight.abs()
    elif kind == "zeros":
        weight[:, :4] = 0
    return weight


def members(weight: Tensor, grid: Grid) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Index of each scale, and the elements that it belongs to: written out, without a reshape."""
    rows, columns = weight.shape
    if grid.strategy == "tensor":
        yield (0, 0), [(i, j) for i in range(rows) for j in range(columns)]
        return
    size = grid.group_size or columns
    for i in range(rows):
        for g in range(columns // size):
            yield (i, g), [(i, j) for j in range(g * size, (g + 1) * size)]


@settings(deadline=None, max_examples=200)
@given(weight=weights(), grid=grids)
def test_scale_is_the_range_over_the_steps_rounded_once(weight: Tensor, grid: Grid) -> None:
    scale, zero = fit_minmax(weight, grid)
    assert scale.dtype == grid.scale_dtype
    assert grid.signed or bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert (zero is None) == grid.symmetric
    count = 0
    for index, elements in members(weight, grid):
        values = [float(weight[e]) for e in elements]
        low, high = min(*values, 0.0), max(*values, 0.0)
        steps = (1 << grid.bits) - 1
        exact = max(-low, high) / (steps / 2) if grid.symmetric else (high - low) / steps
        if grid.signed:
            exact = max(-low, high) / ((steps + 1) / 2)
        exact = max(exact, torch.finfo(grid.scale_dtype).tiny)
        exact = -exact if grid.signed and high > -low else exact
        assert float(scale[index]) == pytest.approx(exact, rel=HALF_ULP[grid.scale_dtype] + F32)
        if zero is not None:
            # Of the stored scale, so that real zero is a code exactly.
            ideal = -(1 << (grid.bits - 1)) - low / float(scale[index])
            ideal = min(max(ideal, grid.qmin), grid.qmax)
            assert abs(int(zero[index]) - ideal) <= 0.5 + 1e-4
        count += 1
    assert scale.numel() == count


@settings(deadline=None, max_examples=200)
@given(weight=weights(), grid=grids)
def test_codes_are_the_nearest_of_the_stored_scale(weight: Tensor, grid: Grid) -> None:
    scale, zero = fit_minmax(weight, grid)
    codes = quantize(weight, scale, zero, grid)
    values = dequantize(codes, scale, zero, grid)
    assert codes.dtype == torch.int8
    assert values.dtype == FP32
    for index, elements in members(weight, grid):
        step = Fraction(float(scale[index]))
        shift = 0 if zero is None else int(zero[index])
        for e in elements:
            value, code = Fraction(float(weight[e])), int(codes[e])
            assert grid.qmin <= code <= grid.qmax
            stored = step * (code - shift)
            assert float(values[e]) == pytest.approx(float(stored), rel=F32, abs=1e-37)
            position = value / step + shift
            slack = Fraction(F32) * (abs(position) + 256)
            if grid.qmin - Fraction(1, 2) <= position <= grid.qmax + Fraction(1, 2):
                assert abs(value - stored) <= abs(step) * (Fraction(1, 2) + slack)
            else:
                assert code == (grid.qmin if position < grid.qmin else grid.qmax)


@settings(deadline=None, max_examples=100)
@given(weight=weights(), bits=st.integers(2, 8), strategy=st.sampled_from(["channel", "tensor"]))
def test_min_max_clips_by_at_most_half_a_step(weight: Tensor, bits: int, strategy: Any) -> None:
    """With float32 scales every element lies inside; the largest ties between two codes."""
    for symmetric in (True, False):
        grid = Grid(bits, symmetric, strategy, None, FP32)
        scale, zero = fit_minmax(weight, grid)
        error = dequantize(quantize(weight, scale, zero, grid), scale, zero, grid) - weight
        largest = scale if strategy == "channel" else scale.expand(len(weight), 1)
        assert bool((error.abs() <= largest * (0.5 + 1e-4)).all())


@settings(deadline=None, max_examples=150)
@given(weight=weights(), grid=grids, positive=st.booleans())
def test_a_signed_grid_has_the_larger_extreme_on_its_lowest_code(
    weight: Tensor, grid: Grid, positive: bool
) -> None:
    """Exactly, where the step is a number of the scale's dtype, and with nothing clipped."""
    signed = replace(grid, symmetric=True, signed=True)
    # Larger than all others in its group, and short enough for every dtype.
    for _, elements in members(weight, grid):
        top = max(abs(float(weight[e])) for e in elements) + 2.0**-6
        top = 2.0 ** math.ceil(math.log2(top)) * (1.25 if positive else -1.25)
        weight[elements[-1]] = top
    scale, zero = fit_minmax(weight, signed)
    codes = quantize(weight, scale, zero, signed)
    values = dequantize(codes, scale, zero, signed)
    for index, elements in members(weight, grid):
        assert float(scale[index]) * float(weight[elements[-1]]) < 0
        assert int(codes[elements[-1]]) == grid.qmin
        assert float(values[elements[-1]]) == float(weight[elements[-1]])
        step = abs(float(scale[index]))
        for e in elements:
            # The code that the other side lacks costs half a step more there.
            assert abs(float(values[e] - weight[e])) <= step * 1.0001
    other, _ = fit_minmax(-weight, signed)
    assert torch.equal(other, -scale)
    assert torch.equal(quantize(-weight, other, None, signed), codes)


def test_signs_of_scales() -> None:
    signed = Grid(4, True, "group", 2, FP32, signed=True)
    assert signed.effective_divisor == 8
    assert Grid(2, signed=True).effective_divisor == 2
    weight = torch.tensor([[1.6, -0.8, 0.8, -1.6, 0.8, -0.8, 0.0, 0.0]])
    scale, _ = fit_minmax(weight, signed)
    tiny = torch.finfo(FP32).tiny
    assert scale.tolist() == [pytest.approx([-0.2, 0.2, 0.1, tiny])]
    assert quantize(weight, scale, None, signed).tolist() == [[-8, 4, 4, -8, 7, -8, 0, 0]]
    # A divisor that is given stays; a limit hides no sign.
    scale, _ = fit_minmax(weight, replace(signed, divisor=7.0))
    assert scale[0, :2].tolist() == pytest.approx([-1.6 / 7, 1.6 / 7])
    low, high = torch.tensor([-0.8, -1.6]), torch.tensor([1.6, 0.8])
    scale, _ = fit_range(low, high, signed, torch.tensor([0.4, 0.4]))
    assert scale.tolist() == pytest.approx([-0.05, 0.05])


@settings(deadline=None, max_examples=100)
@given(weight=weights(), grid=grids)
def test_grid_values_are_fixed_points(weight: Tensor, grid: Grid) -> None:
    scale, zero = fit_minmax(weight, grid)
    codes = quantize(weight, scale, zero, grid)
    values = dequantize(codes, scale, zero, grid)
    assert torch.equal(quantize(values, scale, zero, grid), codes)
    assert torch.equal(fake_quantize(values, scale, zero, grid), values)


@settings(deadline=None, max_examples=60)
@given(weight=weights(), grid=grids)
def test_real_zero_stays_zero(weight: Tensor, grid: Grid) -> None:
    scale, zero = fit_minmax(weight, grid)
    zeros = torch.zeros_like(weight)
    assert torch.equal(dequantize(quantize(zeros, scale, zero, grid), scale, zero, grid), zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_of_zeros_has_a_usable_scale(dtype: torch.dtype, symmetric: bool) -> None:
    grid = Grid(4, symmetric, "group", 4, dtype)
    weight = torch.tensor([[0.0, 0, 0, 0, 1, -2, 3, 0.5]])
    scale, zero = fit_minmax(weight, grid)
    assert scale[0, 0].float() == torch.finfo(dtype).tiny
    values = dequantize(quantize(weight, scale, zero, grid), scale, zero, grid)
    assert values[0, :4].tolist() == [0, 0, 0, 0]
    assert values[0, 6] != 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_belong_to_the_rounded_scale(dtype: torch.dtype) -> None:
    """A maximum whose scale rounds by nearly half a unit: an unrounded scale gives other codes."""
    steps = 255 / 2
    scale32 = 1.0 + HALF_ULP[dtype] * 0.999
    weight = torch.linspace(-1, 1, 4001)[None] * (steps * scale32)
    grid = Grid(8, True, "channel", None, dtype)
    scale, _ = fit_minmax(weight, grid)
    codes = quantize(weight, scale, None, grid)
    of_rounded = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes, of_rounded)
    if dtype != FP32:
        of_unrounded = (weight / scale32).round().clamp(-128, 127).to(torch.int8)
        assert not torch.equal(codes, of_unrounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_saturates_at_the_dtype_instead_of_overflowing(dtype: torch.dtype) -> None:
    limit = torch.finfo(FP32).max
    for symmetric in (True, False):
        grid = Grid(2, symmetric, "channel", None, dtype)
        scale, _ = fit_minmax(torch.tensor([[limit, -limit]]), grid)
        assert bool(scale.isfinite().all())


@pytest.mark.parametrize(
    ("bits", "codes"), [(2, [-2, -2, -1, 0, 1, 1]), (4, [-8, -4, -2, 0, 2, 7])]
)
def test_known_codes(bits: int, codes: list[int]) -> None:
    """Half to even, saturation at the positive end: divisor 1.5 at 2 bits, 7.5 at 4."""
    weight = torch.tensor([[-7.5, -4.0, -2.5, 0.0, 2.5, 7.5]])
    grid = Grid(bits, True, "channel", None, FP32)
    scale, _ = fit_minmax(weight, grid)
    assert float(scale) == (1.0 if bits == 4 else 5.0)
    expected = [-2, -1, 0, 0, 0, 1] if bits == 2 else codes  # -1.5, -0.8, -0.5, 0, 0.5, 1.5
    assert quantize(weight, scale, None, grid).tolist() == [expected]


def test_divisor_is_used_and_leaves_the_codes_range_alone() -> None:
    weight = torch.tensor([[-127.0, 127.0, 63.4, -0.6]])
    grid = Grid(8, True, "channel", None, FP32, divisor=127.0)
    scale, _ = fit_minmax(weight, grid)
    assert float(scale) == 1.0
    assert quantize(weight, scale, None, grid).tolist() == [[-127, 127, 63, -1]]
    assert Grid(8).effective_divisor == 127.5
    assert Grid(4).effective_divisor == 7.5


def test_range_wider_than_the_values() -> None:
    """``fit_range`` takes any bounds, shapes kept; bounds on one side of zero are widened to it."""
    low, high = torch.tensor([[0.5, -3.0]]), torch.tensor([[1.5, -1.0]])
    scale, zero = fit_range(low, high, Grid(4, False, "group", 2, FP32))
    assert scale.tolist() == [[pytest.approx(0.1), pytest.approx(0.2)]]
    assert zero is not None
    assert zero.tolist() == [[-8, 7]]


@settings(deadline=None, max_examples=100)
@given(weight=weights(), grid=grids, shrink=st.floats(0.3, 1.0))
def test_fake_quantization_and_its_gradients(weight: Tensor, grid: Grid, shrink: float) -> None:
    """Forward is quantize-dequantize; gradients are those of the straight-through formulas."""
    full, zero = fit_minmax(weight, grid)
    scale = (full.float() * shrink).to(grid.scale_dtype)  # some codes saturate
    w = weight.clone().requires_grad_()
    s = scale.float().clone().requires_grad_()
    out = fake_quantize(w, s, zero, grid)
    hard = dequantize(quantize(weight, scale, zero, grid), scale, zero, grid)
    assert torch.equal(out.detach(), hard)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(weight.shape, generator=generator)
    to_weight, to_scale = torch.autograd.grad(out, (w, s), upstream)
    for index, elements in members(weight, grid):
        step, shift = float(scale[index]), 0 if zero is None else int(zero[index])
        total = magnitude = 0.0
        for e in elements:
            # torch's own float32 division, or a tie decides differently
            position = float(weight[e] / scale[index].float())
            code = round(position) + shift
            inside = grid.qmin <= code <= grid.qmax
            assert float(to_weight[e]) == pytest.approx(float(upstream[e]) * inside, rel=1e-5)
            end = min(max(code, grid.qmin), grid.qmax) - shift
            slope = (end - position) if inside else end
            total += float(upstream[e]) * slope
            magnitude += abs(float(upstream[e])) * (abs(slope) + abs(position))
        assert math.isfinite(step)
        assert float(to_scale[index]) == pytest.approx(total, abs=1e-5 * magnitude + 1e-6)


def test_round_ste() -> None:
    x = torch.tensor([-2.5, -0.6, 0.5, 1.5, 2.4999], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, -1, 0, 2, 2]
    (gradient,) = torch.autograd.grad(y, x, torch.arange(5.0))
    assert gradient.tolist() == [0, 1, 2, 3, 4]


def test_grouped_is_a_view_and_groups_are_runs_of_columns() -> None:
    weight = torch.arange(24.0).reshape(2, 12)
    view = grouped(weight, Grid(4, True, "group", 4))
    assert view.shape == (2, 3, 4)
    assert view[1, 2].tolist() == [20, 21, 22, 23]
    assert view.data_ptr() == weight.data_ptr()
    assert grouped(weight, Grid(4, True, "tensor")).shape == (1, 1, 24)
    assert grouped(weight, Grid(4, True, "channel")).shape == (2, 1, 12)


@given(columns=st.integers(1, 400))
def test_group_sizes_are_the_divisors(columns: int) -> None:
    sizes = group_sizes(columns)
    assert sizes == sorted(sizes)
    assert all(columns % size == 0 for size in sizes)
    if columns >= 16:
        assert sizes == [d for d in range(16, columns + 1) if columns % d == 0]
    else:
        assert sizes[-1] == columns


@given(columns=st.integers(1, 3000), wanted=st.integers(1, 256))
def test_auto_group_size_fits(columns: int, wanted: int) -> None:
    size = auto_group_size(columns, wanted)
    assert columns % size == 0
    assert size <= wanted
    for multiple in (32, 16):
        better = [d for d in range(multiple, wanted + 1, multiple) if columns % d == 0]
        if better:
            assert size == max(better)
            return


@pytest.mark.parametrize(
    ("columns", "size"),
    [(576, 96), (1536, 128), (640, 128), (160, 32), (144, 48), (208, 16), (100, 100), (131, 1)],
)
def test_auto_group_size_of_known_widths(columns: int, size: int) -> None:
    assert auto_group_size(columns) == size
    assert Grid(4, True, "group", size).groups(columns) == columns // size


def test_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(InputError, match="576") as caught:
        Grid(4, True, "group", 128).groups(576)
    message = str(caught.value)
    assert "\n" not in message
    for size in ("64", "96", "192", "auto"):
        assert size in message
    assert "128," not in message.partition("sizes that do")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1},
        {"bits": 9},
        {"strategy": "group"},
        {"strategy": "channel", "group_size": 32},
        {"strategy": "group", "group_size": 0},
        {"scale_dtype": torch.float64},
        {"symmetric": False, "signed": True},
    ],
)
def test_impossible_grids_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Grid(**arguments)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(weight=weights(), grid=grids, data=st.data())
def test_rows_of_a_qtensor_are_rows_of_its_values(weight: Tensor, grid: Grid, data: Any) -> None:
    scale, zero = fit_minmax(weight, grid)
    q = QTensor(quantize(weight, scale, zero, grid), scale, zero, grid)
    start = data.draw(st.integers(0, weight.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    assert torch.equal(q.rows(start, stop).dequantize(), q.dequantize()[start:stop])


def test_qtensor_counts_its_bits() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def of(grid: Grid) -> QTensor:
        scale, zero = fit_minmax(weight, grid)
        return QTensor(quantize(weight, scale, zero, grid), scale, zero, grid)

    assert of(Grid(4, True, "group", 32, BF16)).bits_per_weight == 4 + 16 / 32
    assert of(Grid(4, False, "group", 32, FP16)).bits_per_weight == 4 + (16 + 4) / 32
    assert of(Grid(8, True, "channel", None, FP32)).bits_per_weight == 8 + 32 / 64
    q = of(Grid(3, False, "tensor", None, FP32))
    assert torch.equal(q.dequantize(), dequantize(q.codes, q.scale, q.zero_point, q.grid))
    assert Grid(4, True, "group", 64).describe() == "4-bit symmetric g64"
    assert Grid(8, False, "channel").describe() == "8-bit asymmetric per channel"
