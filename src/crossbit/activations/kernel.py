"""The quantization kernel of activations, and the experiment that removes it.

The kernel of a quantizer Q is K(Q) = {X_ij : Q(X_ij) = 0} (CrossQuant, arXiv 2410.07505).
With t_i = max_j |X_ij|, c_j = max_i |X_ij| and q = 2^(bits-1) - 1, CrossQuant's step is

    t_i^alpha * c_j^(1-alpha) / q          (alpha = 1: the per-token quantizer)

and an element is in the kernel when it is at most half a step, its *zero bound*, away from
zero (rounding is half to even, so a tie goes to zero). **Exact zeros of X belong to the
kernel**, as the definition says; because a ReLU produces many, every statistic comes twice:
``proportion`` with them and ``proportion_nonzero``, the share of the non-zero elements.

``rescaled=True`` describes the deployable, folded form: with f_j = c_j^(1-alpha) folded away,
a per-token quantizer sees X_ij / f_j, so the step is max_j(|X_ij| / f_j) * f_j / q.

Everything is computed in fp32, on activations given as [tokens, channels]. Without
``column_max`` the column maxima are those of the given rows: the rows are then one window,
and the result is that of the dynamic (not causal) mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.quantize import TINY, cross_step, row_scale
from crossbit.errors import InputError, WorkError

_BLOCK_ELEMENTS = 1 << 20  # rows are taken in blocks of this size, so temporaries stay small


class KernelSetting(NamedTuple):
    """One quantizer whose kernel is counted; ``alpha = 1`` is per token."""

    bits: int
    alpha: float
    rescaled: bool = False


def row_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of ``x [..., C]``: fp32 [..., 1]."""
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()


