"""How matrices are multiplied on the processor at hand.

Some have no instructions for numbers of 16 and 8 bits. There torch multiplies bfloat16, float16 and
int8 an element at a time, five to thirty times slower than float32. ``widened_products`` makes
16-bit products of float32 copies instead and rounds the result, as processors with the instructions
do: operands of 16 bits, sums of 32. What is stored, and what a product is given, stays as it was.
``integer_product`` is that of int8, exact either way. On some processors that have instructions for
bfloat16, ``fast_products`` makes float32 products several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_HALVES = (torch.bfloat16, torch.float16)
_ELEMENTS = 1 << 21  # of a weight in float32 at once: 8 MiB
# Products of int8 codes are at most 2^14: so many of them add up exactly in float32.
_EXACT = 1024


@cache
def slow_dtypes() -> tuple[torch.dtype, ...]:
    """16-bit dtypes whose products this processor has no instructions for.

    None where it has those for bfloat16: looking at every call of torch would cost a few percent.
    A property of the processor and not a measurement: the same bytes come out on a rerun.
    oneDNN calls every AVX-512 a support of bfloat16, and emulates it before Cooper Lake and Zen 4.
    """
    known = torch.ops.mkldnn
    if known._is_mkldnn_bf16_supported() and not _emulates_bf16(torch.cpu.get_capabilities()):
        return ()
    return (torch.bfloat16,) if known._is_mkldnn_fp16_supported() else _HALVES


def _emulates_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether this is an x86 processor without instructions for products of bfloat16."""
    return capabilities.get("architecture") == "x86_64" and not any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert")
    )


@cache
def multiplies_int8() -> bool:
    """Whether torch multiplies int8 matrices faster on this processor than float32 ones."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes weight^T, int32 [M, N], exact.

    Args:
        codes: int8 [M, K], K at most 2^17.
        weight: int8 [N, K].
    """
    if codes.device.type != "cpu" or multiplies_int8():
        return torch._int_mm(codes, weight.t())
    total: Tensor | None = None
    for start in range(0, codes.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        found = F.linear(codes[:, part].float(), weight[:, part].float()).to(torch.int32)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


@contextmanager
def widened_products() -> Iterator[None]:
    """Make 16-bit products by way of float32 where the processor is slow at them.

    As a ``with`` or around a function. It is in force for the thread that enters it, and changes
    nothing where the processor has the instructions, or on another device.
    """
    dtypes = slow_dtypes()
    with _ByFloat32(dtypes) if dtypes else nullcontext():
        yield


@contextmanager
def bf16_products() -> Iterator[None]:
    """Float32 products on a CPU that round their factors to bfloat16 and accumulate in float32."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _product_error(x: Tensor) -> float:
    """Relative error of x^T x [K, K - 64] under ``bf16_products``, against float64."""
    out = torch.zeros(x.shape[1], x.shape[1])
    with bf16_products():
        out[:, 64:].addmm_(x.T, x[:, 64:])
    exact = x.double().T @ x.double()[:, 64:]
    return float((out[:, 64:].double() - exact).norm() / exact.norm())


@cache
def _probe() -> tuple[float, float]:
    """Errors of oneDNN's products on bfloat16-valued and on arbitrary float32 numbers here.

    The switch only permits bfloat16. Processors with matrix units round to it; on others oneDNN
    keeps float32 and is still several times faster than the default library on some of them.
    """
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return math.inf, math.inf
        generator = torch.Generator().manual_seed(0)
        samples = [torch.randn(rows, 320, generator=generator) for rows in (64, 1024)]
        return (
            max(_product_error(x.bfloat16().float()) for x in samples),
            max(_product_error(x) for x in samples),
        )
    except (AttributeError, RuntimeError):
        return math.inf, math.inf


def has_exact_bf16_products() -> bool:
    """Whether bfloat16-valued float32 matrices are multiplied fast and exactly on this machine.

    The product of two bfloat16 numbers is exact in float32, so only the summation may round: the
    result must be within 1e-5 of float64.
    """
    return _probe()[0] <= 1e-5


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Float32 products through oneDNN where it is as exact as float32 (2e-6); else no effect."""
    if device.type == "cpu" and _probe()[1] <= 2e-6:
        with bf16_products():
            yield
    else:
        yield


class _ByFloat32(TorchFunctionMode):
    """Replaces products of CPU tensors of some dtypes."""

    def __init__(self, dtypes: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        instead = _INSTEAD.get(func)
        if instead is not None and "out" not in kwargs and self._concerns(args):
            return instead(*args, **kwargs)
        return func(*args, **kwargs)

    def _concerns(self, args: tuple[Any, ...]) -> bool:
        first = args[0] if args else None
        return (
            isinstance(first, Tensor)
            and first.dtype in self._dtypes
            and first.device.type == "cpu"
            and all(x.dtype == first.dtype for x in args[1:3] if isinstance(x, Tensor))
        )


class _Linear(torch.autograd.Function):
    """x W^T + b, some rows of W at a time: a head in float32 would be the largest tensor there is.

    What is kept for the gradient is what came in, not its float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = _rows(x).float()
        made = x.new_empty(len(wide), len(weight))
        for part in _parts(weight):
            added = None if bias is None else bias[part].float()
            made[:, part] = F.linear(wide, weight[part].float(), added)
        return made.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        incoming = _rows(gradient)
        at_x = torch.zeros(len(incoming), x.shape[-1], device=x.device) if wants[0] else None
        at_weight = torch.empty_like(weight) if wants[1] else None
        wide = _rows(x).float() if wants[1] else None
        for part in _parts(weight):
            some = incoming[:, part].float()
            if at_x is not None:
                at_x.addmm_(some, weight[part].float())
            if at_weight is not None and wide is not None:
                at_weight[part] = some.t() @ wide
        return (
            None if at_x is None else at_x.to(x.dtype).view(x.shape),
            at_weight,
            incoming.float().sum(0).to(x.dtype) if wants[2] else None,
        )


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [N, D]."""
    return x.reshape(-1, x.shape[-1])


def _parts(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight [N, K]."""
    count = max(1, _ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), count):
        yield slice(start, start + count)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return made


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input.float(), other.float()).to(input.dtype)


def _addmm(
    input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = torch.matmul(left.float(), right.float())
    return input.float().mul(beta).add(product, alpha=alpha).to(left.dtype)


def _rmatmul(input: Tensor, other: Tensor) -> Tensor:
    return _matmul(other, input)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    made = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask, *args, **kwargs
    )
    return made.to(query.dtype)


_INSTEAD: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _addmm),
    **dict.fromkeys(
        (
            *(torch.matmul, torch.mm, torch.bmm),
            *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
        ),
        _matmul,
    ),
}
