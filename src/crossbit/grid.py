"""Number grids: how a real number becomes a small integer and back.

Pure functions on tensors. A weight [N, K] (output channels x input channels) is cut into groups
along K; every group has one scale (and one zero point when the grid is asymmetric):

    tensor   one group, G = 1 scale [1, 1]
    channel  a group a row, scale [N, 1]
    group    a group every ``group_size`` columns, scale [N, K / group_size]

Codes are signed, in [-2^(b-1), 2^(b-1) - 1], zero points lie in the same range, and
``value = scale * (code - zero_point)``: the convention of compressed-tensors. Scales are computed
in float32 and rounded to ``scale_dtype`` *before* codes are computed, so the codes belong to the
scale that is stored.

A symmetric grid has one more code below zero than above. On a ``signed`` grid the scale may be
negative, which turns the grid over: the extreme of larger magnitude gets the code -2^(b-1),
whatever its own sign, and the step is that magnitude / 2^(b-1) with nothing clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError

Strategy = Literal["tensor", "channel", "group"]
MIN_BITS, MAX_BITS = 2, 8
SIGNED_BITS = 4  # see ``signed_by_default``


@dataclass(frozen=True)
class Grid:
    """A weight grid.

    Args:
        bits: 2 to 8.
        symmetric: zero maps to code 0 and there is no zero point.
        strategy: what shares a scale: the tensor, an output channel, a group of input channels.
        group_size: input channels a group; only with strategy "group".
        scale_dtype: float32, float16 or bfloat16; scales are rounded to it.
        divisor: symmetric grids: scale = absolute maximum / divisor. None means
            (2^bits - 1) / 2 (7.5 at 4 bits, 127.5 at 8), which compressed-tensors uses, and
            2^(bits - 1) if signed.
        signed: symmetric grids: the scale may be negative, so that the extreme of larger
            magnitude gets the code of larger magnitude.
        rounded: values are rounded to ``scale_dtype`` too, as readers of some formats do, so that
            what is evaluated is what they run.
    """

    bits: int = 4
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    scale_dtype: torch.dtype = field(default=torch.bfloat16)
    divisor: float | None = None
    signed: bool = False
    rounded: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise InputError(f"bits: {self.bits} is outside {MIN_BITS}..{MAX_BITS}")
        if (self.strategy == "group") != (self.group_size is not None):
            raise InputError("group_size goes with strategy 'group', and only with it")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size: {self.group_size} is not a positive number")
        if self.scale_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"scale_dtype: {self.scale_dtype} is not float32, float16 or bfloat16")
        if self.signed and not self.symmetric:
            raise InputError("signed: goes with symmetric grids; a zero point does its work")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest code."""
        return (1 << self.bits) - 1

    @property
    def effective_divisor(self) -> float:
        """The divisor in force: see ``divisor``."""
        if self.divisor is not None:
            return self.divisor
        return float(-self.qmin) if self.signed else self.steps / 2

    def groups(self, columns: int) -> int:
        """Groups in a row of ``columns`` input channels; InputError if they do not fit."""
        if self.strategy != "group":
            return 1
        assert self.group_size is not None
        if columns % self.group_size:
            raise InputError(
                f"group_size {self.group_size} does not divide {columns} input channels; "
                f"sizes that do: {', '.join(map(str, group_sizes(columns)))}; or use 'auto'"
            )
        return columns // self.group_size

    def describe(self) -> str:
        """A short name, such as "4-bit symmetric g64"."""
        shape = f"g{self.group_size}" if self.strategy == "group" else f"per {self.strategy}"
        return f"{self.bits}-bit {'symmetric' if self.symmetric else 'asymmetric'} {shape}"


def as_read(grid: Grid, *, float_inputs: bool = True) -> Grid:
    """The grid with the rounding of values that readers of its file add (transformers 5.23).

    Where a weight has packed zero points, which is so for asymmetric weights of layers with float
    inputs, they multiply in the dtype of the stored scale.
    """
    return replace(grid, rounded=float_inputs and not grid.symmetric)


def signed_by_default(bits: int, symmetric: bool) -> bool:
    """Whether a recipe that does not say gets signed scales: where one code more counts."""
    return symmetric and bits <= SIGNED_BITS


def group_sizes(columns: int) -> list[int]:
    """Group sizes of 16 or more (all, if there are none) that divide ``columns``, ascending."""
    divisors = [d for d in range(1, columns + 1) if columns % d == 0]
    return [d for d in divisors if d >= 16] or divisors