def column_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each column of ``x [T, C]``: fp32 [C]."""
    return torch.maximum(x.amax(0), -x.amin(0)).float()


def zero_bound(
    x: Tensor,
    bits: int,
    alpha: float,
    column_max: Tensor | None = None,
    divisor: float | None = None,
    *,
    rescaled: bool = False,
) -> Tensor:
    """Half the quantization step of every element: what it must exceed not to become zero.

    Args:
        x: activations [T, C], any float dtype.
        bits: width of the integer grid, 2 to 8.
        alpha: exponent of the row maximum, 0 to 1; 1 is per token.
        column_max: calibrated column maxima [C] (static mode); default: those of ``x``.
        divisor: q, the code of full scale; default 2^(bits-1) - 1. Readers of
            compressed-tensors use 2^(bits-1) - 0.5.
        rescaled: the folded form, see the module's docstring.

    Returns:
        fp32 [T, C], in the units of ``x``.

    Raises:
        InputError: bits, alpha or divisor out of range.
        WorkError: ``column_max`` does not fit ``x``, or ``x`` is not [T, C] with T, C >= 1.
    """
    grid = _grid(bits, alpha, divisor)
    columns = checked_columns(x, column_max)
    return _half_step(x.float(), columns, grid, rescaled).expand(x.shape)


def kernel_mask(
    x: Tensor,
    bits: int,
    alpha: float,
    column_max: Tensor | None = None,
    divisor: float | None = None,
    *,
    rescaled: bool = False,
) -> Tensor:
    """Which elements of ``x [T, C]`` are rounded to zero (bool [T, C]); exact zeros are.

    Arguments and errors as in `zero_bound`. In fp32 ``|x| <= step / 2`` and
    ``round(x / step) == 0`` are the same statement, ties included.
    """
    bound = zero_bound(x, bits, alpha, column_max, divisor, rescaled=rescaled)
    return x.float().abs() <= bound


@dataclass
class KernelCounts:
    """Counts of one layer, or of several added up: proportions are weighted by elements.

    ``kernel[k]`` counts the elements (exact zeros included) in the kernel of
    ``settings[k]``; ``column_below_row`` those with c_j < t_i, where CrossQuant's bound is
    the smaller one.
    """

    settings: tuple[KernelSetting, ...]
    kernel: list[int] = field(default_factory=list)
    elements: int = 0
    zeros: int = 0
    column_below_row: int = 0

    def __post_init__(self) -> None:
        self.kernel = self.kernel or [0] * len(self.settings)

    def add(self, other: KernelCounts) -> None:
        """Add another count with the same settings to this one."""
        if other.settings != self.settings:
            raise WorkError("kernel counts with different settings cannot be added up")
        self.kernel = [a + b for a, b in zip(self.kernel, other.kernel, strict=True)]
        self.elements += other.elements
        self.zeros += other.zeros
        self.column_below_row += other.column_below_row

    def proportion(self, setting: KernelSetting | tuple[Any, ...]) -> float:
        """|K(Q)| / elements, exact zeros included; 0 when nothing was counted."""
        return self.kernel[self._index(setting)] / max(self.elements, 1)

    def proportion_nonzero(self, setting: KernelSetting | tuple[Any, ...]) -> float:
        """Share of the non-zero elements that the quantizer rounds to zero."""
        nonzero = self.elements - self.zeros
        return (self.kernel[self._index(setting)] - self.zeros) / max(nonzero, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "elements": self.elements,
            "zeros": self.zeros / max(self.elements, 1),
            "column_below_row": self.column_below_row / max(self.elements, 1),
            "kernel": [
                {
                    "bits": s.bits,
                    "alpha": s.alpha,
                    "rescaled": s.rescaled,
                    "proportion": self.proportion(s),
                    "proportion_nonzero": self.proportion_nonzero(s),
                }
                for s in self.settings
            ],
        }

    def _index(self, setting: KernelSetting | tuple[Any, ...]) -> int:
        wanted = KernelSetting(*setting)
        if wanted not in self.settings:
            raise WorkError(f"no kernel was counted for {wanted}; counted: {list(self.settings)}")
        return self.settings.index(wanted)


class KernelStats:
    """Counts kernels of several quantizers at once, layer by layer, from a stream of windows.

    Memory: a few integers a layer, and temporaries of one block of rows.

    Args:
        settings: (bits, alpha) or (bits, alpha, rescaled) for each quantizer.
        divisors: q for some widths, ``{8: 127.5}``; default 2^(bits-1) - 1.

    Raises:
        InputError: no setting, or one out of range.
    """

    def __init__(
        self,
        settings: Iterable[KernelSetting | tuple[Any, ...]],
        divisors: Mapping[int, float] | None = None,
    ) -> None:
        self.settings = tuple(KernelSetting(*s) for s in settings)
        if not self.settings:
            raise InputError("kernel statistics: no (bits, alpha) pair given; name at least one")
        q = divisors or {}
        self._grids = [_grid(s.bits, s.alpha, q.get(s.bits)) for s in self.settings]
        self.layers: dict[str, KernelCounts] = {}

    def update(self, layer: str, x: Tensor, column_max: Tensor | None = None) -> None:
        """Count the rows ``x [T, C]`` of one layer's input.

        Without ``column_max [C]`` the chunk is one window (dynamic mode) and must be whole;
        with it (static mode) how rows are cut into chunks makes no difference.

        Raises:
            WorkError: shapes that do not fit, or NaN or infinity in ``x`` or ``column_max``.
        """
        if x.ndim == 2 and x.shape[0] == 0:
            return
        columns = checked_columns(x, column_max)
        if not bool(columns.isfinite().all()) or not bool(row_absmax(x).isfinite().all()):
            raise WorkError(f"{layer}: activations hold NaN or infinity; check the model's dtype")
        counts = self.layers.setdefault(layer, KernelCounts(self.settings))
        for rows in row_blocks(x):
            values, tops = rows.float(), row_absmax(rows)
            size = values.abs()
            counts.elements += values.numel()
            counts.zeros += values.numel() - int(torch.count_nonzero(values))
            counts.column_below_row += int((columns < tops).sum())
            for k, (setting, grid) in enumerate(zip(self.settings, self._grids, strict=True)):
                bound = _half_step(values, columns, grid, setting.rescaled)
                counts.kernel[k] += int((size <= bound).sum())

    def by_type(self, types: Mapping[str, str]) -> dict[str, KernelCounts]:
        """Counts added up over the layers of each type; ``types`` maps layer to type.

        A layer that ``types`` lacks is left out. Order of types: first appearance.
        """
        merged: dict[str, KernelCounts] = {}
        for name, counts in self.layers.items():
            if name in types:
                merged.setdefault(types[name], KernelCounts(self.settings)).add(counts)
        return merged

    def total(self) -> KernelCounts:
        """Counts added up over all layers: the model's kernel."""
        merged = KernelCounts(self.settings)
        for counts in self.layers.values():
            merged.add(counts)
        return merged


def remove_smallest(x: Tensor, theta: float) -> Tensor:
    """Set to zero the elements with |x_ij| < theta * t_i; change nothing else.

    These are the elements that a per-token quantizer with zero bound theta * t_i would round
    to zero (theta = 1 / (2 q) for q codes a side): the remove-kernel experiment's selection.

    Args:
        x: activations [..., C]; t_i is over the last dimension.
        theta: threshold relative to the row maximum, >= 0; above 1 removes everything.

    Returns:
        A tensor like ``x``, same dtype; what stays is bit-equal.
    """
    return torch.where(_row_ratio(x) < theta, torch.zeros_like(x), x)


