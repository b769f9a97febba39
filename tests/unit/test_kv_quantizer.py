"""The quantizer of keys and values, against loops over the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attending import GRIDS, keys
from torch import Tensor

from crossbit.activations.kv import KVGrid, dequantize_kv, fake_quantize_kv, quantize_kv
from crossbit.errors import InputError
from crossbit.runtime.attention import AttentionChange


def slow_fake(x: Tensor, grid: KVGrid) -> Tensor:
    """Row by row and value by value in Python's float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        row = [float(v) for v in x[tuple(index)]]
        levels = 2**grid.bits - 1
        if grid.symmetric:
            last = 2 ** (grid.bits - 1) - 1
            step = max(abs(v) for v in row) * grid.clip / last
            base, first = 0.0, -last
        else:
            low, high = min(row), max(row)
            step = (high - low) * grid.clip / levels
            base, first, last = (low + high) / 2 - step * levels / 2, 0, levels
        for i, v in enumerate(row):
            code = 0 if step == 0 else min(max(round((v - base) / step), first), last)
            out[tuple(index)][i] = base + code * step
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantizer_equals_a_loop_over_the_definition(grid: KVGrid) -> None:
    x = keys(2, 3, 5, 16)
    actual = fake_quantize_kv(x, grid)
    torch.testing.assert_close(actual.double(), slow_fake(x, grid), rtol=1e-5, atol=1e-5)
    codes = quantize_kv(x, grid)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) <= 2**grid.bits - 1
    assert codes.scale.shape == (2, 3, 5, 1)
    assert torch.equal(dequantize_kv(codes, grid, x.dtype), actual)
    if grid.clip == 1.0:  # exact by construction
        assert torch.equal(actual[:, :, 0], x[:, :, 0])
        assert grid.symmetric or torch.equal(actual[:, :, 1], x[:, :, 1])
    half = fake_quantize_kv(x.bfloat16(), grid)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, fake_quantize_kv(x.bfloat16().float(), grid).bfloat16())


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([1.0, 0.7]), st.integers(-8, 8), st.integers()
)
@settings(deadline=None, max_examples=40)
def test_a_token_and_head_have_a_scale_of_their_own(
    bits: int, symmetric: bool, clip: float, power: int, seed: int
) -> None:
    """Scaling one token's key scales its dequantized key and touches no other."""
    grid = KVGrid(bits, symmetric=symmetric, clip=clip)
    x = keys(1, 2, 6, 8, seed=seed % 2**31)
    before = fake_quantize_kv(x, grid)
    factor = torch.ones(1, 2, 6, 1)
    factor[0, 1, 4] = 2.0**power
    assert torch.equal(fake_quantize_kv(x * factor, grid), before * factor)
    assert torch.equal(fake_quantize_kv(x[:, :, 2:3], grid), before[:, :, 2:3])
    assert torch.equal(fake_quantize_kv(x.flip(2), grid), before.flip(2))
    third = fake_quantize_kv(x / 3, grid) * 3  # a code may flip at a tie, no more
    assert (third - before).abs().max() <= 1.01 * quantize_kv(x, grid).scale.max() + 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_falls_with_bits_and_eight_are_nearly_lossless(symmetric: bool) -> None:
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float((fake_quantize_kv(x, KVGrid(b, symmetric=symmetric)) - x).norm() / x.norm())
        for b in range(2, 9)
    ]
    assert all(b < 0.65 * a for a, b in pairwise(errors))
    assert errors[-1] < 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradient_is_straight_through_but_for_what_the_clip_cuts_off(grid: KVGrid) -> None:
    x = keys(1, 2, 5, 16)[:, :, 2:].requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    loss = (fake_quantize_kv(x, grid) * weight).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    if grid.clip == 1.0:
        assert torch.equal(x.grad, weight)
        return
    lost = x.grad == 0
    assert torch.equal(x.grad[~lost], weight[~lost])
    # The outlier; a clip of 0.8 leaves it less than half a step outside of two or three steps.
    assert bool(lost[..., 1].all()) == (grid.bits > 2)
    error = (fake_quantize_kv(x, grid) - x).abs() / quantize_kv(x, grid).scale
    assert bool((error[lost] > 0.49).all())
    assert bool((error[~lost] < 0.51).all())


def test_settings_that_make_no_sense_are_refused() -> None:
    for bad in ({"bits": 1}, {"bits": 9}, {"clip": 0.0}, {"clip": 1.1}):
        with pytest.raises(InputError):
            KVGrid(**bad)
    before = KVGrid(8, before_rope=True)
    part = torch.zeros(1, 2, 3, 16)
    with pytest.raises(InputError, match="values have no rotary"):
        AttentionChange(value=before)
    with pytest.raises(InputError, match="rotated after RoPE"):
        AttentionChange(key=before, rotation=torch.eye(16))
    with pytest.raises(InputError, match="both its keys"):
        AttentionChange(prefix_key=part)
    with pytest.raises(InputError, match="prefix of shapes"):
        AttentionChange(prefix_key=part, prefix_value=part[:, :, 1:])
