"""AWQ's scale search (arXiv 2306.00978): protect the columns that matter by making them larger.

f_j = (mean |X_j|)^r, r on a grid over [0, 1); r = 0 is no scaling, so the result is never worse
than none on the sample. In this package's convention W' = W diag(f) and X' = X / f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossbit.recipe import AwqScale
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, normalised, search

_FLOOR = 1e-4


def awq_factor(column_mean: Tensor, ratio: float) -> Tensor:
    """f_j = mean|X_j|^r [K], normalised."""
    if ratio == 0.0:
        return torch.ones_like(column_mean)
    return normalised(column_mean.clamp(min=_FLOOR).pow(ratio))


def choose(problem: FoldProblem, config: AwqScale) -> FoldChoice:
    """The ratio with the least output error on the sample."""
    ratios = [i / config.points for i in range(config.points)]
    return search(problem, [Candidate(r, awq_factor(problem.column_mean, r)) for r in ratios])
