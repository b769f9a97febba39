"""CFP, the coarse-to-fine preprocessing of CBQ (arXiv 2312.07950): find outliers, then tame them.

Coarse: magnitudes above T = Q3 + fence * IQR are candidates O. Fine: O is sorted and split where

    M = (min O_outlier - max O_reserved)^2 - spread * Var(O_reserved)

is largest. Outliers of weights are truncated to the largest magnitude that is not one; a channel of
activations whose maximum is an outlier is divided by (maximum / that magnitude)^power, which a fold
moves into the weights.

What the paper leaves open is settled here so that the decision depends on the order and the ratios
of the magnitudes alone:

- Zeros take no part. Dead channels and pruned weights say nothing about the spread of the others,
  and would pull the quartiles, and with them T, to 0.
- The reserved set may be empty: then all candidates are outliers, max O_reserved is the largest
  magnitude that is no candidate, and the variance is 0. Without this split a lone outlier, or
  several of one size, could not be told from the bulk. The outlier set is never empty.
- Var is the population's, so that one reserved value has the variance 0.
- Of splits that are equally good the one with fewer outliers is taken.
- With ``gap``, a split counts only where M_inter exceeds spread * Var(O), the scatter of all
  candidates; where none does, nothing is an outlier. M alone must choose something: in a tail that
  just thins out every split of a few reserved values, whose variance is next to nothing, beats
  all others, and every candidate becomes an outlier. Truncating those does harm (in about one
  matrix of eight of SmolLM2-135M: 2 to 5 % of its weights), so ``gap`` is the default for weights.
- With ``judge`` a factor or a truncation stays only where it lowers the layer's output error. A
  weight far from all others may be what the model cannot do without: see docs/cbq.md.
- Quartiles are interpolated linearly between order statistics of all magnitudes: a sample would
  not survive a permutation, and `torch.quantile` refuses more than 16 million values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from crossbit.errors import WorkError
from crossbit.recipe import Cfp
from crossbit.transforms.search import Candidate, FoldChoice, FoldProblem, output_error, search

_TIE = 1e-12  # relative to the terms of M: what rounding can do to two equal splits


@dataclass(frozen=True)
class Detection:
    """Outliers among magnitudes: those above ``limit``, the largest that is reserved.

    ``limit`` is infinite where there are none. ``threshold`` is the coarse T (0 without positive
    magnitudes), ``candidates`` and ``outliers`` count what is above each.
    """

    limit: float
    threshold: float
    candidates: int
    outliers: int


@dataclass(frozen=True)
class Truncation:
    """A truncated weight [N, K] in the dtype of the original.

    ``fraction`` of its elements was truncated; ``change`` is ||W' - W||^2 / ||W||^2; ``limit`` is
    the largest magnitude left (per row: of the rows that have outliers), None if nothing changed.
    """

    weight: Tensor
    fraction: float
    change: float
    limit: float | None


def detect(
    magnitude: Tensor, *, fence: float = 1.5, spread: float = 1.0, gap: bool = False
) -> Detection:
    """Coarse-to-fine detection; invariant under permutation and under scaling by a constant.

    Args:
        magnitude: values >= 0 of any shape and float dtype; may be empty, zeros are passed over.
        fence: IQRs above the third quartile at which candidates begin.
        spread: lambda_2, the weight of the reserved candidates' variance.
        gap: only splits at a real gap count, see the module; where there is none, no outliers.

    Raises:
        WorkError: a magnitude is negative or not finite.
    """
    values = magnitude.detach().flatten()
    if values.numel() and not bool(torch.isfinite(values).all() & (values >= 0).all()):
        raise WorkError("cfp: magnitudes must be finite and not negative; check the weights")
    values = values[values > 0]
    if values.numel() == 0:
        return Detection(math.inf, 0.0, 0, 0)
    first, third = quartiles(values)
    threshold = third + fence * max(0.0, third - first)
    is_candidate = values > _at_most(threshold, values)
    candidates = values[is_candidate].double().sort().values
    if candidates.numel() == 0:
        return Detection(math.inf, threshold, 0, 0)
    bulk = float(values[~is_candidate].max())  # never empty: the smallest value is at most Q3
    reserved = best_split(candidates, bulk, spread, gap=gap)
    if reserved == candidates.numel():
        return Detection(math.inf, threshold, reserved, 0)
    limit = float(candidates[reserved - 1]) if reserved else bulk
    outliers = int((candidates > limit).sum())
    return Detection(limit, threshold, candidates.numel(), outliers)


def _at_most(threshold: float, like: Tensor) -> Tensor:
    """The largest number of ``like``'s dtype that is not above: the same values exceed both."""
    rounded = like.new_tensor(threshold)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded


def quartiles(values: Tensor) -> tuple[float, float]:
    """Q1 and Q3 of values [n >= 1], interpolated linearly in float64 as numpy and torch do."""
    places = [(values.numel() - 1) * q for q in (0.25, 0.75)]
    ranks = sorted({rank for p in places for rank in (math.floor(p), math.ceil(p))})
    # partition: linear time, one copy, no limit on the size.
    exact = values if values.dtype == torch.float64 else values.float()
    parted = np.partition(exact.cpu().numpy(), ranks)
    low, high = (
        float(parted[math.floor(p)])
        + (p - math.floor(p)) * (float(parted[math.ceil(p)]) - float(parted[math.floor(p)]))
        for p in places
    )
    return low, high