def auto_group_size(columns: int, wanted: int = 128) -> int:
    """The largest usable group size not above ``wanted``: multiples of 32 first, then of 16.

    Kernels want multiples of 32 (GGUF, Marlin); 16 and finally any divisor are the fallbacks.
    """
    fitting = [d for d in range(1, min(wanted, columns) + 1) if columns % d == 0]
    for multiple in (32, 16, 1):
        candidates = [d for d in fitting if d % multiple == 0]
        if candidates:
            return candidates[-1]
    raise InputError(f"no group size fits {columns} input channels")


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """View [N, K] as [N', G, g]: rows, groups of a row, elements of a group (no copy).

    For strategy "tensor" N' is 1 and the whole matrix is one group.
    """
    rows, columns = weight.shape
    if grid.strategy == "tensor":
        return weight.reshape(1, 1, rows * columns)
    count = grid.groups(columns)
    return weight.reshape(rows, count, columns // count)


def fit_range(
    low: Tensor, high: Tensor, grid: Grid, limit: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for groups whose values lie in [low, high].

    Args:
        low: group minima, float, any shape (for example [N, G]).
        high: group maxima, same shape.
        grid: the grid.
        limit: absolute maxima, same shape: what lies beyond saturates. The sign of a signed scale
            is that of the whole range, which a limit below both extremes would hide.

    Returns:
        scale in ``grid.scale_dtype``, always finite for finite input and > 0 unless the grid is
        signed (a group of zeros gets the smallest normal number), and zero point int8 (None when
        symmetric), same shape.
    """
    low32, high32 = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    over = high32 > -low32
    if limit is not None:
        bound = limit.float()
        low32, high32 = torch.maximum(low32, -bound), torch.minimum(high32, bound)
    info = torch.finfo(grid.scale_dtype)
    if grid.symmetric:
        scale = torch.maximum(-low32, high32) / grid.effective_divisor
    else:
        scale = (high32 - low32) / grid.steps
    scale = scale.clamp(min=info.tiny, max=info.max).to(grid.scale_dtype)
    if grid.symmetric:
        return (torch.where(over, -scale, scale) if grid.signed else scale), None
    zero = torch.round(grid.qmin - low32 / scale.float()).clamp(grid.qmin, grid.qmax)
    return scale, zero.to(torch.int8)


def fit_minmax(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale [N', G] and zero point of a weight [N, K] from its group minima and maxima."""
    view = grouped(weight, grid)
    return fit_range(view.amin(-1), view.amax(-1), grid)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes int8 [N, K] of a weight [N, K]; rounds half to even, saturates at the grid's ends."""
    codes = grouped(weight.float(), grid) / scale.float().unsqueeze(-1)
    codes = codes.round_()
    if zero_point is not None:
        codes += zero_point.float().unsqueeze(-1)
    return codes.clamp_(grid.qmin, grid.qmax).to(torch.int8).reshape(weight.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Float32 values [N, K] of codes int8 [N, K]."""
    values = grouped(codes, grid).float()
    if zero_point is not None:
        values -= zero_point.float().unsqueeze(-1)
    values *= scale.float().unsqueeze(-1)
    if grid.rounded:
        values = values.to(grid.scale_dtype).float()
    return values.reshape(codes.shape)


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest with the gradient of the identity (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Quantize and dequantize, differentiable in ``weight`` and ``scale`` (straight-through).

    The gradient reaches ``weight`` only where the code did not saturate; ``scale`` gets the
    gradient of ``scale * code`` with the rounding treated as the identity (LSQ's).
    Forward equals ``dequantize(quantize(...))`` for float32 scales, but for what ``rounded`` does.
    """
    s = scale.float().unsqueeze(-1)
    codes = round_ste(grouped(weight.float(), grid) / s)
    z = 0.0 if zero_point is None else zero_point.float().unsqueeze(-1)
    codes = (codes + z).clamp(grid.qmin, grid.qmax) - z
    return (codes * s).reshape(weight.shape)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight: codes int8 [N, K], scale [N', G], zero point int8 [N', G] or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid

    def dequantize(self) -> Tensor:
        """Float32 values [N, K]."""
        return dequantize(self.codes, self.scale, self.zero_point, self.grid)

    def rows(self, start: int, stop: int) -> QTensor:
        """Output channels ``start`` to ``stop``; a scale of the whole tensor stays as it is."""

        def cut(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[start:stop]

        zero_point = None if self.zero_point is None else cut(self.zero_point)
        return QTensor(self.codes[start:stop], cut(self.scale), zero_point, self.grid)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight in storage, scales and packed zero points included."""
        extra = self.scale.numel() * self.scale.element_size() * 8
        if self.zero_point is not None:
            extra += self.zero_point.numel() * self.grid.bits
        return self.grid.bits + extra / max(1, self.codes.numel())
