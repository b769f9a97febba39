"""AWQ: input-channel scales and group clips that protect what the activations make important.

Lin et al., 2023, "AWQ: Activation-aware Weight Quantization". A layer reads x / s and holds W s;
the product is unchanged, but channels with s > 1 are rounded on a finer grid relative to their
size. s is searched on the error of the layer's output, on the very grid that is exported. Where
the activations are not quantized the error is a quadratic form of the mean H = x x^T, which needs
no activations and covers every calibration token (see ``hessian``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.grid import Grid, fit_range, grouped
from crossbit.solvers.hessian import output_error
from crossbit.solvers.rtn import Clip, rtn

# Elements of a weight worked on at a time in the clip search.
_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class AWQScale:
    """The outcome of a scale search.

    Attributes:
        scale: s, float32 [K], > 0: consumers hold W s, their input is divided by s. All ones if
            no candidate was better.
        ratio: exponent of the activations' mean in s; 0.0 for all ones.
        losses: float64 [C], mean squared output error of every candidate; the first is that of
            all ones.
    """

    scale: Tensor
    ratio: float
    losses: Tensor

    @property
    def gain(self) -> float:
        """The error with s as a fraction of the error without, in [0, 1]."""
        neutral = float(self.losses[0])
        return float(self.losses.min()) / neutral if neutral > 0 else 1.0


def weight_magnitude(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """Mean over all rows of |w| relative to its group's absolute maximum: float32 [K], in [0, 1].

    Args:
        weights: [N_i, K] each, the consumers of one input.
        grid: gives the groups.
    """
    total: Tensor | None = None
    rows = 0
    for weight in weights:
        view = grouped(weight.detach().float().abs(), grid)
        share = (view / view.amax(-1, keepdim=True).clamp(min=1e-6)).reshape(weight.shape).sum(0)
        total = share if total is None else total + share
        rows += weight.shape[0]
    if total is None:
        raise InputError("no weights to search a scale for")
    return total / rows


def awq_scale_candidates(
    act_mean: Tensor, weight_mean: Tensor | None = None, n_grid: int = 20
) -> tuple[Tensor, list[float]]:
    """Candidate scales s = act_mean^r / weight_mean^(1 - r), r = 0, 1/n, ..., (n - 1)/n.

    Args:
        act_mean: mean |x| of each input channel, [K], >= 0.
        weight_mean: [K] as of ``weight_magnitude``; None leaves the weights out (r > 0 only,
            because r = 0 is then all ones).
        n_grid: number of exponents.

    Returns:
        float32 [C, K], the first all ones, each other scaled to sqrt(max * min) = 1; and the
        exponents r [C].

    Raises:
        InputError: shapes do not fit or n_grid < 1. WorkError: act_mean is not finite.
    """
    if n_grid < 1:
        raise InputError(f"n_grid: {n_grid} is not a positive number")
    if weight_mean is not None and weight_mean.shape != act_mean.shape:
        raise InputError(f"{list(act_mean.shape)} inputs, {list(weight_mean.shape)} weight means")
    if not torch.isfinite(act_mean).all():
        raise WorkError("activation means are not finite: check the model's weights")
    activity = act_mean.detach().float().clamp(min=1e-5)
    scales, ratios = [torch.ones_like(activity)], [0.0]
    for step in range(0 if weight_mean is not None else 1, n_grid):
        ratio = step / n_grid
        scale = activity.pow(ratio)
        if weight_mean is not None:
            scale = scale / (weight_mean.float().pow(1.0 - ratio) + 1e-4)
        scale = scale.clamp(min=1e-4)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
        ratios.append(ratio)
    return torch.stack(scales), ratios


def awq_search_scale(
    x: Tensor | None,
    weights: Sequence[Tensor],
    grid: Grid,
    act_quant: Callable[[Tensor], Tensor] | None = None,
    n_grid: int = 20,
    *,
    act_mean: Tensor | None = None,
    hessian: Tensor | None = None,
    forward: Callable[[list[Tensor]], Tensor] | None = None,
    duo: bool = True,
    clip: Clip = "none",
) -> AWQScale:
    """Searches the input-channel scale s with the least output error of the quantized consumers.

    The error is measured, in this order of preference: on ``forward``'s output; on the consumers'
    outputs for x when the activations are quantized; by H; on the consumers' outputs for x.

    Args:
        x: sample of inputs, [T, K]; 512 tokens are enough. None if ``hessian`` or ``forward``
            is there and the activations are not quantized.
        weights: the consumers, [N_i, K] each.
        grid: the grid on which W s is rounded.
        act_quant: fake quantization of the consumers' input, [T, K] -> [T, K], applied to x / s;
            None: not quantized.
        n_grid: number of exponents tried.
        act_mean: mean |x| of each channel over all tokens, [K]; None: that of x.
        hessian: mean of x x^T over all tokens, [K, K].
        forward: output of the parent module for consumers with the given effective weights
            What = Q(W s) / s on inputs of its own; quantizing activations is its own matter.
        duo: candidates consider the weights' magnitude too (the reference implementation's way).
        clip: scale fit of the rounding; "mse" weights each channel by its mean square input.

    Returns:
        The best s. Ones are a candidate, so it is never worse than none on what was measured.

    Raises:
        InputError: neither x, hessian nor forward is there, or shapes do not fit.
        WorkError: every candidate's error is NaN.
    """
    if not weights:
        raise InputError("no weights to search a scale for")
    if act_mean is None:
        if x is None:
            raise InputError("act_mean or x is needed to make candidate scales")
        act_mean = x.detach().float().abs().mean(0)
    if x is None and forward is None and (hessian is None or act_quant is not None):
        raise InputError("a sample of inputs is needed to measure the output error")
    exact = [weight.detach().float() for weight in weights]
    magnitude = weight_magnitude(exact, grid) if duo else None
    candidates, ratios = awq_scale_candidates(act_mean, magnitude, n_grid)
    measure = _measure(x, exact, act_quant, hessian, forward)
    squares: Tensor | None = None
    if clip == "mse" and hessian is not None:
        squares = torch.diagonal(hessian).float().clamp(min=0.0)
    elif clip == "mse" and x is not None:
        squares = x.detach().float().square().mean(0)
    losses = []
    for scale in candidates:
        importance = None if squares is None else squares / scale.square()
        rounded = [rtn(weight * scale, grid, clip, importance).dequantize() for weight in exact]
        losses.append(measure(rounded, scale))
    table = torch.tensor(losses, dtype=torch.float64)
    if torch.isnan(table).all():
        raise WorkError("the output error is NaN for every scale: check weights and activations")
    best = int(torch.where(torch.isnan(table), torch.inf, table).argmin())
    return AWQScale(scale=candidates[best].clone(), ratio=ratios[best], losses=table)


def _measure(
    x: Tensor | None,
    exact: list[Tensor],
    act_quant: Callable[[Tensor], Tensor] | None,
    hessian: Tensor | None,
    forward: Callable[[list[Tensor]], Tensor] | None,
) -> Callable[[list[Tensor], Tensor], float]:
    """The mean squared output error as a function of the rounded W s and of s."""
    if forward is not None:
        module = forward
        wanted = module(exact).detach().float()

        def by_forward(rounded: list[Tensor], scale: Tensor) -> float:
            output = module([weight / scale for weight in rounded]).detach().float()
            return float((output - wanted).double().square().mean())

        return by_forward
    rows = sum(weight.shape[0] for weight in exact)
    if hessian is not None and act_quant is None:
        moments = hessian

        def by_hessian(rounded: list[Tensor], scale: Tensor) -> float:
            pairs = zip(exact, rounded, strict=True)
            return sum(output_error(w, what / scale, moments) for w, what in pairs) / rows

        return by_hessian
    assert x is not None
    sample = x.detach().float()
    outputs = [sample @ weight.T for weight in exact]

    def by_sample(rounded: list[Tensor], scale: Tensor) -> float:
        scaled = sample / scale
        inputs = scaled if act_quant is None else act_quant(scaled).float()
        pairs = zip(outputs, rounded, strict=True)
        error = sum(float((inputs @ what.T - y).double().square().sum()) for y, what in pairs)
        return error / (rows * sample.shape[0])

    return by_sample


def awq_search_clip(
    x: Tensor | None,
    weight: Tensor,
    grid: Grid,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    *,
    hessian: Tensor | None = None,
) -> Tensor:
    """Absolute maximum per group at which saturating costs the layer's output least.

    Every group is judged by its own part of the output, sum over its channels of (w - what) x:
    the quadratic form of the group's diagonal block of H. Candidates are the group's absolute
    maximum times 1, 1 - 1/n, ... down to above ``1 - max_shrink``.

    Args:
        x: sample of inputs, [T, K]; not needed with ``hessian``.
        weight: [N, K].
        grid: "channel" or "group".
        n_grid: a shrink of 1 is cut into that many steps.
        max_shrink: largest shrink, in (0, 1].
        hessian: mean of x x^T over all tokens, [K, K].

    Returns:
        float32 [N, G] for ``rtn``'s and ``fit_scale``'s ``limit``; the group's absolute maximum
        where saturating does not pay. Memory beyond it: a few times 512 K elements.

    Raises:
        InputError: grid per tensor, no inputs, or options out of range.
    """
    if grid.strategy == "tensor":
        raise InputError("a clip search needs a grid per channel or group")
    if n_grid < 1 or not 0 < max_shrink <= 1:
        raise InputError(f"n_grid {n_grid} or max_shrink {max_shrink} is out of range")
    groups = grid.groups(weight.shape[1])
    width = weight.shape[1] // groups
    blocks = _group_moments(x, hessian, groups, width)
    ratios = [1.0 - step / n_grid for step in range(max(1, int(max_shrink * n_grid)))]
    limit = torch.empty(weight.shape[0], groups, device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        view = grouped(weight[start : start + step].detach().float(), grid)
        low, high = view.amin(-1), view.amax(-1)
        widest = torch.maximum(high, -low).clamp(min=torch.finfo(torch.float32).tiny)
        best, least = widest, torch.full_like(widest, torch.inf)
        for ratio in ratios:
            bound = widest * ratio
            scale, zero = fit_range(torch.maximum(low, -bound), torch.minimum(high, bound), grid)
            size = scale.float().unsqueeze(-1)
            shift = 0.0 if zero is None else zero.float().unsqueeze(-1)
            codes = (view / size).round_().add_(shift).clamp_(grid.qmin, grid.qmax)
            error = codes.sub_(shift).mul_(size).sub_(view).transpose(0, 1)
            loss = torch.bmm(error, blocks).mul_(error).sum(-1).T
            better = loss < least
            best, least = torch.where(better, bound, best), torch.where(better, loss, least)
        limit[start : start + step] = best
    return limit


def _group_moments(x: Tensor | None, hessian: Tensor | None, groups: int, width: int) -> Tensor:
    """The diagonal blocks of H, float32 [G, g, g], from H itself or from a sample."""
    columns = groups * width
    if hessian is not None:
        if hessian.shape != (columns, columns):
            raise InputError(f"the Hessian must be [{columns}, {columns}]")
        blocks = hessian.float().reshape(groups, width, groups, width)
        return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    if x is None or x.ndim != 2 or x.shape[1] != columns:
        raise InputError(f"a sample of inputs [T, {columns}] or a Hessian is needed")
    parts = x.detach().float().reshape(-1, groups, width).transpose(0, 1)
    return torch.bmm(parts.transpose(1, 2), parts) / x.shape[0]
