"""The accumulator and its factorisations against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.products import has_exact_bf16_products
from crossbit.solvers import hessian as module
from crossbit.solvers.hessian import (
    HessianAccumulator,
    condition,
    damped,
    inverse_factor,
    output_error,
    row_error,
)


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * 3 + 0.5


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("columns", [5, 130, 576])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mean_of_outer_products_matches_float64(columns: int, dtype: torch.dtype) -> None:
    x = tokens(3000, columns).to(dtype)
    accumulator = HessianAccumulator(columns)
    accumulator.add(x[:2500].reshape(5, 500, columns))
    accumulator.add(x[2500:])
    result = accumulator.finish()
    wanted = x.double().T @ x.double() / 3000
    assert accumulator.count == 3000
    assert result.dtype == torch.float32
    assert torch.equal(result, result.T)
    assert relative(result, wanted) < 1e-5


def test_values_beyond_bfloat16_are_not_rounded() -> None:
    # 1 + 2^-10 is not a bfloat16 number: rounding it would change the result by 2e-3.
    x = torch.full((64, 256), 1 + 2**-10)
    accumulator = HessianAccumulator(256)
    accumulator.add(x)
    assert torch.allclose(accumulator.finish(), torch.tensor((1 + 2**-10) ** 2), rtol=1e-6)
    # Whatever this machine's products do: such values must not be declared exact.
    assert not module._takes_bf16(x, x)
    assert module._takes_bf16(x.bfloat16(), x) == has_exact_bf16_products()


def test_product_setting_is_restored_and_plain_float32_is_the_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    x = tokens(300, 200).bfloat16()
    fast = HessianAccumulator(200)
    fast.add(x)
    assert setting.fp32_precision == before
    monkeypatch.setattr(module, "has_exact_bf16_products", lambda: False)
    plain = HessianAccumulator(200)
    plain.add(x)
    assert relative(fast.finish(), plain.finish().double()) < 1e-5


def test_no_token_wrong_width_and_nan_are_refused() -> None:
    accumulator = HessianAccumulator(4)
    with pytest.raises(WorkError, match="no calibration token"):
        accumulator.finish()
    with pytest.raises(InputError, match="expected 4"):
        accumulator.add(torch.zeros(3, 5))
    accumulator.add(torch.tensor([[1.0, math.nan, 0.0, 0.0]]))
    with pytest.raises(WorkError, match="not finite"):
        accumulator.finish()
    with pytest.raises(InputError):
        HessianAccumulator(0)


def test_output_error_equals_the_error_of_the_outputs() -> None:
    x, weight = tokens(400, 24).double(), tokens(7, 24, 1)
    other = weight + 0.1 * tokens(7, 24, 2)
    moments = (x.T @ x / 400).float()
    wanted = ((weight - other).double() @ x.T).square().mean(1)
    assert torch.allclose(row_error(weight, other, moments).double(), wanted, rtol=1e-4)
    assert output_error(weight, other, moments) == pytest.approx(float(wanted.sum()), rel=1e-4)
    assert output_error(weight, weight, moments) == 0.0


@settings(deadline=None, max_examples=30)
@given(
    columns=st.integers(1, 40),
    count=st.integers(1, 60),
    damp=st.sampled_from([0.01, 0.1]),
    damping=st.sampled_from(["mean", "diagonal"]),
)
def test_factor_is_that_of_the_damped_inverse(
    columns: int, count: int, damp: float, damping: module.Damping
) -> None:
    x = tokens(count, columns)
    clean, _ = condition(x.T @ x / count)
    factor, used = inverse_factor(clean, damp, damping)
    diagonal = torch.diagonal(clean).double()
    extra = damp * (diagonal if damping == "diagonal" else diagonal.mean().expand(columns))
    matrix = clean.double() + torch.diag(extra)
    assert used == damp
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(damped(clean, damp, damping).double(), matrix, rtol=1e-6)
    product = factor.double().T @ factor.double() @ matrix
    assert torch.allclose(product, torch.eye(columns, dtype=torch.float64), atol=2e-3)


def test_dead_columns_are_decoupled() -> None:
    x = tokens(50, 6)
    x[:, [1, 4]] = 0.0
    clean, dead = condition(x.T @ x)
    assert dead.tolist() == [1, 4]
    assert (torch.diagonal(clean) > 0).all()
    assert int((clean[dead] != 0).sum()) == 2
    alone, every = condition(torch.zeros(3, 3))
    assert torch.equal(alone, torch.eye(3))
    assert every.tolist() == [0, 1, 2]


def test_indefinite_matrix_ends_with_more_damping_or_the_diagonal_alone() -> None:
    matrix = torch.full((3, 3), 2.0)
    matrix.fill_diagonal_(1.0)  # eigenvalues 5, -1, -1
    factor, used = inverse_factor(matrix, 0.01, "mean")
    assert 1.0 < used < math.inf
    assert torch.isfinite(factor).all()
    hopeless = torch.full((3, 3), 1e15)
    hopeless.fill_diagonal_(4.0)
    factor, used = inverse_factor(hopeless, 0.01, "mean")
    assert used == math.inf
    assert torch.equal(factor, torch.eye(3) * 0.5)


def test_condition_refuses_what_is_not_a_finite_square() -> None:
    with pytest.raises(InputError):
        condition(torch.zeros(2, 3))
    with pytest.raises(WorkError):
        condition(torch.full((2, 2), math.nan))
