"""AWQ's scale search (arXiv 2306.00978): protect the columns that matter by making them larger.

f_j = (mean |X_j|)^r, r on a grid over [0, 1); r = 0 is no scaling, so the result is never worse
than none on the sample. With the weight term of AWQ's reference implementation also
f_j = (mean |X_j|)^r / w_j^(1-r), w_j being the mean of |W_j| relative to its group's maximum. In
this package's convention W' = W diag(f) and X' = X / f.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossbit.grid import Grid, grouped
from crossbit.recipe import AwqScale
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, normalised, search

_FLOOR = 1e-4


def awq_factor(column_mean: Tensor, ratio: float, magnitude: Tensor | None = None) -> Tensor:
    """f_j = mean|X_j|^r [K], over w_j^(1-r) if ``magnitude`` w is given; normalised."""
    if ratio == 0.0 and magnitude is None:
        return torch.ones_like(column_mean)
    factor = column_mean.clamp(min=_FLOOR).pow(ratio)
    if magnitude is not None:
        factor = factor / (magnitude.pow(1.0 - ratio) + _FLOOR)
    return normalised(factor)


def weight_magnitude(weights: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """w [K]: mean over all rows of |W_j| relative to its group's absolute maximum, in [0, 1].

    Args:
        weights: [N_i, K] each, the readers of one input.
        grids: give the groups; a layer that stays in float is one group a row.
    """
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, grid in zip(weights, grids, strict=True):
        view = grouped(weight.detach().float().abs(), grid or Grid(8, strategy="channel"))
        total += (view / view.amax(-1, keepdim=True).clamp(min=1e-6)).reshape(weight.shape).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def choose(problem: FoldProblem, config: AwqScale) -> FoldChoice:
    """The candidate with the least output error on the sample."""
    mean = problem.column_mean
    ratios = [i / config.points for i in range(config.points)]
    candidates = [Candidate(r, awq_factor(mean, r)) for r in ratios]
    if config.weight_term:
        w = weight_magnitude(problem.weights, problem.grids)
        candidates += [Candidate(r, awq_factor(mean, r, w), "with weights") for r in ratios]
    return search(problem, candidates)
