"""Products of 16-bit and 8-bit matrices by way of float32, and faster ones of float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from crossbit import products
from crossbit.products import slow_dtypes, widened_products

HALVES = (torch.bfloat16, torch.float16)
sizes = st.integers(1, 9)


@pytest.fixture(autouse=True, scope="module")
def processor_without() -> Iterator[None]:
    """As on a processor that multiplies neither; weights in a few parts."""
    patch = pytest.MonkeyPatch()
    patch.setattr(products, "slow_dtypes", lambda: HALVES)
    patch.setattr(products, "_ELEMENTS", 16)
    yield
    patch.undo()


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.tuples(sizes, sizes, sizes, sizes), st.sampled_from(HALVES), st.booleans())
def test_a_linear_layer_and_its_gradients(
    shape: tuple[int, int, int, int], dtype: torch.dtype, biased: bool
) -> None:
    batch, tokens, k, n = shape
    x, w = drawn(0, batch, tokens, k, dtype=dtype), drawn(1, n, k, dtype=dtype)
    b, g = drawn(2, n, dtype=dtype), drawn(3, batch, tokens, n, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, *([b] if biased else []))]
    with widened_products():
        y = F.linear(*leaves)
    torch.autograd.backward(y, g)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.linear(*wide)
    torch.autograd.backward(exact, g.double())
    for found, wanted in [
        (y, exact),
        *((t.grad, u.grad) for t, u in zip(leaves, wide, strict=True)),
    ]:
        assert found is not None
        assert wanted is not None
        assert found.dtype == dtype
        # Half a unit in the last place of the result, and what float32 sums lose.
        limit = wanted.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-5
        assert bool(((found.double() - wanted).abs() <= limit).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_way_to_write_a_product(dtype: torch.dtype) -> None:
    a, b = drawn(0, 3, 5, 7, dtype=dtype), drawn(1, 3, 7, 4, dtype=dtype)
    wanted = torch.matmul(a.float(), b.float()).to(dtype)
    with widened_products():
        many = [a @ b, torch.bmm(a, b), a.bmm(b), a.matmul(b), torch.matmul(a, b)]
        one = [torch.mm(a[0], b[0]), a[0].mm(b[0]), b[0].__rmatmul__(a[0])]
    assert all(torch.equal(found, wanted) for found in many)
    assert all(torch.equal(found, wanted[0]) for found in one)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked: bool) -> None:
    q, k, v = (drawn(i, 2, 3, 8, 4, dtype=torch.bfloat16).requires_grad_() for i in range(3))
    mask = drawn(4, 8, 8, dtype=torch.bfloat16) if masked else None
    with widened_products():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)
    wanted = F.scaled_dot_product_attention(
        q.detach().float(),
        k.detach().float(),
        v.detach().float(),
        attn_mask=None if mask is None else mask.float(),
        is_causal=not masked,
    )
    assert torch.equal(found, wanted.bfloat16())
    torch.autograd.backward(found.float().sum())
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in (q, k, v))


def test_what_does_not_concern_it_is_left_alone() -> None:
    a, b = drawn(0, 5, 7, dtype=torch.float32), drawn(1, 7, 4, dtype=torch.float32)
    out = torch.empty(5, 4, dtype=torch.bfloat16)
    with widened_products():
        assert torch.equal(a @ b, torch.mm(a, b))
        torch.mm(a.bfloat16(), b.bfloat16(), out=out)
        with pytest.raises(RuntimeError):
            F.linear(a.bfloat16(), b.t())
    torch.testing.assert_close(out.float(), a @ b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES)
def test_products_that_are_added_to_something(dtype: torch.dtype) -> None:
    a, b = drawn(0, 3, 5, 7, dtype=dtype), drawn(1, 3, 7, 4, dtype=dtype)
    c = drawn(2, 4, dtype=dtype)
    with widened_products():
        many = [torch.baddbmm(c, a, b, beta=0.5, alpha=2), c.baddbmm(a, b, beta=0.5, alpha=2)]
        one = [torch.addmm(c, a[0], b[0]), c.addmm(a[0], b[0])]
    wide = torch.matmul(a.float(), b.float())
    assert all(torch.equal(found, (c.float() * 0.5 + 2 * wide).to(dtype)) for found in many)
    assert all(torch.equal(found, (c.float() + wide[0]).to(dtype)) for found in one)


@pytest.mark.parametrize("columns", [1, 1024, 1025, 3000])
@pytest.mark.parametrize("largest", [-128, 127])
def test_integers_are_exact(columns: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_int8", lambda: False)
    generator = torch.Generator().manual_seed(columns)
    a, b = (
        torch.randint(-128, 128, (n, columns), dtype=torch.int8, generator=generator)
        for n in (5, 7)
    )
    a[0], b[0] = largest, largest  # the largest sum there is
    b[1, ::2] = 1  # and odd ones
    found = products.integer_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long().t())


def test_integers_where_the_processor_has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.ones(20, 8, dtype=torch.int8)
    calls: list[int] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        calls.append(1)
        return (left.long() @ right.long()).int()

    monkeypatch.setattr(torch, "_int_mm", counted)
    monkeypatch.setattr(products, "multiplies_int8", lambda: True)
    assert torch.equal(products.integer_product(a, a), torch.full((20, 20), 8, dtype=torch.int32))
    assert calls == [1]


def test_once_within_itself_and_none_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return a.float().mm(b.float()).to(a.dtype)

    instead: dict[Any, Any] = {**products._INSTEAD, torch.mm: counted}
    monkeypatch.setattr(products, "_INSTEAD", instead)
    a = drawn(0, 4, 4, dtype=torch.bfloat16)
    with widened_products(), widened_products():
        torch.mm(a, a)
    assert len(calls) == 1
    torch.mm(a, a)
    assert len(calls) == 1
    monkeypatch.setattr(products, "slow_dtypes", lambda: ())
    with widened_products():
        torch.mm(a, a)
    assert len(calls) == 1


def test_fast_products_are_as_exact_as_float32() -> None:
    x, y = (drawn(i, 700, n, dtype=torch.float32) * 3 + 0.5 for i, n in enumerate((333, 150)))
    with products.fast_products(x.device):
        product = x.T @ y
    wanted = x.double().T @ y.double()
    assert float((product.double() - wanted).norm() / wanted.norm()) < 3e-6


@pytest.mark.parametrize("errors", [(math.inf, math.inf), (1e-7, 1e-3)])
def test_machines_without_exact_products_use_plain_float32(
    errors: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    monkeypatch.setattr(products, "_probe", lambda: errors)
    with products.fast_products(torch.device("cpu")):
        assert setting.fp32_precision != "bf16"


def test_the_processor_is_asked_once() -> None:
    assert set(slow_dtypes()) <= set(HALVES)
    assert slow_dtypes() is slow_dtypes()


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx2": True, "avx_ne_convert": True}, False),
        ({"architecture": "aarch64", "bf16": True}, False),
        ({}, False),
    ],
)
def test_avx512_alone_is_no_instruction_for_bfloat16(
    capabilities: dict[str, Any], emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert (torch.bfloat16 in slow_dtypes.__wrapped__()) is emulated
