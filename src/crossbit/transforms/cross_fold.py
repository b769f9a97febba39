"""CrossQuant's column factor, folded (arXiv 2410.07505, made deployable).

CrossQuant's step t_i^alpha c_j^(1-alpha) has a column part on the reduction axis of the matmul,
where no integer kernel can apply it. Here f_j = c_j^(1-alpha) leaves the activations (it is
divided out of the layer before) and enters the weights, W' = W diag(f), which are then quantized.
At run time a per-token scale of X / f remains, so nothing clips whatever the text.

Unlike fake quantization with unfolded weights, the deployed layer pays for the spread that f puts
into the rows of W'; so alpha is searched per layer on the error after the weights are rounded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crossbit.recipe import CrossFold
from crossbit.transforms.column_fit import MIN_TOKENS, fit_factor
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, normalised, search

FITTED = "fitted"
RMS_ALPHAS = (0.4, 0.5, 0.6)


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


def fitted(problem: FoldProblem, start: FoldChoice) -> FoldChoice:
    """The better of ``start`` and the factor fitted from there, see ``column_fit``."""
    assert problem.fitting is not None
    assert problem.activations is not None
    factor = fit_factor(
        problem.fitting,
        problem.weights,
        problem.grids,
        start.factor,
        divisor=problem.activations.effective_divisor,
        shared=problem.shared,
    )
    again = search(problem, [Candidate(start.parameter, normalised(factor))])
    (loss,) = again.losses.values()
    losses = {**start.losses, FITTED: loss}
    if loss < min(start.losses.values()):
        return replace(again, label=FITTED, losses=losses)
    return replace(start, losses=losses)


def _can_fit(problem: FoldProblem) -> bool:
    """Inputs with one step a token, as the fit's error terms have them, and enough tokens."""
    if problem.activations is None or problem.activations.kind != "per_token":
        return False
    assert problem.fitting is not None
    return problem.fitting.shape[0] >= MIN_TOKENS * problem.fitting.shape[1]


def choose(problem: FoldProblem, config: CrossFold) -> FoldChoice:
    """The factor of one group: fixed alpha, or the candidate with the least output error.

    The search tries each alpha; with ``weight_term`` also with SmoothQuant's weight term; with
    ``fit`` also on the columns' root mean square in place of their maxima, and the factor fitted
    from the best of all these.
    """
    c = problem.column_maximum
    if config.alpha != "search":
        return search(problem, [Candidate(config.alpha, cross_factor(c, config.alpha))])
    candidates = [Candidate(alpha, cross_factor(c, alpha)) for alpha in config.alphas]
    if config.weight_term:
        candidates += [
            Candidate(x.parameter, weight_balanced(x.factor, problem, x.parameter), "with weights")
            for x in candidates
            if x.parameter < 1.0
        ]
    if not config.fit or problem.fitting is None or not _can_fit(problem):
        return search(problem, candidates)
    rms = problem.fitting.float().square().mean(0).sqrt()
    candidates += [Candidate(a, cross_factor(rms, a), "of rms") for a in RMS_ALPHAS]
    return fitted(problem, search(problem, candidates))
