"""The remove-kernel experiment: loss against the share of activations set to zero.

Weights are in INT8 and nothing else is quantized. In every layer input the elements that
per-token quantization with a wider zero bound would round to zero are set to zero, the bound
chosen so that the wanted share of them goes on the calibration text (CrossQuant, arXiv
2410.07505, which does not state its rule of selection).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossbit.activations.kernel import loss_threshold
from crossbit.analysis.streams import INT8_NAME, Tally
from crossbit.errors import InputError
from crossbit.evaluation.run import estimate
from crossbit.evaluation.statistics import paired_loss, perplexity

PROPORTIONS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def check_proportions(proportions: Sequence[float]) -> list[float]:
    """Ascending, each once. InputError if one is outside 0 to 1."""
    for p in proportions:
        if not 0 <= p <= 1:
            raise InputError(f"proportion {p} to remove: give a number from 0 to 1")
    return sorted(set(proportions))


def removal_point(
    requested: float, losses: Sequence[float], original: Sequence[float], tally: Tally
) -> dict[str, Any]:
    """One point of the curve, as JSON values.

    ``proportion`` is the share of zeros measured on the evaluation text, zeros that were there
    before included; ``removed`` leaves those out. ``loss`` is against the original model.
    """
    loss = estimate(paired_loss(losses, original), "loss")
    return {
        "requested": requested,
        "proportion": tally.kernel,
        "removed": tally.removed,
        **estimate(perplexity(losses), "perplexity"),
        "loss": loss["loss"],
        "loss_stderr": loss["stderr"],
    }


def removal_curve(
    points: Sequence[dict[str, Any]], original: Sequence[float], tolerance: float
) -> dict[str, Any]:
    """The ``remove_kernel`` part of the analysis; the threshold is in measured proportions."""
    measured = [(p["proportion"], p["loss"]) for p in points if p["proportion"] is not None]
    return {
        "weights": INT8_NAME,
        "loss_against": "original",
        "original": estimate(perplexity(original), "perplexity"),
        "tolerance": tolerance,
        "threshold": loss_threshold(measured, tolerance),
        "points": list(points),
    }
