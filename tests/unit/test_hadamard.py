"""Hadamard matrices are orthogonal, and the fast transform is the product with them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.errors import InputError
from crossbit.rotations.hadamard import (
    _field,
    _logarithms,
    _steps,
    apply_hadamard,
    hadamard_matrix,
    order_parts,
    random_signs,
    rotate_columns,
    rotate_rows,
)

# Orders of both constructions of Paley (28 and 344 over GF(27) and GF(343), 36 over GF(17), 20 over
# GF(19), 52 = 2 (25 + 1) over GF(25)), and what joins them with powers of two.
SMALL = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 60, 64, 76, 84, 100, 108, 128, 140, 148, 180)
SMALL_TOO = (192, 256, 344, 576, 640, 896)
LARGE = {
    1152: (32, 36),
    1536: (128, 12),
    2048: (2048, 1),
    2560: (128, 20),
    3072: (256, 12),
    4096: (4096, 1),
    6912: (64, 108),
    8960: (64, 140),
    11008: (32, 344),
    14336: (512, 28),
    18944: (128, 148),
}
IMPOSSIBLE = (3, 5, 6, 7, 10, 18, 30, 92, 4304, 13696)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(n: int) -> Tensor:
    """H / sqrt(n), float64."""
    return hadamard_matrix(n) / math.sqrt(n)


def in_blocks(n: int, block: int) -> Tensor:
    """diag(Hb, ..., Hb), float64 [n, n]."""
    return torch.kron(torch.eye(n // block, dtype=torch.float64), dense(block))


@pytest.mark.parametrize("n", SMALL + SMALL_TOO)
def test_a_matrix_is_hadamard(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.shape == (n, n)
    assert h.dtype == torch.float64
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    # Sums of at most 896 values of +-1: exact in float64.
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "parts"), LARGE.items())
def test_a_large_order_is_hadamard(n: int, parts: tuple[int, int]) -> None:
    """Rows of H_n, made by the transform from rows of the identity: +-1 and orthogonal."""
    assert order_parts(n) == parts
    some = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:48]
    unit = torch.zeros(len(some), n, dtype=torch.float64)
    unit[torch.arange(len(some)), some] = math.sqrt(n)
    rows = apply_hadamard(unit)
    torch.testing.assert_close(rows.abs(), torch.ones_like(rows), rtol=0, atol=1e-12)
    rows = rows.round()
    assert torch.equal(rows @ rows.T, n * torch.eye(len(some), dtype=torch.float64))
    # The dense factors say which +-1: entry (i, j) of a Kronecker product, without building it.
    p, m = parts
    columns = torch.arange(n)
    left = hadamard_matrix(p) if p <= 1024 else apply_hadamard(torch.eye(p)) * math.sqrt(p)
    expected = (
        left.round()[some // m][:, columns // m] * hadamard_matrix(m)[some % m][:, columns % m]
    )
    assert torch.equal(rows, expected.double())


def test_every_order_below_92_is_reached() -> None:
    for n in (1, 2, *range(4, 92, 4)):
        h = hadamard_matrix(n)
        assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    bits = torch.tensor([[(i & j).bit_count() for j in range(n)] for i in range(n)])
    assert torch.equal(hadamard_matrix(n), 1 - 2.0 * (bits % 2).double())


def test_an_order_that_only_a_product_reaches() -> None:
    assert order_parts(7616) == (4, 28 * 68)
    x = numbers(3, 7616)
    torch.testing.assert_close(apply_hadamard(apply_hadamard(x), transpose=True), x)
    unit = torch.zeros(1, 7616, dtype=torch.float64)
    unit[0, 5000] = 1
    row = torch.kron(hadamard_matrix(4)[5000 // 1904], hadamard_matrix(1904)[5000 % 1904])
    torch.testing.assert_close(apply_hadamard(unit)[0], row / math.sqrt(7616))


@pytest.mark.parametrize(("p", "k"), [(3, 1), (17, 1), (5, 2), (3, 3), (7, 3), (3, 4)])
def test_logarithms_are_those_of_a_field(p: int, k: int) -> None:
    """Multiplication by logarithms distributes over addition of digits, and 1 is 1."""
    q = p**k
    logs = _logarithms(p, k)
    assert logs[0] is None
    assert logs[1] == 0
    powers = {log: element for element, log in enumerate(logs) if log is not None}
    assert sorted(powers) == list(range(q - 1))

    def times(a: int, b: int) -> int:
        la, lb = logs[a], logs[b]
        return 0 if la is None or lb is None else powers[(la + lb) % (q - 1)]

    def plus(a: int, b: int) -> int:
        return sum((a // p**j + b // p**j) % p * p**j for j in range(k))

    rng = torch.Generator().manual_seed(q)
    for a, b, c in torch.randint(0, q, (300, 3), generator=rng).tolist():
        assert times(a, plus(b, c)) == plus(times(a, b), times(a, c))


def test_prime_powers() -> None:
    assert _field(343, 3) == (7, 3)
    assert _field(27, 3) == (3, 3)
    assert _field(81, 1) == (3, 4)
    assert _field(27, 1) is None
    assert [q for q in range(1, 40) if _field(q, 3)] == [3, 7, 11, 19, 23, 27, 31]
    assert [q for q in range(1, 40) if _field(q, 1)] == [5, 9, 13, 17, 25, 29, 37]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", SMALL + SMALL_TOO + (1152, 1536, 2048))
def test_fast_is_dense(n: int, transpose: bool) -> None:
    x = numbers(5, n)
    h = dense(n)
    got = apply_hadamard(x, transpose=transpose)
    torch.testing.assert_close(got, x @ (h.T if transpose else h), rtol=0, atol=1e-10)


def test_the_transpose_differs_where_the_matrix_is_not_symmetric() -> None:
    """Or the tests of `transpose` would pass without it."""
    x = numbers(2, 12)
    assert not torch.allclose(apply_hadamard(x), apply_hadamard(x, transpose=True))


@given(
    n=st.sampled_from((*SMALL, *SMALL_TOO, *LARGE)),
    leading=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 2**32),
    transpose=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_transpose_is_the_inverse_and_norms_stay(
    n: int, leading: list[int], seed: int, transpose: bool
) -> None:
    x = numbers(*leading, n, seed=seed)
    before = x.clone()
    y = apply_hadamard(x, transpose=transpose)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apply_hadamard(y, transpose=not transpose), x, rtol=0, atol=1e-11)


def test_steps_multiply_to_the_width() -> None:
    for n in (*SMALL, *SMALL_TOO, *LARGE, 7616):
        assert math.prod(p * m for p, m in _steps(n)) == n
    assert _steps(64) == ((64, 1),)  # one product where that is no slower
    assert _steps(4096) == ((8, 1), (16, 1), (32, 1))
    assert _steps(11008) == ((4, 1), (8, 1), (1, 344))


def test_more_rows_than_go_in_one_chunk() -> None:
    x = numbers(700, 576)
    torch.testing.assert_close(apply_hadamard(x), x @ dense(576), rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [12, 48, 64, 192, 576])
def test_blocks_are_rotated_by_themselves(block: int) -> None:
    x = numbers(2, 3, 576)
    full = in_blocks(576, block)
    torch.testing.assert_close(apply_hadamard(x, block=block), x @ full, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        apply_hadamard(x, block=block, transpose=True), x @ full.T, rtol=0, atol=1e-10
    )


def test_strides_do_not_matter() -> None:
    x = numbers(7, 24, 6)
    views = (x.transpose(1, 2), x.permute(2, 0, 1)[::2], x[::2, :, 0], x[..., :1].mT)
    for view in (*views, x[:1, :, 0].expand(5, 24)):
        rotated = apply_hadamard(view)
        assert rotated.is_contiguous()
        torch.testing.assert_close(rotated, view @ dense(24), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [64, 576, 2048, 11008])
def test_narrow_dtypes_are_rounded_once(n: int, dtype: torch.dtype) -> None:
    x = numbers(4, n).to(dtype)
    x[:, 3] = 100  # as activations have it
    got = apply_hadamard(x)
    assert got.dtype == dtype
    exact = apply_hadamard(x.double())
    # Half a unit in the last place for 16 bits, and float32's own errors.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    bound = rounding * exact.abs() + 2e-6 * exact.abs().amax()
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("n", "block"), [(12, None), (80, None), (24, 12), (96, None)])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients(n: int, block: int | None, transpose: bool) -> None:
    x = numbers(2, n).requires_grad_()

    def rotate(x: Tensor) -> Tensor:
        return apply_hadamard(x, transpose=transpose, block=block)

    assert torch.autograd.gradcheck(rotate, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(rotate, (x,), fast_mode=True)


def test_the_gradient_is_the_transposed_rotation_and_nothing_is_kept() -> None:
    x = numbers(3, 36, dtype=torch.bfloat16).requires_grad_()
    g = numbers(3, 36, seed=1).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = apply_hadamard(x)
    (grad,) = torch.autograd.grad(y, x, g)
    assert kept == []
    assert torch.equal(grad, apply_hadamard(g, transpose=True))


def test_factors_made_in_inference_mode_serve_training() -> None:
    """The matrices are shared between calls, whatever mode made them first."""
    with torch.inference_mode():
        apply_hadamard(torch.ones(1, 4 * 76))
    x = torch.ones(1, 4 * 76, requires_grad=True)
    (grad,) = torch.autograd.grad(apply_hadamard(x).sum(), x)
    torch.testing.assert_close(grad, apply_hadamard(torch.ones(1, 4 * 76), transpose=True))
    hadamard_matrix(76).zero_()
    assert bool((hadamard_matrix(76).abs() == 1).all())


@given(
    n=st.sampled_from((12, 20, 24, 64, 80, 144)),
    out=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    signed=st.booleans(),
    blocks=st.sampled_from((None, 4)),
)
@settings(max_examples=60, deadline=None)
def test_a_rotation_between_two_layers_cancels(
    n: int, out: int, seed: int, signed: bool, blocks: int | None
) -> None:
    """(W R)(R^T V) = W V; and each factor is the dense product."""
    w, v = numbers(out, n, seed=seed), numbers(n, out + 1, seed=seed + 1)
    signs = random_signs(n, seed) if signed else None
    columns, rows = rotate_columns(w, signs, blocks), rotate_rows(v, signs, blocks)
    torch.testing.assert_close(columns @ rows, w @ v, rtol=0, atol=1e-11)
    h = in_blocks(n, blocks or n)
    r = h if signs is None else torch.diag(signs) @ h
    torch.testing.assert_close(columns, w @ r, rtol=0, atol=1e-11)
    torch.testing.assert_close(rows, r.T @ v, rtol=0, atol=1e-11)


def test_a_bias_follows_its_layer() -> None:
    w, b, x = numbers(24, 5), numbers(24, seed=1), numbers(5, seed=2)
    signs = random_signs(24, 3)
    y = rotate_rows(w, signs) @ x + rotate_columns(b[None], signs)[0]
    torch.testing.assert_close(y, rotate_columns((w @ x + b)[None], signs)[0])


def test_online_and_folded_rotations_cancel() -> None:
    """What `apply_hadamard` does to an activation, `rotate_columns` undoes in the weight."""
    x, w = numbers(4, 1536), numbers(8, 1536, seed=1)
    torch.testing.assert_close(apply_hadamard(x) @ rotate_columns(w).T, x @ w.T)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
    ],
)
def test_weights_are_rotated_in_float64(dtype: torch.dtype, kept: torch.dtype) -> None:
    w = numbers(600, 576).to(dtype).requires_grad_()  # two chunks
    before = w.detach().clone()
    signs = random_signs(576, 1).to(dtype)
    exact = (w.detach().double() * signs.double()) @ dense(576)
    got = rotate_columns(w, signs)
    assert got.dtype == kept
    assert not got.requires_grad
    assert torch.equal(w, before)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(kept).eps, atol=1e-10)
    rows = rotate_rows(w.detach().T, signs)
    assert rows.is_contiguous() == w.T.is_contiguous()
    assert torch.equal(rows, got.T)


def test_signs_are_a_function_of_the_seed() -> None:
    signs = random_signs(4096, 7)
    assert signs.dtype == torch.float64
    assert torch.equal(signs.abs(), torch.ones(4096, dtype=torch.float64))
    assert abs(float(signs.mean())) < 0.06
    torch.manual_seed(123)
    assert torch.equal(signs, random_signs(4096, 7))
    assert not torch.equal(signs, random_signs(4096, 8))
    assert random_signs(8, 0).tolist() == [-1, 1, 1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("n", IMPOSSIBLE)
def test_impossible_orders_are_refused(n: int) -> None:
    for attempt in (order_parts, hadamard_matrix, lambda n: apply_hadamard(torch.ones(0, n))):
        with pytest.raises(InputError, match=f"for {n} channels") as caught:
            attempt(n)
        assert "\n" not in str(caught.value)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(InputError, match="rotate blocks of 16 channels"):
        order_parts(4304)
    with pytest.raises(InputError, match="leave them unrotated"):
        order_parts(7)
    with pytest.raises(InputError, match="0 channels"):
        order_parts(0)
    x = torch.ones(2, 12)
    for block in (5, 24, 0, -4):
        with pytest.raises(InputError, match="take a divisor of 12"):
            apply_hadamard(x, block=block)
    with pytest.raises(InputError, match=r"torch.int64 with shape \(2, 12\)"):
        apply_hadamard(x.long())
    with pytest.raises(InputError, match="on the last axis"):
        apply_hadamard(torch.tensor(1.0))
    for signs in (torch.ones(11), torch.full((12,), 2.0), torch.zeros(12)):
        with pytest.raises(InputError, match="12 values of \\+1 or -1"):
            rotate_columns(x, signs)
    for rotate in (rotate_columns, rotate_rows):
        with pytest.raises(InputError, match="pass a matrix"):
            rotate(x[0])
