"""SmoothQuant (arXiv 2211.10438): move the difficulty of activations into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from crossbit.recipe import Smooth
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, search

STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FLOOR = 1e-5


def smooth_factor(column_maximum: Tensor, weight_maximum: Tensor, strength: float) -> Tensor:
    """f_j = max|X_j|^s / max|W_j|^(1-s) [K] (equation 4); strength 0 to 1."""
    c = column_maximum.float().clamp(min=_FLOOR)
    w = weight_maximum.float().clamp(min=_FLOOR)
    return (c.pow(strength) / w.pow(1.0 - strength)).clamp(min=_FLOOR)


def choose(problem: FoldProblem, config: Smooth) -> FoldChoice:
    """The factor of one group at a fixed strength, or at the one with the least output error."""
    largest = torch.stack([w.abs().amax(0) for w in problem.weights]).amax(0)
    strengths = STRENGTHS if config.strength == "search" else (config.strength,)
    return search(
        problem,
        [Candidate(s, smooth_factor(problem.column_maximum, largest, s)) for s in strengths],
    )
