"""Products of 16-bit matrices on processors that have no instructions for them.

There torch multiplies bfloat16 and float16 an element at a time, six to thirty times slower than
float32. ``widened_products`` makes such products of float32 copies instead and rounds the result,
as processors with the instructions do: operands of 16 bits, sums of 32. What is stored, and what a
product is given, stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_HALVES = (torch.bfloat16, torch.float16)


@cache
def slow_dtypes() -> tuple[torch.dtype, ...]:
    """16-bit dtypes whose products this processor has no instructions for.

    A property of the processor and not a measurement: the same bytes come out on a rerun.
    """
    known = torch.ops.mkldnn
    native = (known._is_mkldnn_bf16_supported(), known._is_mkldnn_fp16_supported())
    return tuple(dtype for dtype, fast in zip(_HALVES, native, strict=True) if not fast)


@contextmanager
def widened_products() -> Iterator[None]:
    """Make 16-bit products by way of float32 where the processor is slow at them.

    As a ``with`` or around a function. It is in force for the thread that enters it, and changes
    nothing where the processor has the instructions, or on another device.
    """
    dtypes = slow_dtypes()
    with _ByFloat32(dtypes) if dtypes else nullcontext():
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
    """x W^T + b. What is kept for the gradient is what came in, not its float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        made = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return made.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        gradient = gradient.float()
        rows = gradient.reshape(-1, gradient.shape[-1])
        at_x = (gradient @ weight.float()).to(x.dtype) if wants[0] else None
        at_weight = None
        if wants[1]:
            at_weight = (rows.t() @ x.reshape(len(rows), -1).float()).to(weight.dtype)
        return at_x, at_weight, rows.sum(0).to(x.dtype) if wants[2] else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return made


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input.float(), other.float()).to(input.dtype)


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
    **dict.fromkeys(
        (
            *(torch.matmul, torch.mm, torch.bmm),
            *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
        ),
        _matmul,
    ),
}