def best_split(candidates: Tensor, bulk: float, spread: float, *, gap: bool = False) -> int:
    """How many of the smallest candidates are reserved: the split with the largest M.

    Args:
        candidates: float64 [n >= 1], ascending.
        bulk: largest magnitude that is no candidate: max O_reserved where none is reserved.
        spread: lambda_2.
        gap: only splits whose M_inter exceeds spread * Var(O) count.

    Returns:
        0 to n - 1; n if no split counts.
    """
    below = torch.cat((candidates.new_tensor([bulk]), candidates[:-1]))
    between = (candidates - below).square()
    # The variance of the first k for all k, about the smallest to lose little to cancellation.
    shifted = candidates[:-1] - candidates[0]
    count = torch.arange(1, candidates.numel(), dtype=torch.float64, device=candidates.device)
    mean = shifted.cumsum(0) / count
    variance = (shifted.square().cumsum(0) / count - mean.square()).clamp(min=0)
    within = spread * torch.cat((variance.new_zeros(1), variance))
    merit = between - within
    if gap:
        merit[between <= spread * candidates.var(correction=0)] = -math.inf
        if bool((merit == -math.inf).all()):
            return candidates.numel()
    best = int(merit.argmax())
    tolerance = _TIE * (between[best] + within[best])
    return int((merit >= merit[best] - tolerance).nonzero()[-1])


def truncate(
    weight: Tensor,
    *,
    fence: float = 1.5,
    spread: float = 1.0,
    gap: bool = True,
    per_channel: bool = False,
) -> Truncation:
    """Clamp the outliers of W to the largest reserved magnitude, signs kept.

    Elements up to that magnitude keep their bits.

    Args:
        weight: [N, K], any float dtype, finite.
        fence: see ``detect``.
        spread: see ``detect``.
        gap: see ``detect``.
        per_channel: detect in each row (output channel) rather than in the whole matrix.

    Raises:
        WorkError: a weight is not finite.
    """
    w = weight.detach()
    parts = w if per_channel else w.unsqueeze(0)
    found = [detect(part.abs(), fence=fence, spread=spread, gap=gap) for part in parts]
    outliers = sum(d.outliers for d in found)
    if outliers == 0:
        return Truncation(weight, 0.0, 0.0, None)
    # The limits are magnitudes of the weight (or infinite), so its dtype holds them exactly.
    limits = weight.new_tensor([d.limit for d in found]).unsqueeze(1)
    truncated = w.clamp(-limits, limits)
    largest = w.abs().max().double()  # squares of tiny weights would underflow
    taken = (w != truncated).nonzero(as_tuple=True)
    difference = (w[taken].double() - truncated[taken].double()) / largest
    power = (w / largest.to(weight.dtype)).square().sum(dtype=torch.float64)
    change = float(difference.square().sum() / power)
    limit = max(d.limit for d in found if d.outliers)
    return Truncation(truncated, outliers / weight.numel(), change, limit)


def outlier_factor(column_maximum: Tensor, detection: Detection, power: float) -> Tensor:
    """f_j = (c_j / limit)^power float32 [K] for outlier channels, exactly 1 elsewhere."""
    c = column_maximum.float()
    above = c > detection.limit
    return torch.where(above, (c / detection.limit).pow(power), torch.ones_like(c))


def choose(problem: FoldProblem, config: Cfp) -> FoldChoice:
    """The factor of the detected channels; with ``judge`` only where it lowers the output error.

    Both errors are recorded, that of no factor as "0" (power 0). ``detail`` counts the channels
    that are scaled, those that share a row with an outlier included.
    """
    c = problem.column_maximum
    detection = detect(c, fence=config.fence, spread=config.spread)
    none = Candidate(0.0, torch.ones_like(c))
    if detection.outliers == 0 or config.power == 0:
        return replace(search(problem, [none]), detail={"scaled": 0})
    found = Candidate(config.power, outlier_factor(c, detection, config.power))
    choice = search(problem, [none, found])
    if not config.judge:
        factor = problem.tie(found.factor)
        choice = FoldChoice(factor, found.parameter, found.label, choice.losses)
    return replace(choice, detail={"scaled": int((choice.factor != 1).sum())})


def truncation_errors(problem: FoldProblem, weights: Sequence[Tensor]) -> list[float]:
    """Output errors of one layer with each of ``weights`` [N, K] rounded in place of its own.

    Args:
        problem: a single layer; its weight is the reference.
        weights: what to round on the layer's grid, W itself for the error without truncation.
    """
    (weight,) = problem.weights
    reference = [problem.sample @ weight.t()]
    factor = torch.ones_like(problem.column_maximum)
    return [output_error(replace(problem, weights=[w]), factor, reference) for w in weights]
