"""GPTQ: rounding column by column, each column's error compensated by the columns after it.

The classic algorithm (Frantar et al., 2022, "GPTQ", algorithm 1) with these choices, each of
which lowers the output error and none of which changes the format that is stored:

* order: columns by descending H_jj, group scales fitted beforehand in the stored order
  ("static groups"), so that no index of groups has to be stored;
* scales: searched per group to minimise sum_j (w_j - what_j)^2 / U_jj^2, the very loss that the
  column loop incurs (U^T U = H^-1), in place of the group's absolute maximum;
* damping relative to each channel's own energy, see ``hessian.damped``;
* refinement: sweeps of exact coordinate descent over scales and codes on the output error
  (Behdin et al., 2023, "QuantEase", for the codes). A sweep never increases the error.

Everything runs on transposed buffers [K, N], in which a column of the weight is a contiguous row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid, QTensor
from crossbit.solvers.hessian import (
    Damping,
    condition,
    damped,
    inverse_factor,
    row_error,
)
from crossbit.solvers.rtn import fit_scale

ScaleFit = Literal["none", "mse", "hessian"]

# Rows solved at a time (rows are independent): bounds memory and keeps blocks in the cache.
ROWS = 1024


@dataclass(frozen=True)
class GPTQResult:
    """A quantized weight and what it cost.

    Attributes:
        qtensor: codes, scales and zero points.
        error_rows: float32 [N], mean over tokens of the squared output error of each row.
        energy_rows: float32 [N], mean over tokens of the squared output of each exact row.
        damp_used: damping with which the factorisation succeeded (infinity: diagonal only).
        dead: int64, input channels that no token activated.
    """

    qtensor: QTensor
    error_rows: Tensor
    energy_rows: Tensor
    damp_used: float
    dead: Tensor

    @property
    def error(self) -> float:
        """trace((W - What) H (W - What)^T), the squared output error of a mean token."""
        return float(self.error_rows.double().sum())

    @property
    def relative_error(self) -> float:
        """``error`` as a fraction of the squared output of the exact weight."""
        energy = float(self.energy_rows.double().sum())
        return self.error / energy if energy > 0 else 0.0


@dataclass
class _State:
    """Working buffers of some rows, transposed; all float32, changed in place."""

    target: Tensor  # [K, n] the exact weight
    codes: Tensor  # [K, n]
    scale: Tensor  # [G, n]
    zero: Tensor | None  # [G, n]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
    act_order: bool = True,
    damp: float = 0.05,
    damping: Damping = "diagonal",
    clip: ScaleFit = "hessian",
    refine: int = 2,
) -> GPTQResult:
    """Quantizes a weight so that the layer's output error on the calibration inputs is small.

    Args:
        weight: [N, K] float.
        hessian: mean of x x^T over the layer's inputs, [K, K].
        grid: the grid.
        block_size: columns between two updates of the remaining columns; no effect on the result
            beyond rounding.
        act_order: visit columns by descending H_jj with scales fitted beforehand. False: in
            stored order, the scales of a group fitted to the updated weights when it begins.
        damp: damping, >= 0; grows until H can be factorised.
        damping: relative to each diagonal element or, as in the paper, to their mean.
        clip: scales from the group's extremes ("none"), or searched for the least squared error
            ("mse"), weighted by the loss of the column loop ("hessian").
        refine: sweeps of coordinate descent after the column loop; 0 for plain GPTQ.

    Returns:
        The quantized weight with its errors. The textbook algorithm is ``act_order=False,
        damp=0.01, damping="mean", clip="none", refine=0``.

    Raises:
        InputError: shapes or options do not fit. WorkError: weight or H is not finite.
    """
    _check(weight, hessian, block_size, damp, clip, refine)
    exact = weight.detach().to(torch.float32)
    clean, dead = condition(hessian.to(exact.device))
    columns = exact.shape[1]
    diagonal = torch.diagonal(clean)
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=exact.device)
    )
    factor, damp_used = inverse_factor(clean, damp, damping, order)
    loss_weight = torch.empty_like(diagonal)
    loss_weight[order] = torch.diagonal(factor).square().reciprocal()
    importance = loss_weight if clip == "hessian" else None
    search: Literal["none", "mse"] = "none" if clip == "none" else "mse"

    scale, zero = fit_scale(exact, grid, clip=search, importance=importance)
    # The refinement sees the same damping, so that it cannot fit noise that GPTQ did not fit.
    sweeps = refine if math.isfinite(damp_used) else 0
    curvature = damped(clean, damp_used, damping) if sweeps else clean
    rows = exact.shape[0]
    groups = grid.groups(columns)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=exact.device)
    scale = scale.expand(rows, groups).clone()
    zero = None if zero is None else zero.expand(rows, groups).clone()
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        state = _State(
            target=exact[part].T.contiguous(),
            codes=torch.empty(columns, exact[part].shape[0], device=exact.device),
            scale=scale[part].float().T.contiguous(),
            zero=None if zero is None else zero[part].float().T.contiguous(),
        )
        if act_order or groups == 1:
            _solve_static(state, factor, order.tolist(), grid, block_size)
        else:
            _solve_in_order(state, factor, grid, block_size, search, importance)
        if sweeps:
            _refine(state, curvature, grid, block_size, sweeps)
        codes[part] = state.codes.T.to(torch.int8)
        scale[part] = state.scale.T.to(grid.scale_dtype)
        if zero is not None and state.zero is not None:
            zero[part] = state.zero.T.to(torch.int8)
    if grid.strategy == "tensor":
        scale, zero = scale[:1], None if zero is None else zero[:1]
    qtensor = QTensor(codes, scale, zero, grid)
    return GPTQResult(
        qtensor=qtensor,
        error_rows=row_error(exact, qtensor.dequantize(), hessian),
        energy_rows=row_error(exact, torch.zeros_like(exact), hessian),
        damp_used=damp_used,
        dead=dead,
    )


def gptq_many(
    weights: Sequence[Tensor],
    hessian: Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
    act_order: bool = True,
    damp: float = 0.05,
    damping: Damping = "diagonal",
    clip: ScaleFit = "hessian",
    refine: int = 2,
) -> list[GPTQResult]:
    """``gptq`` of several weights [N_i, K] that read the same inputs (q/k/v; gate/up), in one pass.

    The results equal those of separate calls up to float rounding, because rows are independent.
    A grid with one scale a tensor is solved weight by weight.
    """
    if not weights:
        raise InputError("no weights to quantize")
    if len({tuple(weight.shape[1:]) for weight in weights}) != 1:
        raise InputError("weights that share inputs must have the same number of input channels")

    def solve(weight: Tensor) -> GPTQResult:
        return gptq(
            weight,
            hessian,
            grid,
            block_size=block_size,
            act_order=act_order,
            damp=damp,
            damping=damping,
            clip=clip,
            refine=refine,
        )

    if grid.strategy == "tensor" or len(weights) == 1:
        return [solve(weight) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    whole = solve(torch.cat([weight.detach().float() for weight in weights]))
    stacked = whole.qtensor
    zeros: Sequence[Tensor | None] = (
        [None] * len(sizes)
        if stacked.zero_point is None
        else torch.split(stacked.zero_point, sizes)
    )
    parts = zip(
        torch.split(stacked.codes, sizes),
        torch.split(stacked.scale, sizes),
        zeros,
        torch.split(whole.error_rows, sizes),
        torch.split(whole.energy_rows, sizes),
        strict=True,
    )
    return [
        GPTQResult(
            qtensor=QTensor(
                codes.clone(), scale.clone(), None if zero is None else zero.clone(), grid
            ),
            error_rows=error.clone(),
            energy_rows=energy.clone(),
            damp_used=whole.damp_used,
            dead=whole.dead,
        )
        for codes, scale, zero, error, energy in parts
    ]


def _check(
    weight: Tensor, hessian: Tensor, block_size: int, damp: float, clip: str, refine: int
) -> None:
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise InputError(
            f"a weight {list(weight.shape)} does not go with a Hessian {list(hessian.shape)}"
        )
    if clip not in ("none", "mse", "hessian"):
        raise InputError(f"clip: {clip!r} is not 'none', 'mse' or 'hessian'")
    if block_size < 1:
        raise InputError(f"block_size: {block_size} is not a positive number")
    if not (damp >= 0 and math.isfinite(damp)):
        raise InputError(f"damp: {damp} is not a number >= 0")
    if refine < 0:
        raise InputError(f"refine: {refine} is negative")


def _solve_static(
    state: _State, factor: Tensor, order: list[int], grid: Grid, block_size: int
) -> None:
    """The column loop in a given order with given scales; fills ``state.codes``."""
    columns = len(order)
    width = columns // state.scale.shape[0]
    work = state.target[order]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        _solve_block(state, work, factor, start, stop, order, width, grid)


def _solve_in_order(
    state: _State,
    factor: Tensor,
    grid: Grid,
    block_size: int,
    clip: Literal["none", "mse"],
    importance: Tensor | None,
) -> None:
    """The column loop in stored order; scales are fitted to what a group has become."""
    columns = state.target.shape[0]
    width = columns // state.scale.shape[0]
    order = list(range(columns))
    work = state.target.clone()
    one_group = replace(grid, strategy="channel", group_size=None)
    for index, first in enumerate(range(0, columns, width)):
        # Blocks never cross the start of a group, so the group's weights are up to date here.
        group = slice(first, first + width)
        scale, zero = fit_scale(
            work[group].T,
            one_group,
            clip=clip,
            importance=None if importance is None else importance[group],
        )
        state.scale[index] = scale[:, 0].float()
        if state.zero is not None and zero is not None:
            state.zero[index] = zero[:, 0].float()
        for start in range(first, first + width, block_size):
            stop = min(start + block_size, first + width)
            _solve_block(state, work, factor, start, stop, order, width, grid)


def _solve_block(
    state: _State,
    work: Tensor,
    factor: Tensor,
    start: int,
    stop: int,
    order: list[int],
    width: int,
    grid: Grid,
) -> None:
    """Rounds columns start..stop of ``work`` (in solving order), then updates the later ones.

    Inside the block a column collects the updates of the block's earlier columns just before it
    is rounded: one matrix-vector product that reads, where the textbook's outer product after
    every column reads and writes all the later ones.
    """
    qmin, qmax = grid.qmin, grid.qmax
    block = factor[start:stop, start:stop].T.contiguous()
    pivots = torch.diagonal(block).tolist()
    errors = torch.empty(stop - start, work.shape[1], device=work.device)
    for i in range(stop - start):
        column = order[start + i]
        group = column // width
        value, code, error = work[start + i], state.codes[column], errors[i]
        scale = state.scale[group]
        if i:
            value.addmv_(errors[:i].T, block[i, :i], alpha=-1.0)
        torch.div(value, scale, out=code)
        code.round_()
        if state.zero is None:
            code.clamp_(qmin, qmax)
            torch.mul(code, scale, out=error)
        else:
            zero = state.zero[group]
            code.add_(zero).clamp_(qmin, qmax)
            torch.sub(code, zero, out=error)
            error.mul_(scale)
        torch.sub(value, error, out=error)
        error.div_(pivots[i])
    if stop < work.shape[0]:
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)


def _refine(state: _State, curvature: Tensor, grid: Grid, block_size: int, sweeps: int) -> None:
    """Coordinate descent on trace(E H E^T), E = W - What, over scales and codes, in place.

    Per group: the scale moves to the minimiser of the error with everything else fixed, rounded
    to the scale dtype and kept only if the error falls; then every code moves to its minimiser,
    the nearest code to what + (E H)_j / (H_jj scale). Both steps are exact one-dimensional
    minimisations of a quadratic, so the error never rises.
    """
    columns = state.target.shape[0]
    width = columns // state.scale.shape[0]
    diagonal = torch.diagonal(curvature).tolist()
    values = state.codes.clone()  # codes without the zero point
    if state.zero is not None:
        values.view(-1, width, values.shape[1]).sub_(state.zero.unsqueeze(1))
    approximation = values.view(-1, width, values.shape[1]) * state.scale.unsqueeze(1)
    gradient = curvature @ (state.target - approximation.reshape(values.shape))
    del approximation
    for sweep in range(sweeps):
        changed = False
        for index, first in enumerate(range(0, columns, width)):
            group = slice(first, first + width)
            inner = curvature[group, group]
            zero = None if state.zero is None else state.zero[index]
            # The group works on its own rows of the gradient; the others learn of it at its end.
            pull = gradient[group].clone()
            moves = torch.zeros_like(pull)
            if grid.strategy != "tensor":
                _move_scale(values[group], state.scale[index], pull, moves, inner, grid.scale_dtype)
            for start in range(0, width, block_size):
                block = slice(start, min(start + block_size, width))
                steps = _move_codes(
                    values[group][block],
                    state.scale[index],
                    zero,
                    pull[block],
                    inner[block, block],
                    diagonal[first + block.start : first + block.stop],
                    grid,
                )
                moves[block] += steps
                if block.stop < width:
                    pull[block.stop :].addmm_(inner[block.stop :, block], steps, alpha=-1.0)
            changed = changed or bool(moves.any())
            # In the last sweep nothing looks at the groups behind any more.
            begin = group.stop if sweep == sweeps - 1 else 0
            gradient[begin:].addmm_(curvature[begin:, group], moves, alpha=-1.0)
        if not changed:
            break
    if state.zero is not None:
        values.view(-1, width, values.shape[1]).add_(state.zero.unsqueeze(1))
    state.codes.copy_(values)


def _move_scale(
    values: Tensor,
    scale: Tensor,
    pull: Tensor,
    moves: Tensor,
    curvature: Tensor,
    dtype: torch.dtype,
) -> None:
    """Moves a group's scales [n] in place, with the gradient and the changes of its weights [g, n].

    ``values`` [g, n] are the codes without zero point, ``curvature`` [g, g].
    """
    response = curvature @ values
    slope = (values * pull).sum(0)
    bend = (values * response).sum(0)
    wanted = (scale + slope / bend).to(dtype).float()
    step = wanted - scale
    # A step of d lowers the error by 2 d slope - d^2 bend. False for NaN: a group of zeros.
    gains = step * (2.0 * slope - step * bend) > 0
    # A scale keeps its sign: the codes that have it are on the side of zero that it chose.
    better = gains & (wanted.sign() == scale.sign()) & torch.isfinite(wanted)
    step = torch.where(better, step, torch.zeros_like(step))
    scale.copy_(torch.where(better, wanted, scale))
    torch.mul(values, step, out=moves)
    pull.addcmul_(response, step.expand_as(response), value=-1.0)


def _move_codes(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    pulls: Tensor,
    curvature: Tensor,
    diagonal: list[float],
    grid: Grid,
) -> Tensor:
    """Moves the codes of a block [b, n] in place, one column after the other.

    The block's gradient ``pulls`` [b, n] is used up.
    Returns the changes of the weights [b, n].
    """
    low = torch.full_like(scale, grid.qmin) if zero is None else grid.qmin - zero
    high = low + grid.steps
    steps = torch.empty_like(values)
    inverse = scale.reciprocal()
    for i, pivot in enumerate(diagonal):
        pull, value, step = pulls[i], values[i], steps[i]
        if i:
            pull.addmv_(steps[:i].T, curvature[i, :i], alpha=-1.0)
        torch.mul(pull, inverse, out=step)
        step.mul_(1.0 / pivot).add_(value).round_()
        torch.clamp(step, low, high, out=step)
        step.sub_(value)
        value.add_(step)
        step.mul_(scale)
    return steps
