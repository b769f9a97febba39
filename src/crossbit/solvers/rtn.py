"""Round to nearest, and the fit of group scales that the other solvers share.

A scale is either the minimum and maximum of its group, or searched: every candidate is the group's
range times a ratio, rounded to the grid's scale dtype, and the one with the least (weighted)
squared weight error wins. The whole range is always a candidate, so a search is never worse. On a
signed grid the candidates are those of the unsigned one with either sign, and the whole range on
the code of larger magnitude: the search is never worse than the unsigned grid's either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.grid import Grid, QTensor, fit_range, grouped, quantize

Clip = Literal["none", "mse"]

# Coarse ratios, then offsets around the best of them. Ratios above 1 serve grids whose top code
# is below the divisor (7 against 7.5): they represent a positive extreme without saturating.
_COARSE = tuple(1.08 - 0.06 * i for i in range(13))
_FINE = (0.04, 0.02, -0.02, -0.04)
# Elements worked on at a time: small enough for the processor's cache.
_CHUNK_ELEMENTS = 1 << 16


def rtn(
    weight: Tensor,
    grid: Grid,
    clip: Clip = "none",
    importance: Tensor | None = None,
    limit: Tensor | None = None,
) -> QTensor:
    """Rounds a weight [N, K] to the nearest point of the grid.

    Args:
        weight: [N, K] float.
        grid: the grid.
        clip: "none" fits scales to the group's extremes, "mse" searches them.
        importance: [K], >= 0, weights the squared error of each input channel in the search, for
            example the mean square of its activations (the diagonal of H).
        limit: [N', G], > 0, absolute maximum per group; what lies beyond saturates (AWQ's clip).

    Raises:
        InputError: shapes do not fit. WorkError: the weight is not finite.
    """
    scale, zero_point = fit_scale(weight, grid, clip=clip, importance=importance, limit=limit)
    return QTensor(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)


def fit_scale(
    weight: Tensor,
    grid: Grid,
    *,
    clip: Clip = "none",
    importance: Tensor | None = None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale [N', G] in the grid's scale dtype and zero point int8 (None when symmetric).

    Arguments and errors as ``rtn``. Memory beyond the result: a few times 64 K elements, or of
    one row of groups if that is larger.
    """
    if weight.ndim != 2:
        raise InputError(f"a weight must have two dimensions, got {list(weight.shape)}")
    if importance is not None and importance.shape != (weight.shape[1],):
        raise InputError(f"importance must be [{weight.shape[1]}], got {list(importance.shape)}")
    view = grouped(weight.detach(), grid)
    low, high = view.amin(-1).float(), view.amax(-1).float()
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise WorkError("the weight is not finite: check the model's checkpoint")
    if limit is not None and limit.shape != low.shape:
        raise InputError(f"limit must be {list(low.shape)}, got {list(limit.shape)}")
    scale, zero = fit_range(low, high, grid, limit)
    if clip == "none":
        return scale, zero
    if clip != "mse":
        raise InputError(f"clip: {clip!r} is not 'none' or 'mse'")
    if limit is not None:
        low, high = torch.maximum(low, -limit.float()), torch.minimum(high, limit.float())
    cost: Tensor | None = None
    if importance is not None:
        cost = (
            importance.float().expand(weight.shape).reshape(view.shape)
            if (grid.strategy == "tensor")
            else importance.float().reshape(view.shape[1:])
        )
    # Whose range times a ratio is tried; the sign of a candidate is put to it afterwards.
    plain = replace(grid, signed=False)
    step = max(1, _CHUNK_ELEMENTS // max(1, view[0].numel()))
    for start in range(0, view.shape[0], step):
        rows = slice(start, start + step)
        part, bounds = view[rows].float(), (low[rows], high[rows])
        sign = scale[rows].sign()
        ratio, loss = _best_ratio(part, *bounds, plain, cost, sign)
        found, shift = fit_range(bounds[0] * ratio, bounds[1] * ratio, plain)
        if grid.signed:
            # The sign of the whole range wins ties, so that -W gets the codes of W.
            found = found * sign
            whole = _loss(part, scale[rows], None, grid, cost, torch.empty_like(part))
            ratio, turned = _best_ratio(part, *bounds, plain, cost, -sign)
            other = fit_range(bounds[0] * ratio, bounds[1] * ratio, plain)[0] * -sign
            found = torch.where(turned < loss, other, found)
            found = torch.where(whole <= torch.minimum(loss, turned), scale[rows], found)
        scale[rows] = found
        if zero is not None and shift is not None:
            zero[rows] = shift
    return scale, zero


def _best_ratio(
    view: Tensor,
    low: Tensor,
    high: Tensor,
    grid: Grid,
    cost: Tensor | None,
    sign: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ratio [n, G] with the least squared error of groups [n, G, g], and that error.

    The error is weighted by ``cost``; ``sign`` [n, G], 1 or -1, is that of the scales.
    """
    buffer = torch.empty_like(view)

    def error(ratio: Tensor) -> Tensor:
        scale, zero_point = fit_range(low * ratio, high * ratio, grid)
        return _loss(view, scale * sign, zero_point, grid, cost, buffer)

    best = torch.ones_like(low)
    loss = error(best)

    def offer(ratio: Tensor) -> None:
        nonlocal best, loss
        offered = error(ratio)
        better = offered < loss
        best, loss = torch.where(better, ratio, best), torch.where(better, offered, loss)

    for value in _COARSE:
        offer(torch.full_like(low, value))
    centre = best
    for offset in _FINE:
        offer(centre + offset)
    return best, loss


def _loss(
    view: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    cost: Tensor | None,
    buffer: Tensor,
) -> Tensor:
    """Weighted squared error [n, G] of rounding groups [n, G, g]; uses up ``buffer``."""
    step = scale.float().unsqueeze(-1)
    torch.div(view, step, out=buffer)
    buffer.round_()
    if zero_point is None:
        buffer.clamp_(grid.qmin, grid.qmax)
    else:
        zero = zero_point.float().unsqueeze(-1)
        buffer.add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero)
    buffer.mul_(step).sub_(view)
    buffer.square_()
    if cost is not None:
        buffer.mul_(cost)
    return buffer.sum(-1)
