"""A column factor fitted to the expected rounding error, beyond the family c_j^(1-alpha).

With one step per token for X / f and one per row (or group) for W diag(f), and rounding errors
that are independent between channels, the expected squared output error of a layer is

    A(f) = mean_i sum_j s_i^2 phi(|x_ij| / (f_j s_i)) f_j^2 |W_j|^2,   s_i = max_j |x_ij| / f_j / q
    B(f) = sum_k sum_G (max_{j in G} |W_kj| f_j / d)^2 / 12 * sum_{j in G} E[x_j^2] / f_j^2

phi(u) is the mean squared rounding error, in steps, of values of about u steps: u^2 inside the
quantization kernel (they become zero), 1/12 far above it. A maximum c_j says how large a column
ever is; A sees which columns are large in the same token, and how often. There are as many
unknowns as channels, so it takes many tokens: minibatches of them, and Adam on log f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crossbit.grid import Grid

MIN_TOKENS = 4  # a channel: with fewer a fit learns the tokens, not the columns
STEPS = 150
TOKENS = 384  # a minibatch
ROWS = 512  # of each weight, a step
RATE = 0.05  # first step of log f
TAIL = 0.2  # share of the steps that is averaged: minibatches leave the last one noisy

# phi rises above 1/12 just below half a step, where the error is the value itself. The bump is
# that rise, smoothed over values a third larger or smaller.
_BUMP, _CENTRE, _WIDTH = 0.05, -0.8, 0.45
_SMALLEST = 1e-20  # of magnitudes whose logarithm is taken


def rounding_error(log_u: Tensor) -> tuple[Tensor, Tensor]:
    """phi and its derivative in log u, for values of about exp(log_u) steps; any shape."""
    u2 = (2.0 * log_u).exp_()
    slow = u2 / (1.0 + 12.0 * u2)
    offset = (log_u - _CENTRE) / _WIDTH
    bump = offset.square().mul_(-0.5).exp_().mul_(_BUMP)
    derivative = 2.0 * slow / (1.0 + 12.0 * u2) - bump * offset / _WIDTH
    return slow + bump, derivative


def input_error(
    log_x: Tensor, log_f: Tensor, column_power: Tensor, divisor: float
) -> tuple[Tensor, Tensor]:
    """A(f), and its gradient in log f [K].

    Args:
        log_x: log |x| [T, K].
        log_f: [K].
        column_power: |W_j|^2 [K].
        divisor: q, steps between 0 and a token's largest value.
    """
    relative = log_x - log_f
    largest, where = relative.max(1, keepdim=True)
    phi, derivative = rounding_error(relative - largest + math.log(divisor))
    token = (2.0 * largest).exp_().div_(divisor**2 * log_x.shape[0])
    channel = (2.0 * log_f).exp() * column_power
    value = ((token * phi).sum(0) * channel).sum()
    slope = phi.mul_(2.0).sub_(derivative).mul_(token).mul_(channel)
    gradient = slope.sum(0)
    gradient.index_add_(0, where[:, 0], -slope.sum(1))
    return value, gradient


def weight_error(
    log_w: Tensor, log_f: Tensor, second: Tensor, divisor: float
) -> tuple[Tensor, Tensor]:
    """B(f), and its gradient in log f [K].

    Args:
        log_w: log |W| [N, G, K / G], a step for each of the last dimension.
        log_f: [K].
        second: E[x_j^2] [K].
        divisor: d, steps between 0 and a group's largest value.
    """
    groups, width = log_w.shape[1:]
    spread = (second * (-2.0 * log_f).exp()).view(groups, width)
    largest, where = (log_w + log_f.view(groups, width)).max(2)
    squares = (2.0 * largest).exp_().div_(12.0 * divisor**2)
    group_square, group_spread = squares.sum(0), spread.sum(1)
    value = (group_square * group_spread).sum()
    gradient = (-2.0 * group_square[:, None] * spread).reshape(-1)
    column = where + torch.arange(groups, device=where.device) * width
    gradient.index_add_(0, column.reshape(-1), (2.0 * squares * group_spread).reshape(-1))
    return value, gradient


def fit_factor(
    x: Tensor,
    weights: Sequence[Tensor],
    grids: Sequence[Grid | None],
    start: Tensor,
    *,
    divisor: float,
    shared: Tensor | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """The factor f [K] with the least A(f) + B(f), each layer relative to its output's power.

    Args:
        x: activations [T, K] of any float dtype, of tokens that the fit may see.
        weights: float32 [N_l, K] of the layers that read them.
        grids: the grid of each weight, None for one that is not quantized.
        start: f [K] > 0 to start from.
        divisor: of the inputs' grid, see ``input_error``.
        shared: index [K] of the factor that channel j must use, or None.
        steps: of descent.
        seed: of the choice of minibatches.

    Returns:
        float32 [K].
    """
    x = x[x.abs().amax(1) > 0]
    if x.shape[0] == 0:
        return start
    index = torch.arange(x.shape[1], device=x.device) if shared is None else shared
    size = int(index.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    some = x[torch.randperm(x.shape[0], generator=generator)[:2048]].float()
    powers = [float((some @ w.t()).square().sum(1).mean()) or 1.0 for w in weights]
    column_power = torch.zeros(x.shape[1], device=x.device)
    for weight, power in zip(weights, powers, strict=True):
        column_power += weight.square().sum(0) / power
    second = some.square().mean(0)
    logs = [
        (w.abs().clamp_(min=_SMALLEST).log_(), grid, w.shape[0] / ROWS / power)
        for w, grid, power in zip(weights, grids, powers, strict=True)
        if grid is not None
    ]
    log_f = start.float().log()
    g = log_f.new_zeros(size).scatter_reduce(0, index, log_f, "amax", include_self=False)
    first, curve, tail = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
    averaged = max(1, round(steps * TAIL))
    for step in range(1, steps + 1):
        log_f = g[index]
        tokens = torch.randint(x.shape[0], (TOKENS,), generator=generator)
        log_x = x[tokens].float().abs_().clamp_(min=_SMALLEST).log_()
        value, gradient = input_error(log_x, log_f, column_power, divisor)
        for log_w, grid, whole in logs:
            rows = torch.randint(log_w.shape[0], (ROWS,), generator=generator)
            grouped = log_w[rows].view(ROWS, grid.groups(log_w.shape[1]), -1)
            error, slope = weight_error(grouped, log_f, second, grid.effective_divisor)
            value, gradient = value + whole * error, gradient + whole * slope
        # Of log(A + B), whose size does not change on the way.
        pull = torch.zeros_like(g).index_add_(0, index, gradient) / value
        first = 0.9 * first + 0.1 * pull
        curve = 0.99 * curve + 0.01 * pull.square()
        rate = RATE * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        move = (first / (1.0 - 0.9**step)) / ((curve / (1.0 - 0.99**step)).sqrt() + 1e-8)
        g = g - rate * move
        if step > steps - averaged:
            tail += g / averaged
    return tail[index].exp()
