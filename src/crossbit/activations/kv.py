"""Quantization of keys and values: one scale a head and token. Pure functions, float32 inside.

The asymmetric grid, minimum + code * scale, is that of KIVI (arXiv 2402.02750), here along the head
dimension for keys as for values: a token's codes never change when another token comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossbit.activations.quantize import TINY
from crossbit.errors import InputError

# A value up to half a step beyond the last code is rounded, not clipped.
_EDGE = 0.5 * (1 + 1e-6)


@dataclass(frozen=True)
class KVGrid:
    """An integer grid for keys or values [B, Hkv, L, D]: a scale a head and token.

    Args:
        bits: 2 to 8.
        symmetric: codes -m..m times the scale, m = 2^(b-1) - 1, the scale being the row's absolute
            maximum / m (QuaRot's, arXiv 2404.00456). Else asymmetric: minimum + code * scale with
            codes 0..2^b-1, the scale being (maximum - minimum) / (2^b - 1); the minimum is kept in
            floating point, so a row of equal values is exact.
        clip: factor of the range, about its middle; values beyond it saturate.
        before_rope: quantize keys before the rotary embedding. Not for values.

    Scales and minima are float32 and stay so, in the quantized cache too.

    Raises:
        InputError: bits or clip out of range.
    """

    bits: int = 8
    symmetric: bool = False
    clip: float = 1.0
    before_rope: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"KV bits: {self.bits} is outside 2..8")
        if not 0.0 < self.clip <= 1.0:
            raise InputError(f"KV clip: {self.clip} is outside 0..1")

    @property
    def steps(self) -> int:
        """Steps between the smallest code and the largest.

        Even for a symmetric grid: with all 2^b codes, as activations use them, a row's maximum
        lies half a step beyond the last one, and the last bit of x decides how it is rounded.
        """
        return (1 << self.bits) - (2 if self.symmetric else 1)

    @property
    def lowest(self) -> int:
        """The smallest code; the largest is ``lowest`` + ``steps``."""
        return -(self.steps // 2) if self.symmetric else 0


class KVCodes(NamedTuple):
    """Quantized keys or values.

    Attributes:
        codes: uint8 [..., D], counted from the smallest code.
        scale: float32 [..., 1].
        zero: the value of code 0, float32 [..., 1]; None for a symmetric grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def quantize_kv(x: Tensor, grid: KVGrid) -> KVCodes:
    """Codes and scales of x [..., D]; float32 arithmetic."""
    ratio, scale, zero = _ratio(x.detach().float(), grid)
    codes = ratio.round_().sub_(grid.lowest).clamp_(0, grid.steps).to(torch.uint8)
    return KVCodes(codes, scale, zero)


def dequantize_kv(stored: KVCodes, grid: KVGrid, dtype: torch.dtype) -> Tensor:
    """The values [..., D] that codes stand for, computed in float32, in ``dtype``."""
    values = stored.codes.float().add_(grid.lowest).mul_(stored.scale)
    return (values if stored.zero is None else values.add_(stored.zero)).to(dtype)


def _ratio(values: Tensor, grid: KVGrid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unrounded codes [..., D] of float32 values, scale [..., 1], value of code 0 [..., 1]."""
    if grid.symmetric:
        edge = values.abs().amax(-1, keepdim=True)
        scale = (edge * (2 * grid.clip / grid.steps)).clamp(min=TINY)
        return values / scale, scale, None
    low, high = values.aminmax(dim=-1, keepdim=True)
    span = high - low
    scale = (span * (grid.clip / grid.steps)).clamp(min=TINY)
    zero = low if grid.clip == 1.0 else low + span * ((1 - grid.clip) / 2)
    return (values - zero) / scale, scale, zero


class _FakeKV(torch.autograd.Function):
    """Quantize-dequantize; the gradient is that of the identity where nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: KVGrid) -> Tensor:
        """The dequantized values, in the dtype of x."""
        ctx.clipped = grid.clip < 1.0 and ctx.needs_input_grad[0]
        if ctx.clipped:
            ratio = _ratio(x.float(), grid)[0] - grid.lowest
            ctx.save_for_backward((ratio >= -_EDGE) & (ratio <= grid.steps + _EDGE))
        return dequantize_kv(quantize_kv(x, grid), grid, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Straight through, except to what the clip cut off."""
        return (gradient * ctx.saved_tensors[0] if ctx.clipped else gradient), None


def fake_quantize_kv(x: Tensor, grid: KVGrid) -> Tensor:
    """Quantize and dequantize x [B, H, L, D], one scale a head and token; straight-through.

    Returns:
        The dtype and shape of x; the arithmetic is float32.
    """
    found: Tensor = _FakeKV.apply(x, grid)  # type: ignore[no-untyped-call]
    return found
