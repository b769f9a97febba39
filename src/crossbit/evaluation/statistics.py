"""From per-window losses to perplexity, standard errors and paired differences. Pure functions.

A window's loss is its mean negative log-likelihood in nats over length - 1 predictions. Windows
are the sampling unit: tokens inside one are far from independent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (NaN with fewer than two windows)."""

    value: float
    stderr: float


def perplexity(losses: Sequence[float]) -> Estimate:
    """exp(mean loss); the error by the delta method: perplexity x standard error of the mean."""
    value = math.exp(statistics.fmean(losses))
    return Estimate(value, value * _standard_error(losses))


def paired_loss(losses: Sequence[float], reference: Sequence[float]) -> Estimate:
    """perplexity / reference perplexity - 1 on the same windows, with its paired error.

    Raises:
        ValueError: the two have different numbers of windows.
    """
    if len(losses) != len(reference):
        raise ValueError(f"{len(losses)} windows against {len(reference)}: not the same text")
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    return Estimate(ratio - 1.0, ratio * _standard_error(differences))


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))