class RatioHistogram:
    """Distribution of |x_ij| / t_i over a stream of rows, to choose theta for a proportion.

    Counts on a fixed logarithmic grid (512 bins an octave, 2^-32 to 1) made of fp32 bit
    patterns, so thresholds returned lie on bin edges and the counts below them are exact.
    Memory: 128 KiB, whatever the number of tokens.
    """

    _SHIFT = 14  # mantissa bits dropped: 9 of 23 stay
    _BASE = (127 - 32) << (23 - _SHIFT)  # the bit pattern of 2^-32, shifted
    _BINS = (32 << (23 - _SHIFT)) + 3  # zeros, below 2^-32, the grid up to and with 1

    def __init__(self) -> None:
        self._counts = torch.zeros(self._BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x [..., C]``."""
        flat = x.reshape(-1, x.shape[-1])
        for rows in row_blocks(flat):
            # A row of zeros has ratio 0/0; its elements are exact zeros.
            ratio = _row_ratio(rows).nan_to_num(nan=0.0).flatten()
            grid = (ratio.view(torch.int32) >> self._SHIFT).sub_(self._BASE).clamp_(min=-1)
            index = torch.where(ratio > 0, grid + 2, 0)
            self._counts += torch.bincount(index, minlength=self._BINS).cpu()

    def theta(self, proportion: float) -> float:
        """The theta whose removal leaves the share of zeros nearest to ``proportion``.

        Zeros already there count; theta is 0 where they alone reach the proportion.
        Non-decreasing in ``proportion``.

        Raises:
            InputError: proportion outside 0 to 1.
            WorkError: nothing was counted.
        """
        if not 0 <= proportion <= 1:
            raise InputError(f"proportion {proportion} to remove: give a number from 0 to 1")
        below = self._counts.cumsum(0)
        total = int(below[-1])
        if total == 0:
            raise WorkError("remove-kernel threshold: no activations were counted")
        target = proportion * total
        k = int(torch.searchsorted(below.double(), torch.tensor(target, dtype=torch.float64)))
        k = min(k, self._BINS - 1)
        if k > 0 and target - int(below[k - 1]) <= int(below[k]) - target:
            k = int(torch.searchsorted(below, below[k - 1]))
        return self._edge(k)

    def proportion(self, theta: float) -> float:
        """Share of zeros after `remove_smallest` with a ``theta`` that `theta` returned."""
        k = 0
        if theta > 0:
            bits = int(torch.tensor(theta, dtype=torch.float32).view(torch.int32))
            k = min(max((bits >> self._SHIFT) - self._BASE + 1, 0), self._BINS - 1)
        return int(self._counts[: k + 1].sum()) / max(int(self._counts.sum()), 1)

    def _edge(self, k: int) -> float:
        """Upper edge of bin k."""
        if k == 0:
            return 0.0
        bits = torch.tensor((k - 1 + self._BASE) << self._SHIFT, dtype=torch.int32)
        return float(bits.view(torch.float32))


def theta_for_proportion(sample: Tensor, p: float) -> float:
    """Theta for which `remove_smallest` zeroes a proportion ``p`` of ``sample [T, C]``.

    A quantile of |x_ij| / t_i to within a bin of `RatioHistogram` (0.2 % of theta).
    Non-decreasing in ``p``. Raises InputError for p outside 0 to 1.
    """
    histogram = RatioHistogram()
    histogram.update(sample)
    return histogram.theta(p)


def loss_threshold(points: Sequence[tuple[float, float]], tolerance: float) -> float | None:
    """The proportion at which a remove-kernel curve first exceeds a tolerated loss.

    Args:
        points: (proportion removed, loss) pairs, in any order; losses in tolerance's unit.
        tolerance: the loss that is still accepted.

    Returns:
        The proportion, interpolated linearly between the two points around the crossing;
        None when no point exceeds the tolerance. The first point's proportion when even
        that one does.
    """
    previous: tuple[float, float] | None = None
    for proportion, loss in sorted(points):
        if loss > tolerance:
            if previous is None:
                return proportion
            share = (tolerance - previous[1]) / (loss - previous[1])
            return previous[0] + share * (proportion - previous[0])
        previous = (proportion, loss)
    return None


def _row_ratio(x: Tensor) -> Tensor:
    return x.float().abs() / row_absmax(x)


def row_blocks(x: Tensor) -> Iterator[Tensor]:
    """The rows of ``x [T, C]`` in blocks of at most 2^20 elements (but at least one row)."""
    step = max(1, _BLOCK_ELEMENTS // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def checked_columns(x: Tensor, column_max: Tensor | None) -> Tensor:
    """Column maxima [C] for ``x [T, C]``: the given ones, else its own; WorkError on misfit."""
    if x.ndim != 2 or x.numel() == 0:
        raise WorkError(f"activations of shape {list(x.shape)}: expected [tokens, channels]")
    if column_max is None:
        return column_absmax(x)
    if column_max.shape != x.shape[1:]:
        raise WorkError(
            f"column maxima of shape {list(column_max.shape)} for {x.shape[1]} channels: "
            "calibrate on this layer"
        )
    return column_max.to(device=x.device, dtype=torch.float32)


def _grid(bits: int, alpha: float, divisor: float | None) -> ActivationGrid:
    if divisor is not None and not divisor > 0:
        raise InputError(f"divisor {divisor}: give a positive number, such as 127 for 8 bits")
    return ActivationGrid(bits=bits, alpha=alpha, divisor=divisor or 2 ** (bits - 1) - 1)


def _half_step(x: Tensor, columns: Tensor, grid: ActivationGrid, rescaled: bool) -> Tensor:
    """Half the quantizers' own step, so that the kernel is theirs to the last bit."""
    if grid.alpha == 1:
        return row_scale(x, grid) / 2  # [T, 1]: no power, hence exactly the per-token quantizer
    if rescaled:
        factor = columns.clamp(min=TINY).pow(1.0 - grid.alpha)
        return row_scale(x / factor, grid) * factor / 2
    return cross_step(x, columns, grid) / 2
