"""CrossQuant's column factor, folded (arXiv 2410.07505, made deployable).

CrossQuant's step t_i^alpha c_j^(1-alpha) has a column part on the reduction axis of the matmul,
where no integer kernel can apply it. Here f_j = c_j^(1-alpha) leaves the activations (it is
divided out of the layer before) and enters the weights, W' = W diag(f), which are then quantized.
At run time a per-token scale of X / f remains, so nothing clips whatever the text.

Unlike fake quantization with unfolded weights, the deployed layer pays for the spread that f puts
into the rows of W'; so alpha is searched per layer on the error after the weights are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossbit.recipe import CrossFold
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, normalised, search


def cross_factor(column_maximum: Tensor, alpha: float) -> Tensor:
    """f_j = c_j^(1-alpha) [K], normalised; channels that were always zero take the median."""
    c = column_maximum.float()
    positive = c[c > 0]
    if positive.numel() == 0 or alpha == 1.0:
        return torch.ones_like(c)
    c = torch.where(c > 0, c, positive.median())
    return normalised(c.pow(1.0 - alpha))


def weight_balanced(factor: Tensor, problem: FoldProblem, alpha: float) -> Tensor:
    """SmoothQuant's weight term: f_j / max|W_j|^alpha, so that large weight columns shrink less."""
    largest = torch.stack([w.abs().amax(0) for w in problem.weights]).amax(0)
    positive = largest[largest > 0]
    if positive.numel() == 0:
        return factor
    largest = torch.where(largest > 0, largest, positive.median())
    return normalised(factor / largest.pow(alpha))


def choose(problem: FoldProblem, config: CrossFold) -> FoldChoice:
    """The factor of one group: fixed alpha, or the alpha with the least output error.

    With ``weight_term`` the search also tries each alpha with SmoothQuant's weight term.
    """
    c = problem.column_maximum
    if config.alpha != "search":
        return search(problem, [Candidate(config.alpha, cross_factor(c, config.alpha))])
    candidates = [Candidate(alpha, cross_factor(c, alpha)) for alpha in config.alphas]
    if config.weight_term:
        candidates += [
            Candidate(x.parameter, weight_balanced(x.factor, problem, x.parameter), weighted=True)
            for x in candidates
            if x.parameter < 1.0
        ]
    return search(problem, candidates)
