"""AWQ's clip search: where a group's range ends, judged by the layer's output.

Lin et al., 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978); its scales are in
``transforms/awq_scale.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid, fit_range, grouped

# Elements of a weight worked on at a time in the clip search.
_CHUNK_ELEMENTS = 1 << 19


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
            scale, zero = fit_range(low, high, grid, bound)
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
